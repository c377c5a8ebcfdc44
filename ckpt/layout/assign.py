"""Which rule decides for which tensor, and which ranks have the tensor at all.

In: rules, a mesh, tensor names. Out: `Assignment`s, or one error that lists every fault. Pure. Never knows shapes.

Of several rules that match a tensor the one of the highest precedence decides: first by `priority`, then by how exact
the pattern is (`NamePattern.level`). Two of equal precedence are an error, and so is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import InvalidInputError
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.layout.rules import Pipeline, Rule, Where, owner_of_expert

NAMES_SHOWN_MAX = 20  # of each kind of fault, in one error message

On = tuple[tuple[str, tuple[int, ...]], ...]  # (axis, indices along it)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The rule that decides for one tensor, and which ranks have the tensor at all."""

    name: str
    rule: int  # index into the rules
    where: Where
    on: On  # every rank whose index along each of these axes is listed has the tensor; empty: all ranks
    follows: str | None  # path of the parameter whose rule this optimizer state takes over, None: a rule of its own

    def has(self, index_of: Mapping[str, int]) -> bool:
        """True when the rank with these axis indices has the tensor."""
        return all(index_of[axis] in indices for axis, indices in self.on)


@dataclass(kw_only=True)
class Faults:
    """All that keeps rules and tensors from fitting together, gathered for one error."""

    none: list[str] = dataclasses.field(default_factory=list)  # tensors that no rule matches
    many: list[str] = dataclasses.field(default_factory=list)  # sentences
    idle: list[str] = dataclasses.field(default_factory=list)  # patterns that match no tensor
    wrong: list[str] = dataclasses.field(default_factory=list)  # sentences: rule and tensor contradict each other

    def raise_any(self) -> None:
        """Raise one InvalidInputError that lists everything; return when there is nothing."""
        groups = {
            "tensors without a rule": [f"no rule matches `{name}`" for name in self.none],
            "tensors with several rules": self.many,
            "patterns without a tensor": [f"pattern `{text}` matches no tensor" for text in self.idle],
            "tensors that their rule does not fit": self.wrong,
        }
        groups = {title: lines for title, lines in groups.items() if lines}
        if not groups:
            return
        head = "layout and tensors do not fit: " + ", ".join(f"{len(lines)} {title}" for title, lines in groups.items())
        shown = [line for lines in groups.values() for line in lines[:NAMES_SHOWN_MAX]]
        more = sum(map(len, groups.values())) - len(shown)
        hints = []
        if self.none:
            hints.append('add a rule for them, or a last resort: `match: "**"`')
        if self.many:
            hints.append("make one pattern more exact, or give one rule a higher `priority`")
        if self.idle:
            hints.append("remove the pattern, or correct it; `*` stays within one component, `**` does not")
        lines = [head, *shown, *([f"and {more} more"] if more else [])]
        raise InvalidInputError("\n  ".join(lines), kind="layout-mismatch", hints=tuple(hints))


