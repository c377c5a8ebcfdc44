"""The recipe of a merge: what is merged, how, and where to. Read whole and checked before anything is opened.

In: nodes of a YAML text, or of plain data. Out: `Recipe`, and the same as plain data again. The schema is described in
docs/reference/recipe.md. Pure; never opens a source, never looks for a method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ckpt.errors import InvalidInputError
from ckpt.kernels.merge import is_float
from ckpt.layout.pattern import NamePattern
from ckpt.merge.nodes import KIND, Node, nodes_of

VERSION = 1
DEFAULT_KEY = "model"
POLICIES = ("combine", "newest", "oldest", "same", "pool", "reset", "drop")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?B)?", re.IGNORECASE)
_STEPS = re.compile(r"([0-9]{0,12})\.\.([0-9]{0,12})")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Steps `first <= step <= last`; None is open."""

    first: int | None
    last: int | None

    def __contains__(self, step: int) -> bool:
        return (self.first is None or step >= self.first) and (self.last is None or step <= self.last)

    def __str__(self) -> str:
        return f"{'' if self.first is None else self.first}..{'' if self.last is None else self.last}"


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One entry of `sources`, or `base`: checkpoints of one run, or a folder of safetensors files."""

    url: str
    at: str  # where it stands, for messages
    steps: int | Literal["latest"] | StepRange | tuple[int, ...] | None = None  # None: the newest
    every: int = 1  # each of that many, counted back from the newest
    last: int | None = None  # so many of the newest
    fraction: float | None = None  # those in the last part of the way to the newest step
    count_min: int = 1
    step: int | None = None  # of a folder
    weight: float = 1.0
    key: str = DEFAULT_KEY  # state key of a folder's names
    rename: tuple[tuple[str, str], ...] = ()  # regular expressions and what takes their place, on whole names
    anchor: bool = False  # what is not combined comes from this source, not from the newest

    @property
    def is_range(self) -> bool:
        return (
            isinstance(self.steps, (tuple, StepRange))
            or self.last is not None
            or self.fraction is not None
            or self.every != 1
        )


@dataclass(frozen=True, kw_only=True)
class Combine:
    """A method by name, and its parameters."""

    method: str
    parameters: Mapping[str, Node]
    at: Node


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the tensors that match: the first rule that matches decides."""

    match: tuple[NamePattern, ...]
    policy: str  # one of POLICIES
    combine: Combine | None  # with policy `combine`: another method than the recipe's
    at: str


