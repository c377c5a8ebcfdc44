"""The documented form of a layout as nested mappings and lists, and back.

In: a document (docs/reference/layout-files.md), as plain data or as nodes that know their line. Out: a `Layout`, or
plain data. Pure. Never guesses: an unknown key, a missing one or a value of the wrong kind is an error that says where.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ckpt.errors import InvalidInputError
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Experts, Flat, Pad, Parts, Pipeline, Rule, ShardStep, Stage, Where

T = TypeVar("T")

VERSION = 1
DEPTH_MAX = 12  # levels of nesting; the form needs 7
_WHERE_KEYS = ("shard", "parts", "pad", "experts", "stage", "on", "flat", "shape")


@dataclass(frozen=True)
class Node:
    """A value of a document and where it stands."""

    value: dict[str, Node] | list[Node] | str | int | None
    at: str  # "layout.yaml line 7", or "layout rules[0].shard" for data without lines

    def fail(self, message: str, *hints: str) -> InvalidInputError:
        return InvalidInputError(f"{self.at}: {message}", kind="bad-layout", hints=hints)

    def mapping(self, subject: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Node]:
        """The entries that are set; an error for keys beyond `known`, naming the nearest one."""
        if not isinstance(self.value, dict):
            raise self.fail(f"{subject} must be a mapping, found {self.kind}")
        for key, node in self.value.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
                raise node.fail(f"unknown key `{key}` in {subject}", hint)
        for key in required:
            if key not in self.value:
                raise self.fail(f"{subject} has no `{key}`")
        return self.value

    def pairs(self, subject: str) -> list[tuple[str, Node]]:
        """The entries of a mapping with free keys, or of a list of mappings with one key each, in order."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        out: list[tuple[str, Node]] = []
        for node in self.items(subject):
            if not isinstance(node.value, dict) or len(node.value) != 1:
                raise node.fail(f"each entry of {subject} must be one `name: value`, found {node.kind}")
            out.extend(node.value.items())
        return out

    def items(self, subject: str) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.fail(f"{subject} must be a list, found {self.kind}")
        return self.value

    def number(self, subject: str) -> int:
        if not isinstance(self.value, int):
            raise self.fail(f"{subject} must be a whole number, found {self.kind}")
        return self.value

    def numbers(self, subject: str) -> tuple[int, ...]:
        return tuple(node.number(f"each of {subject}") for node in self.items(subject))

    def text(self, subject: str) -> str:
        if not isinstance(self.value, str):
            raise self.fail(f"{subject} must be text, found {self.kind}")
        return self.value

    @property
    def kind(self) -> str:
        names = {dict: "a mapping", list: "a list", type(None): "nothing"}
        return names.get(type(self.value), repr(self.value))


def nodes_of(data: object, at: str = "layout", depth: int = 0) -> Node:
    """Plain data as nodes; every node's place is its path."""
    if depth > DEPTH_MAX:
        raise InvalidInputError(f"{at}: nested deeper than {DEPTH_MAX} levels", kind="bad-layout")
    dot = "." if "." in at or "[" in at or " " in at else " "
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise InvalidInputError(f"{at}: a key must be text, found {key!r}", kind="bad-layout")
        return Node({key: nodes_of(value, f"{at}{dot}{key}", depth + 1) for key, value in data.items()}, at)
    if isinstance(data, (list, tuple)):
        return Node([nodes_of(value, f"{at}[{i}]", depth + 1) for i, value in enumerate(data)], at)
    if data is None or isinstance(data, str) or (isinstance(data, int) and not isinstance(data, bool)):
        return Node(data, at)
    raise InvalidInputError(f"{at}: a value must be text, a whole number, a list or a mapping, found {data!r}")


def from_document(data: object) -> Layout:
    """The layout that a document describes; InvalidInputError (`bad-layout`) naming the place of the first fault."""
    return layout_of(nodes_of(data))