class RuleIndex:
    """The rules of one layout, with names in full found by a look-up. Immutable after construction."""

    def __init__(self, mesh: Mesh, rules: Sequence[Rule], pipeline: Pipeline | None) -> None:
        self._mesh = mesh
        self._rules = tuple(rules)
        self._pipeline = pipeline
        self._exact: dict[str, list[tuple[int, NamePattern]]] = {}
        self._wild: list[tuple[int, NamePattern]] = []
        for number, rule in enumerate(self._rules):
            for pattern in rule.match:
                if pattern.exact:
                    self._exact.setdefault(pattern.text, []).append((number, pattern))
                else:
                    self._wild.append((number, pattern))

    def assign(self, name: str) -> Assignment:
        """The rule for a tensor; InvalidInputError when no rule or more than one is for it."""
        faults = Faults()
        out = self._assign(name, faults, set())
        faults.raise_any()
        assert out is not None
        return out

    def assign_all(self, names: Iterable[str], faults: Faults) -> list[Assignment | None]:
        """The rule for each tensor, or None and a fault. Patterns that match nothing are faults, too."""
        used: set[tuple[int, str]] = set()
        out = [self._assign(name, faults, used) for name in names]
        faults.idle += [
            pattern.text
            for number, rule in enumerate(self._rules)
            for pattern in rule.match
            if (number, pattern.text) not in used
        ]
        return out

    def matches(self, name: str) -> tuple[str, ...]:
        """The first pattern of each rule that has a claim on the tensor; one where all is well."""
        return tuple(pattern.text for pattern, _, _ in self._found(name, set()).values())

    def _found(self, name: str, used: set[tuple[int, str]]) -> dict[int, tuple[NamePattern, Where, dict[str, int]]]:
        """The rules of the highest precedence that match; every pattern that matches at all is added to `used`."""
        parsed = TensorName.parse(name)
        best: tuple[int, int] | None = None
        found: dict[int, tuple[NamePattern, Where, dict[str, int]]] = {}
        paths = {name, parsed.path}
        for number, pattern in [hit for path in sorted(paths) for hit in self._exact.get(path, ())] + self._wild:
            rule = self._rules[number]
            where = rule.where_of(parsed.slot, pattern)
            captures = None if where is None else pattern.match(name, parsed)
            if where is None or captures is None:
                continue
            used.add((number, pattern.text))
            precedence = (rule.priority, pattern.level)
            if best is None or precedence > best:
                best, found = precedence, {}
            if precedence == best:
                found.setdefault(number, (pattern, where, captures))
        return found

    def _assign(self, name: str, faults: Faults, used: set[tuple[int, str]]) -> Assignment | None:
        found = self._found(name, used)
        if len(found) != 1:
            self._add_fault(name, [pattern.text for pattern, _, _ in found.values()], faults)
            return None
        ((number, (pattern, where, captures)),) = found.items()
        parsed = TensorName.parse(name)
        follows = parsed.path if parsed.slot is not None and not pattern.whole_name else None
        try:
            return Assignment(name=name, rule=number, where=where, on=self._on(name, where, captures), follows=follows)
        except InvalidInputError as error:
            faults.wrong.append(error.message)
            return None

    def _add_fault(self, name: str, texts: list[str], faults: Faults) -> None:
        if texts:
            listed = ", ".join(f"`{text}`" for text in texts)
            faults.many.append(f"`{name}` is matched by {len(texts)} rules of equal precedence: {listed}")
        else:
            faults.none.append(name)

    def _on(self, name: str, where: Where, captures: Mapping[str, int]) -> On:
        on = list(where.on)
        stage = self._stage(name, where, captures)
        if stage is not None and self._pipeline is not None:
            on.append((self._pipeline.axis, (stage,)))
        if where.experts is not None:
            expert, num = captures["expert"], where.experts.num
            if expert >= num:
                raise InvalidInputError(f"`{name}` is expert {expert}, but its rule has experts 0 to {num - 1}")
            owner = owner_of_expert(expert, num, self._mesh.size(where.experts.axis))
            on.append((where.experts.axis, (owner,)))
        return tuple(on)

    def _stage(self, name: str, where: Where, captures: Mapping[str, int]) -> int | None:
        if self._pipeline is None or where.stage == "all":
            return None
        num_stages = self._mesh.size(self._pipeline.axis)
        if where.stage == "first":
            return 0
        if where.stage == "last":
            return num_stages - 1
        if where.stage is not None:
            return where.stage
        if "layer" not in captures or self._pipeline.axis in dict(where.on):
            return None
        layer = captures["layer"]
        if layer >= self._pipeline.num_layers:
            raise InvalidInputError(
                f"`{name}` is layer {layer}, but the pipeline has layers 0 to {self._pipeline.num_layers - 1}"
            )
        return self._pipeline.stage_of(layer, num_stages)
