"""Layouts: a mesh and placement rules by name pattern, giving every rank the boxes of every tensor.

In: `Mesh`, `Rule`s, tensor names and shapes. Out: `Placement`s. Pure. Never reads a file (files.py parses text) and never knows
how a process got its rank.

`Layout` answers for one tensor at a time. What depends on the other tensors (a flat buffer; names that no rule matches) needs
`Layout.bind`, which checks all names at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckpt.errors import InvalidInputError
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.layout.placement import Placement
from ckpt.layout.rules import Pipeline, Rule, Where, owner_of_expert

NAMES_SHOWN_MAX = 20  # of a kind, in one error message


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The rule that decides for one tensor, and which ranks have the tensor at all."""

    name: str
    rule: int  # index into Layout.rules
    where: Where
    on: tuple[tuple[str, tuple[int, ...]], ...]  # (axis, indices along it that have it); empty: all ranks

    def has(self, index_of: Mapping[str, int]) -> bool:
        """True when the rank with these axis indices has the tensor."""
        return all(index_of[axis] in indices for axis, indices in self.on)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the elements of all tensors lie."""

    mesh: Mesh
    rules: tuple[Rule, ...]
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        for rule in self.rules:
            wheres = [rule.where] if isinstance(rule.optimizer, str) else [rule.where, rule.optimizer]
            for axis in sorted(frozenset[str]().union(*(where.axes for where in wheres))):
                self._check_axis(axis, f"rule `{rule.match[0].text}`")
            for where in wheres:
                for axis, indices in where.on:
                    if not indices or not all(0 <= index < self.mesh.size(axis) for index in indices):
                        raise InvalidInputError(
                            f"rule `{rule.match[0].text}` is on {axis} {list(indices)}, but the axis has {self.mesh.size(axis)} ranks"
                        )
                if where.stage not in (None, "all") and self.pipeline is None:
                    raise InvalidInputError(
                        f"rule `{rule.match[0].text}` has a `stage`, but the layout has no pipeline"
                    )
        if self.pipeline is not None:
            self._check_axis(self.pipeline.axis, "the pipeline")
            stages = self.mesh.size(self.pipeline.axis)
            if self.pipeline.split and len(self.pipeline.split) != stages:
                raise InvalidInputError(
                    f"the pipeline is split into {len(self.pipeline.split)} stages, but axis `{self.pipeline.axis}` has {stages}"
                )

    def _check_axis(self, axis: str, subject: str) -> None:
        if axis not in self.mesh.names:
            raise InvalidInputError(
                f"{subject} names axis `{axis}`, but the mesh has {', '.join(self.mesh.names) or 'no axes'}"
            )

    # One tensor at a time

    def assign(self, name: str) -> Assignment:
        """The rule for a tensor; InvalidInputError when no rule or more than one is for it."""
        found = self.candidates(name)
        if len(found) != 1:
            raise unassigned_error([name] if not found else [], {name: found} if found else {}, (), self.rules)
        return found[0]

    def place(self, name: str, shape: Sequence[int], rank: int) -> Placement | None:
        """What a rank holds of a tensor of this global shape; None when it has nothing of it, not even an empty piece."""
        assignment = self.assign(name)
        if assignment.where.flat is not None and len(shape):
            raise InvalidInputError(
                f"where `{name}` lies in its flat buffer depends on the other tensors in it",
                hints=("use Layout.bind with all names and shapes, and place it there",),
            )
        return self.place_unflattened(assignment, tuple(shape), rank)

    def place_unflattened(self, assignment: Assignment, shape: tuple[int, ...], rank: int) -> Placement | None:
        """What a rank holds of a tensor, before any flat buffer is made of it."""
        index_of = self.indices(rank)
        if not assignment.has(index_of):
            return None
        return assignment.where.place(shape, self.mesh, index_of, assignment.name)

    def indices(self, rank: int) -> dict[str, int]:
        """Index of a rank along every axis."""
        return dict(zip(self.mesh.names, self.mesh.coordinate(rank), strict=True))

    def infer_global_shape(self, name: str, local_shape: Sequence[int]) -> tuple[int, ...]:
        """The global shape of a tensor of which a rank holds `local_shape`.

        Right when all pieces are equal, or the rule says the sizes. Uneven pieces cannot be told from one rank's shape: the
        caller compares the answer over the ranks, or the rule says `shape`.
        """
        where = self.assign(name).where
        local = tuple(local_shape)
        if not local:
            return ()
        if where.shape is not None:
            return where.shape
        if where.flat is not None:
            raise _ambiguous(name, local, "it lies in a flat buffer")
        shape = list(local)
        for step in where.shard:
            if step.dim >= len(local):
                where.check_dims(local, name)
            shape[step.dim] *= self.mesh.size(step.axis)
        for step in where.shard:
            if where.parts is not None and where.parts.axis == step.axis and where.parts.sizes:
                shape[step.dim] = sum(where.parts.sizes)
            elif where.pad is not None and where.pad.axis == step.axis:
                if where.pad.size is None:
                    raise _ambiguous(name, local, f"dim {step.dim} is padded and the rule does not say its size")
                shape[step.dim] = where.pad.size
            elif local[step.dim] == 0 and self.mesh.size(step.axis) > 1:
                raise _ambiguous(name, local, f"its piece of dim {step.dim} is empty")
        return tuple(shape)

    # All tensors at once

    def candidates(self, name: str) -> list[Assignment]:
        """The rules of the highest precedence that match a tensor: one where all is well."""
        parsed = TensorName.parse(name)
        best: tuple[int, int] | None = None
        found: list[Assignment] = []
        for number, rule in enumerate(self.rules):
            hit = self._hit(rule, name, parsed)
            if hit is None:
                continue
            pattern, captures, where = hit
            precedence = (rule.priority, pattern.level)
            if best is None or precedence > best:
                best, found = precedence, []
            if precedence == best:
                found.append(Assignment(name=name, rule=number, where=where, on=self._on(name, where, captures)))
        return found

    def _hit(self, rule: Rule, name: str, parsed: TensorName) -> tuple[NamePattern, dict[str, int], Where] | None:
        hits = []
        for pattern in rule.match:
            where = rule.where_of(parsed.slot, pattern)
            captures = None if where is None else pattern.match(name, parsed)
            if where is not None and captures is not None:
                hits.append((pattern, captures, where))
        return max(hits, key=lambda hit: hit[0].level, default=None)

    def _on(self, name: str, where: Where, captures: Mapping[str, int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        on = list(where.on)
        if self.pipeline is not None:
            axis, stages = self.pipeline.axis, self.mesh.size(self.pipeline.axis)
            stage = where.stage
            if isinstance(stage, str):
                stage = {"first": 0, "last": stages - 1, "all": None}[stage]
            elif stage is None and "layer" in captures and axis not in dict(on):
                stage = self.pipeline.stage_of(captures["layer"], stages)
            if stage is not None:
                if not 0 <= stage < stages:
                    raise InvalidInputError(f"`{name}` is on stage {stage}, but axis `{axis}` has {stages}")
                on.append((axis, (stage,)))
        if where.experts is not None:
            expert, num = captures["expert"], where.experts.num
            if expert >= num:
                raise InvalidInputError(f"`{name}` is expert {expert}, but the rule has {num} experts (0 to {num - 1})")
            on.append((where.experts.axis, (owner_of_expert(expert, num, self.mesh.size(where.experts.axis)),)))
        return tuple(on)

    def check(self, names: Iterable[str]) -> None:
        """Raise one InvalidInputError that lists every fault: tensors of no rule, of two, and patterns of no tensor."""
        self.assign_all(names)

    def assign_all(self, names: Iterable[str]) -> list[Assignment]:
        """The rule for each tensor, in the given order; the errors of `check`."""
        names = list(names)
        found = {name: self.candidates(name) for name in names}
        none = [name for name, hits in found.items() if not hits]
        many = {name: hits for name, hits in found.items() if len(hits) > 1}
        idle = self.idle_patterns(names)
        if none or many or idle:
            raise unassigned_error(none, many, idle, self.rules)
        return [found[name][0] for name in names]

    def idle_patterns(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of the tensors."""
        parsed = [(name, TensorName.parse(name)) for name in names]
        return [
            pattern.text
            for rule in self.rules
            for pattern in rule.match
            if not any(pattern.match(name, parts) is not None for name, parts in parsed)
        ]

    @cached_property
    def is_flat(self) -> bool:
        """True when a rule makes flat buffers, so that `bind` is needed."""
        return any(
            where.flat is not None
            for rule in self.rules
            for where in (rule.where, rule.optimizer)
            if isinstance(where, Where)
        )

    def resized(self, sizes: Mapping[str, int]) -> Layout:
        """The same rules on a mesh with other sizes. An explicit split of layers is dealt out anew when it no longer fits."""
        mesh = self.mesh.resized(sizes)
        pipeline = self.pipeline
        if pipeline is not None and pipeline.split and len(pipeline.split) != mesh.size(pipeline.axis):
            pipeline = Pipeline(axis=pipeline.axis, layers=pipeline.num_layers)
        return dataclasses.replace(self, mesh=mesh, pipeline=pipeline)