def layout_of(root: Node) -> Layout:
    """The layout that a tree of nodes describes."""
    entries = root.mapping("a layout", ("version", "mesh", "pipeline", "rules"), ("version", "mesh", "rules"))
    version = entries["version"].number("`version`")
    if version != VERSION:
        raise entries["version"].fail(f"layout files of version {version} are not known, expected {VERSION}")
    mesh = _checked(
        entries["mesh"],
        lambda node: Mesh(
            axes=tuple((axis, size.number(f"the size of axis `{axis}`")) for axis, size in node.pairs("`mesh`"))
        ),
    )
    pipeline = _checked(entries["pipeline"], _pipeline) if _is_set(entries, "pipeline") else None
    if pipeline is not None:
        _checked(entries["pipeline"], lambda _: Layout(mesh=mesh, rules=(), pipeline=pipeline))
    rules = tuple(_checked(node, _rule) for node in entries["rules"].items("`rules`"))
    for node, rule in zip(entries["rules"].items("`rules`"), rules, strict=True):
        # Each rule alone first, so that the error says which one it is.
        _checked(node, lambda _, rule=rule: Layout(mesh=mesh, rules=(rule,), pipeline=pipeline))  # type: ignore[misc]
    return _checked(root, lambda _: Layout(mesh=mesh, rules=rules, pipeline=pipeline))


def _checked(node: Node, make: Callable[[Node], T]) -> T:
    """`make(node)`, with the place of the node in the errors of what it makes."""
    try:
        return make(node)
    except InvalidInputError as error:
        if error.kind == "bad-layout":
            raise
        raise node.fail(error.message, *error.hints) from None


def _is_set(entries: Mapping[str, Node], key: str) -> bool:
    return key in entries and entries[key].value is not None


def _pipeline(node: Node) -> Pipeline:
    entries = node.mapping("`pipeline`", ("axis", "layers", "split"), ("axis",))
    return Pipeline(
        axis=entries["axis"].text("`axis`"),
        layers=entries["layers"].number("`layers`") if "layers" in entries else 0,
        split=entries["split"].numbers("`split`") if "split" in entries else (),
    )


def _rule(node: Node) -> Rule:
    entries = node.mapping("a rule", ("match", *_WHERE_KEYS, "optimizer", "priority"), ("match",))
    match = entries["match"]
    texts = [match] if isinstance(match.value, str) else match.items("`match`")
    patterns = tuple(_checked(item, lambda item: NamePattern(item.text("a name pattern"))) for item in texts)
    where = _where(entries, Where())
    optimizer: Where | Literal["same", "none"] = "same"
    if _is_set(entries, "optimizer"):
        optimizer = _optimizer(entries["optimizer"], where)
    priority = entries["priority"].number("`priority`") if _is_set(entries, "priority") else 0
    return Rule(match=patterns, where=where, optimizer=optimizer, priority=priority)


def _optimizer(node: Node, where: Where) -> Where | Literal["same", "none"]:
    if isinstance(node.value, dict):
        return _where(node.mapping("`optimizer`", _WHERE_KEYS), where)
    if node.value == "same" or node.value == "none":
        return "same" if node.value == "same" else "none"
    raise node.fail(f"`optimizer` must be `same`, `none` or a mapping, found {node.kind}")


def _where(entries: Mapping[str, Node], base: Where) -> Where:
    """`base` with the given keys changed; a key set to nothing goes back to its default."""
    readers: dict[str, Callable[[Node], Any]] = {
        "shard": _shard,
        "parts": _parts,
        "pad": _pad,
        "experts": _experts,
        "stage": _stage,
        "on": _on,
        "flat": _flat,
        "shape": lambda node: node.numbers("`shape`"),
    }
    changes: dict[str, Any] = {}
    for key, reader in readers.items():
        if key in entries:
            node = entries[key]
            changes[key] = getattr(Where(), key) if node.value is None else _checked(node, reader)
    return dataclasses.replace(base, **changes)


def _shard(node: Node) -> tuple[ShardStep, ...]:
    steps = tuple(ShardStep(axis=axis, dim=dim.number(f"dim of axis `{axis}`")) for axis, dim in node.pairs("`shard`"))
    dims = [step.dim for step in steps]
    if isinstance(node.value, dict) and len(set(dims)) != len(dims):
        raise node.fail(
            "several axes cut one dim, and which cuts first matters: write `shard` as a list",
            f"for example `shard: [{', '.join(f'{{{step.axis}: {step.dim}}}' for step in steps)}]`, outermost first",
        )
    return steps