@dataclass(frozen=True, kw_only=True)
class State:
    """What becomes of everything that is not combined."""

    optimizer: Literal["drop", "newest", "combine"] = "drop"
    masters: str = "auto"  # auto, none, or the name of the slot that holds master copies
    batch_norm: Literal["pool", "combine", "newest", "reset"] = "pool"
    rng: Literal["reseed", "newest", "drop"] = "reseed"
    objects: Literal["newest", "drop"] = "newest"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe."""

    sources: tuple[SourceSpec, ...]
    combine: Combine
    base: SourceSpec | None = None
    name: str = ""
    rules: tuple[Rule, ...] = ()
    state: State = field(default_factory=State)
    dtype: str | None = None  # of combined tensors; None: that of the newest source
    nan: Literal["error", "propagate"] = "error"
    seed: int = 0
    intersect: bool = False
    memory_bytes: int | None = None
    workers: int | None = None
    output: str | None = None
    step: int | None = None  # of the result; None: that of the newest source
    document: Mapping[str, Any] = field(default_factory=dict)  # the recipe as plain data


_KEYS = (
    "recipe",
    "name",
    "sources",
    "base",
    "method",
    "combine",
    "rules",
    "state",
    "numerics",
    "random",
    "limits",
    "output",
    "intersect",
)
_SOURCE_KEYS = (
    "run",
    "folder",
    "steps",
    "every",
    "last",
    "fraction",
    "count_min",
    "step",
    "weight",
    "key",
    "rename",
    "anchor",
)


def recipe_of(root: Node) -> Recipe:
    """The recipe that a tree of nodes describes. InvalidInputError (`bad-recipe`) that names the place of the first fault."""
    entries = root.mapping("a recipe", _KEYS, ("recipe", "sources"))
    if entries["recipe"].value != VERSION:
        raise entries["recipe"].fail(f"recipes of version {entries['recipe'].kind} are not known, expected {VERSION}")
    sources = [_source(node) for node in entries["sources"].items("`sources`")]
    if not sources:
        raise entries["sources"].fail("`sources` is empty: there is nothing to merge")
    numerics = _part(entries, "numerics", ("dtype", "nan"))
    limits = _part(entries, "limits", ("memory", "workers"))
    output = _part(entries, "output", ("url", "step"))
    random = _part(entries, "random", ("seed",))
    return Recipe(
        sources=tuple(sources),
        combine=_combine_of(root, entries),
        base=_source(entries["base"]) if "base" in entries else None,
        name=_get(entries, "name", lambda n: n.text("`name`"), ""),
        rules=tuple(_rule(node) for node in entries["rules"].items("`rules`")) if "rules" in entries else (),
        state=_state(entries),
        dtype=_get(numerics, "dtype", _dtype, None),
        nan=_get(numerics, "nan", _nan, "error"),
        seed=_get(random, "seed", lambda n: n.whole("`seed`"), 0),
        intersect=_get(entries, "intersect", lambda n: n.flag("`intersect`"), False),
        memory_bytes=_get(limits, "memory", size_of, None),
        workers=_get(limits, "workers", lambda n: n.whole("`workers`", 1), None),
        output=_get(output, "url", lambda n: n.text("`url`"), None),
        step=_get(output, "step", lambda n: n.whole("`step`"), None),
        document=root.plain(),
    )


def from_document(document: Mapping[str, Any], at: str = "recipe") -> Recipe:
    """The recipe of plain data."""
    return recipe_of(nodes_of(document, at))


def _get(entries: Mapping[str, Node], key: str, read: Callable[[Node], T], otherwise: T) -> T:
    return read(entries[key]) if key in entries else otherwise


def _part(entries: Mapping[str, Node], key: str, known: Sequence[str]) -> dict[str, Node]:
    return entries[key].mapping(f"`{key}`", known) if key in entries else {}


def _nan(node: Node) -> Literal["error", "propagate"]:
    return "error" if node.choice("`nan`", ("error", "propagate")) == "error" else "propagate"


def _dtype(node: Node) -> str | None:
    text = node.text("`dtype`")
    if text == "source":
        return None
    if not is_float(text):
        raise node.fail(f"`dtype` must be `source` or a float dtype, found {text!r}", "for example float32 or bfloat16")
    return text


def size_of(node: Node) -> int:
    """Bytes of `4GiB`, `512M` or a number; letters are binary units."""
    match = _SIZE.fullmatch(str(node.value).strip())
    if match is None or isinstance(node.value, bool):
        raise node.fail(f"a size is written like 512MiB or 4GiB, found {node.kind}")
    return int(float(match[1]) * 1024 ** "BKMGT".index((match[2] or "B").upper()))


def _source(node: Node) -> SourceSpec:
    if isinstance(node.value, str):
        url, steps = split_address(node.value, node)
        return SourceSpec(url=url, steps=steps, at=node.at)
    entries = node.mapping("a source", _SOURCE_KEYS)
    if ("run" in entries) == ("folder" in entries):
        raise node.fail("a source has either `run` or `folder`")
    if "folder" in entries:
        odd = [key for key in ("steps", "every", "last", "fraction", "count_min") if key in entries]
        if odd:
            raise entries[odd[0]].fail(f"`{odd[0]}` is for a run; a folder is one source")
        url, steps = entries["folder"].text("`folder`"), None
    else:
        url, steps = split_address(entries["run"].text("`run`"), entries["run"])
        if "steps" in entries:
            steps = _steps(entries["steps"])
    fraction = _get(entries, "fraction", lambda n: n.number("`fraction`"), None)
    if fraction is not None and not 0 < fraction <= 1:
        raise entries["fraction"].fail(f"`fraction` must be above 0 and at most 1, found {fraction}")
    return SourceSpec(
        url=url,
        at=node.at,
        steps=steps,
        every=_get(entries, "every", lambda n: n.whole("`every`", 1), 1),
        last=_get(entries, "last", lambda n: n.whole("`last`", 1), None),
        fraction=fraction,
        count_min=_get(entries, "count_min", lambda n: n.whole("`count_min`", 1), 1),
        step=_get(entries, "step", lambda n: n.whole("`step`"), None),
        weight=_get(entries, "weight", lambda n: n.number("`weight`"), 1.0),
        key=_get(entries, "key", lambda n: n.text("`key`"), DEFAULT_KEY),
        rename=tuple(_rename(item) for item in entries["rename"].items("`rename`")) if "rename" in entries else (),
        anchor=_get(entries, "anchor", lambda n: n.flag("`anchor`"), False),
    )


def _rename(node: Node) -> tuple[str, str]:
    entries = node.mapping("a rename rule", ("match", "to"), ("match", "to"))
    pattern = entries["match"].text("`match`")
    try:
        re.compile(pattern)
    except re.error as error:
        raise entries["match"].fail(f"`match` is no regular expression: {error}") from None
    return pattern, entries["to"].text("`to`")


def split_address(text: str, node: Node) -> tuple[str, Any]:
    """URL and steps of `URL`, `URL@STEP`, `URL@latest`, `URL@A..B`. Only an `@` in the last component counts."""
    at = text.rfind("@")
    if at < text.rfind("/") + 1:
        if not text:
            raise node.fail("a source is named by a path or URL")
        return text, None
    url, suffix = text[:at], text[at + 1 :]
    if not url:
        raise node.fail(f"`{text}` names no run", "a path or URL first, as in runs/gpt@100")
    return url, _steps(Node(suffix, node.at))


def _steps(node: Node) -> Any:
    value = node.value
    if isinstance(value, list):
        return tuple(item.whole("each of `steps`") for item in value)
    if isinstance(value, dict):
        entries = node.mapping("`steps`", ("from", "to"))
        first = _get(entries, "from", lambda n: n.whole("`from`"), None)
        return StepRange(first=first, last=_get(entries, "to", lambda n: n.whole("`to`"), None))
    text = str(value)
    match = _STEPS.fullmatch(text)
    if text == "latest":
        return "latest"
    if text.isascii() and text.isdecimal() and len(text) <= 12:
        return int(text)
    if match is None or not (match[1] or match[2]):
        raise node.fail(f"`{text}` is no step", "write a step, `latest`, or a range A..B")
    low, high = (int(part) if part else None for part in match.groups())
    if low is not None and high is not None and low > high:
        raise node.fail(f"the range `{text}` ends before it begins", f"write {high}..{low}")
    return StepRange(first=low, last=high)


def _combine_of(root: Node, entries: Mapping[str, Node]) -> Combine:
    if ("method" in entries) == ("combine" in entries):
        raise root.fail("a recipe has either `method` (a name) or `combine` (a method with its parameters)")
    if "method" in entries:
        return Combine(method=entries["method"].text("`method`"), parameters={}, at=entries["method"])
    return _combine(entries["combine"])


def _combine(node: Node) -> Combine:
    entries = dict(node.entries("`combine`"))
    if "method" not in entries:
        raise node.fail("`combine` has no `method`")
    method = entries.pop("method").text("`method`")
    return Combine(
        method=method, parameters={key: value for key, value in entries.items() if value.value is not None}, at=node
    )


def _rule(node: Node) -> Rule:
    entries = node.mapping("a rule", ("match", "policy", "combine"), ("match",))
    if ("policy" in entries) == ("combine" in entries):
        raise node.fail("a rule has either `policy` or `combine`")
    match = entries["match"]
    texts = [match] if isinstance(match.value, str) else match.items("`match`")
    try:
        patterns = tuple(NamePattern(text.text("each of `match`")) for text in texts)
    except InvalidInputError as error:
        raise error if error.kind == KIND else match.fail(error.message) from None
    combine = _combine(entries["combine"]) if "combine" in entries else None
    policy = "combine" if combine is not None else entries["policy"].choice("`policy`", POLICIES)
    return Rule(match=patterns, policy=policy, combine=combine, at=node.at)


def _state(entries: Mapping[str, Node]) -> State:
    choices: dict[str, tuple[str, ...]] = {
        "optimizer": ("drop", "newest", "combine"),
        "batch_norm": ("pool", "combine", "newest", "reset"),
        "rng": ("reseed", "newest", "drop"),
        "objects": ("newest", "drop"),
    }
    found = _part(entries, "state", (*choices, "masters"))
    values: dict[str, Any] = {key: found[key].choice(f"`{key}`", choices[key]) for key in choices if key in found}
    if "masters" in found:
        values["masters"] = found["masters"].text("`masters`")
    return State(**values)