def _ambiguous(name: str, local: tuple[int, ...], why: str) -> InvalidInputError:
    return InvalidInputError(
        f"the global shape of `{name}` does not follow from its local shape {list(local)}: {why}",
        kind="ambiguous-shape",
        hints=("give `shape: [...]` (the global shape) in the rule for it",),
    )


def unassigned_error(
    none: Sequence[str],
    many: Mapping[str, Sequence[Assignment]],
    idle: Sequence[str],
    rules: Sequence[Rule],
) -> InvalidInputError:
    """One error for everything that keeps rules and names from fitting together."""
    lines = [f"{count} in the layout" for count in _counts(none, many, idle)]
    message = "layout and tensors do not fit: " + ", ".join(lines).replace(" in the layout", "")
    details = [f"no rule matches `{name}`" for name in none[:NAMES_SHOWN_MAX]]
    for name in list(many)[:NAMES_SHOWN_MAX]:
        texts = ", ".join(f"`{rules[hit.rule].match[0].text}`" for hit in many[name])
        details.append(f"`{name}` is matched by {len(many[name])} rules of equal precedence: {texts}")
    details += [f"pattern `{text}` matches no tensor" for text in idle[:NAMES_SHOWN_MAX]]
    shown = sum(min(len(group), NAMES_SHOWN_MAX) for group in (none, many, idle))
    more = len(none) + len(many) + len(idle) - shown
    if more:
        details.append(f"and {more} more")
    hints = []
    if none:
        hints.append('add a rule for them, or a last resort: `match: "**"`')
    if many:
        hints.append("make one pattern more specific, or give one rule a higher `priority`")
    if idle:
        hints.append("remove the pattern, or correct it; `*` stays within one component, `**` does not")
    return InvalidInputError("\n  ".join([message, *details]), kind="layout-mismatch", hints=tuple(hints))


def _counts(none: Sequence[str], many: Mapping[str, object], idle: Sequence[str]) -> list[str]:
    out = []
    if none:
        out.append(f"{len(none)} tensors without a rule")
    if many:
        out.append(f"{len(many)} tensors with several rules")
    if idle:
        out.append(f"{len(idle)} patterns without a tensor")
    return out