def _parts(node: Node) -> Parts:
    entries = node.mapping("`parts`", ("axis", "sizes", "num"), ("axis",))
    return Parts(
        axis=entries["axis"].text("`axis`"),
        sizes=entries["sizes"].numbers("`sizes`") if "sizes" in entries else (),
        num=entries["num"].number("`num`") if "num" in entries else 0,
    )


def _pad(node: Node) -> Pad:
    entries = node.mapping("`pad`", ("axis", "multiple", "size"), ("axis",))
    return Pad(
        axis=entries["axis"].text("`axis`"),
        multiple=entries["multiple"].number("`multiple`") if "multiple" in entries else 1,
        size=entries["size"].number("`size`") if "size" in entries else None,
    )


def _experts(node: Node) -> Experts:
    entries = node.mapping("`experts`", ("axis", "num"), ("axis", "num"))
    return Experts(axis=entries["axis"].text("`axis`"), num=entries["num"].number("`num`"))


def _stage(node: Node) -> Stage:
    if isinstance(node.value, int):
        return node.value
    for word in ("first", "last", "all"):
        if node.value == word:
            return word
    raise node.fail(f"`stage` must be `first`, `last`, `all` or a number, found {node.kind}")


def _on(node: Node) -> tuple[tuple[str, tuple[int, ...]], ...]:
    out = []
    for axis, item in node.mapping("`on`", tuple(node.value) if isinstance(node.value, dict) else ()).items():
        subject = f"indices along `{axis}`"
        indices = (item.value,) if isinstance(item.value, int) else item.numbers(subject)
        out.append((axis, tuple(sorted(set(indices)))))
    return tuple(sorted(out))


def _flat(node: Node) -> Flat:
    entries = node.mapping("`flat`", ("axis", "multiple", "order", "name"), ("axis",))
    order = entries["order"].items("`order`") if "order" in entries else []
    return Flat(
        axis=entries["axis"].text("`axis`"),
        multiple=entries["multiple"].number("`multiple`") if "multiple" in entries else 1,
        order=tuple(item.text("a tensor of `order`") for item in order),
        name=entries["name"].text("`name`") if "name" in entries else Flat(axis="").name,
    )


def to_document(layout: Layout) -> dict[str, Any]:
    """Plain data that `from_document` reads back as an equal layout. Keys may be sorted: order is in lists."""
    out: dict[str, Any] = {"version": VERSION, "mesh": [{axis: size} for axis, size in layout.mesh.axes]}
    if layout.pipeline is not None:
        out["pipeline"] = _plain(layout.pipeline)
    out["rules"] = [_rule_document(rule) for rule in layout.rules]
    return out


def _rule_document(rule: Rule) -> dict[str, Any]:
    texts = [pattern.text for pattern in rule.match]
    out: dict[str, Any] = {"match": texts[0] if len(texts) == 1 else texts}
    out |= _where_document(rule.where, Where())
    if isinstance(rule.optimizer, Where):
        out["optimizer"] = _where_document(rule.optimizer, rule.where)
    elif rule.optimizer != "same":
        out["optimizer"] = rule.optimizer
    if rule.priority:
        out["priority"] = rule.priority
    return out


def _where_document(where: Where, base: Where) -> dict[str, Any]:
    """The keys in which `where` differs from `base`."""
    out: dict[str, Any] = {}
    for key in _WHERE_KEYS:
        value = getattr(where, key)
        if value == getattr(base, key):
            continue
        if value == getattr(Where(), key):
            out[key] = None
        elif key == "shard":
            out[key] = [{step.axis: step.dim} for step in where.shard]
        elif key == "on":
            out[key] = {axis: list(indices) for axis, indices in where.on}
        else:
            out[key] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    """A record as a mapping of the fields that differ from their defaults, a tuple as a list."""
    if isinstance(value, tuple):
        return list(value)
    if not dataclasses.is_dataclass(value):
        return value
    fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name: _plain(item) for field, item in fields if item != field.default}
