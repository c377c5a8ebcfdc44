"""Layouts: a mesh and placement rules by name pattern, giving every rank the boxes of every tensor.

In: `Mesh`, `Rule`s, tensor names and shapes. Out: `Placement`s. Pure. Never reads a file (files.py parses text) and
never knows how a process got its rank.

`Layout` answers for one tensor at a time. What depends on the other tensors (a flat buffer, or names that no rule
matches) needs `Layout.bind`, which checks all names at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckpt.errors import InvalidInputError
from ckpt.layout.assign import Assignment, Faults, RuleIndex
from ckpt.layout.bound import BoundLayout
from ckpt.layout.mesh import Mesh
from ckpt.layout.placement import Placement
from ckpt.layout.rules import Pipeline, Rule, Where


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the elements of all tensors lie."""

    mesh: Mesh
    rules: tuple[Rule, ...]
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        for rule in self.rules:
            for where in [rule.where] if isinstance(rule.optimizer, str) else [rule.where, rule.optimizer]:
                self._check_where(where, f"rule `{rule.match[0].text}`")
        if self.pipeline is not None:
            axis, split = self.pipeline.axis, self.pipeline.split
            self._check_axis(axis, "the pipeline")
            if split and len(split) != self.mesh.size(axis):
                raise InvalidInputError(
                    f"the pipeline is split into {len(split)} stages, but axis `{axis}` has {self.mesh.size(axis)}"
                )

    def _check_where(self, where: Where, subject: str) -> None:
        for axis in sorted(where.axes):
            self._check_axis(axis, subject)
        for axis, indices in where.on:
            num = self.mesh.size(axis)
            if not indices or not all(0 <= index < num for index in indices):
                raise InvalidInputError(f"{subject} is on {axis} {list(indices)}, but the axis has 0 to {num - 1}")
        if where.stage not in (None, "all") and self.pipeline is None:
            raise InvalidInputError(f"{subject} has a `stage`, but the layout has no pipeline")
        if isinstance(where.stage, int) and self.pipeline is not None:
            num = self.mesh.size(self.pipeline.axis)
            if not 0 <= where.stage < num:
                raise InvalidInputError(f"{subject} is on stage {where.stage}, but the pipeline has 0 to {num - 1}")

    def _check_axis(self, axis: str, subject: str) -> None:
        if axis not in self.mesh.names:
            raise InvalidInputError(
                f"{subject} names axis `{axis}`, but the mesh has {', '.join(self.mesh.names) or 'no axes'}"
            )

    # One tensor at a time

    def assign(self, name: str) -> Assignment:
        """The rule for a tensor; InvalidInputError when no rule or more than one is for it."""
        return self.index.assign(name)

    def candidates(self, name: str) -> tuple[str, ...]:
        """The patterns with a claim on the tensor: none where no rule matches it, one where all is well."""
        return self.index.matches(name)

    def place(self, name: str, shape: Sequence[int], rank: int) -> Placement | None:
        """What a rank holds of a tensor of this global shape; None when it has not even an empty piece of it."""
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

        Right when all pieces are equal, or the rule says the sizes. Uneven pieces cannot be told from one rank's shape:
        the caller compares the answer over the ranks, or the rule says `shape`.
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

    def check(self, names: Iterable[str]) -> None:
        """Raise one InvalidInputError that lists every fault: tensors of no rule, of several, patterns of no tensor."""
        faults = Faults()
        self.index.assign_all(names, faults)
        faults.raise_any()

    def bind(self, tensors: Iterable[tuple[str, Sequence[int]]]) -> BoundLayout:
        """The layout for exactly these (name, global shape); one InvalidInputError for all that does not fit."""
        fixed = [(name, tuple(shape)) for name, shape in tensors]
        faults = Faults()
        assignments = self.index.assign_all((name for name, _ in fixed), faults)
        return BoundLayout.build(self.mesh, fixed, assignments, faults)

    @cached_property
    def index(self) -> RuleIndex:
        return RuleIndex(self.mesh, self.rules, self.pipeline)

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
        """The same rules on a mesh with other sizes. A split of layers that no longer fits is dealt out evenly."""
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
