"""A layout bound to the tensors of one run: what every rank holds of all of them.

In: a mesh, tensors with global shapes, and their assignments. Out: `Placement`s, `BoxTable`s, and for planning the
boxes of all ranks at once. Pure. Never looks at rules (assign.py did).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.layout.assign import Assignment, Faults, On
from ckpt.layout.box import BoxTable, Int64Array, pad_dims
from ckpt.layout.flat import FlatBuffer
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import TensorName
from ckpt.layout.placement import Placement
from ckpt.layout.rules import Where

Template = tuple[NDArray[np.int32], Int64Array, Int64Array]  # rank [N], offsets [N, d], lengths [N, d]; sorted by rank


@dataclass(frozen=True, kw_only=True)
class RankTable:
    """The boxes of all ranks as columns, sorted by (tensor, rank). Empty boxes are left out."""

    rank: NDArray[np.int32]  # [N] who holds the box
    boxes: BoxTable

    def __len__(self) -> int:
        return len(self.rank)


@dataclass(frozen=True, kw_only=True)
class BoundLayout:
    """Where all tensors of a run lie. Made by `Layout.bind`, which has checked that all of them fit their rules."""

    mesh: Mesh
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # (name, global shape)
    assignments: tuple[Assignment, ...]  # one per tensor

    @staticmethod
    def build(
        mesh: Mesh,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        assignments: Sequence[Assignment | None],
        faults: Faults,
    ) -> BoundLayout:
        """Check shapes against rules, then bind; one InvalidInputError for all faults, those handed in included."""
        shape_of = {
            TensorName.parse(name).path: shape for name, shape in tensors if TensorName.parse(name).slot is None
        }
        fixed = [
            _fitted(assignment, shape, shape_of, mesh, faults)
            for (_, shape), assignment in zip(tensors, assignments, strict=True)
            if assignment is not None
        ]
        shapes = [shape for (_, shape), assignment in zip(tensors, assignments, strict=True) if assignment is not None]
        _check_flat_orders([found for found, shape in zip(fixed, shapes, strict=True) if shape != ()], faults)
        faults.raise_any()
        return BoundLayout(mesh=mesh, tensors=tuple(tensors), assignments=tuple(fixed))

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, (name, _) in enumerate(self.tensors)}

    @cached_property
    def _placements(self) -> dict[tuple[object, ...], Placement]:
        return {}

    @cached_property
    def _buffers(self) -> dict[tuple[object, ...], FlatBuffer]:
        return {}

    @cached_property
    def _flat_groups(self) -> dict[tuple[str, str, str | None], tuple[int, ...]]:
        groups: dict[tuple[str, str, str | None], list[int]] = {}
        for number, assignment in enumerate(self.assignments):
            if self._is_flat(number):
                groups.setdefault(_group_of(assignment), []).append(number)
        return {group: _in_order(numbers, self.assignments) for group, numbers in groups.items()}

    def _is_flat(self, number: int) -> bool:
        return self.assignments[number].where.flat is not None and self.tensors[number][1] != ()

    def place(self, name: str, rank: int) -> Placement | None:
        """What a rank holds of a tensor; None when it has nothing of it, not even an empty piece."""
        if name not in self._number:
            raise InvalidInputError(f"the layout was not bound to a tensor `{name}`")
        number = self._number[name]
        coordinate = self.mesh.coordinate(rank)
        if not self.assignments[number].has(dict(zip(self.mesh.names, coordinate, strict=True))):
            return None
        if not self._is_flat(number):
            return self._place_unflattened(number, coordinate)
        buffer, index = self._buffer(_group_of(self.assignments[number]), coordinate)
        return buffer.place(buffer.tensors.index(number), index)

    def tensors_of_rank(self, rank: int) -> list[tuple[int, Placement]]:
        """All that a rank holds, as (index into `tensors`, placement); no flat members of which it holds nothing."""
        coordinate = self.mesh.coordinate(rank)
        index_of = dict(zip(self.mesh.names, coordinate, strict=True))
        out = [
            (number, self._place_unflattened(number, coordinate))
            for number, assignment in enumerate(self.assignments)
            if not self._is_flat(number) and assignment.has(index_of)
        ]
        for group in self._flat_groups:
            buffer, index = self._buffer(group, coordinate)
            held = ((buffer.tensors[position], buffer.place(position, index)) for position in buffer.members_of(index))
            out += [(number, placement) for number, placement in held if placement.placed]
        return sorted(out, key=lambda item: item[0])

    def box_table(self, rank: int) -> BoxTable:
        """The boxes that a rank holds, sorted by tensor (index into `tensors`)."""
        held = self.tensors_of_rank(rank)
        return BoxTable.build((number, placed.box) for number, placement in held for placed in placement.placed)

    def _place_unflattened(self, number: int, coordinate: tuple[int, ...]) -> Placement:
        name, shape = self.tensors[number]
        where = self.assignments[number].where
        index_of = {axis: index for axis, index in zip(self.mesh.names, coordinate, strict=True)}
        key = (where, shape, tuple(index_of[step.axis] for step in where.shard))
        if key not in self._placements:
            self._placements[key] = where.place(shape, self.mesh, index_of, name)
        return self._placements[key]

    def _buffer(self, group: tuple[str, str, str | None], coordinate: tuple[int, ...]) -> tuple[FlatBuffer, int]:
        """The flat buffer of a group that the rank shares with those along the flat axis, and its piece."""
        numbers = self._flat_groups[group]
        flat = self.assignments[numbers[0]].where.flat
        assert flat is not None
        at = self.mesh.index(flat.axis)
        key = (group, coordinate[:at], coordinate[at + 1 :])
        if key not in self._buffers:
            index_of = dict(zip(self.mesh.names, coordinate, strict=True))
            members = [number for number in numbers if self.assignments[number].has(index_of)]
            placements = [self._place_unflattened(number, coordinate) for number in members]
            name = flat.name if group[2] is None else f"{flat.name}/{group[2]}"
            self._buffers[key] = FlatBuffer.build(
                name, members, placements, multiple=flat.multiple, axis_size=self.mesh.size(flat.axis)
            )
        return self._buffers[key], coordinate[at]

    # All ranks at once

    def all_ranks(self) -> RankTable:
        """The boxes of every rank, sorted by (tensor, rank).

        Tensors of one rule and one shape share a template that is made once with NumPy: 1,024 ranks x 2,000 tensors
        take less than a second. Flat buffers are walked rank by rank.
        """
        coordinates = self.mesh.coordinates()
        templates: dict[tuple[Where, tuple[int, ...]], Template] = {}
        cuts: dict[tuple[object, ...], Template] = {}
        chunks: dict[int, Template] = self._flat_chunks(coordinates)
        for number, assignment in enumerate(self.assignments):
            if self._is_flat(number):
                continue
            key = (assignment.where, self.tensors[number][1])
            if key not in templates:
                templates[key] = self._template(number, coordinates)
            cut_key = (*key, assignment.on)
            if cut_key not in cuts:
                cuts[cut_key] = _restricted(templates[key], self._having(assignment.on, coordinates))
            chunks[number] = cuts[cut_key]
        return _joined(chunks, max((len(shape) for _, shape in self.tensors), default=1) or 1)

    def _having(self, on: On, coordinates: Int64Array) -> NDArray[np.bool_]:
        """[world_size] True for ranks that have tensors with this `on`."""
        out = np.ones(len(coordinates), np.bool_)
        for axis, indices in on:
            out &= np.isin(coordinates[:, self.mesh.index(axis)], indices)
        return out

    def _template(self, number: int, coordinates: Int64Array) -> Template:
        """The boxes of a tensor on all ranks, as if all had it."""
        where, shape = self.assignments[number].where, self.tensors[number][1]
        if where.parts is None and where.pad is None:
            return _simple_template(where, shape, self.mesh, coordinates)
        ranks: list[int] = []
        offsets: list[tuple[int, ...]] = []
        lengths: list[tuple[int, ...]] = []
        for rank, coordinate in enumerate(coordinates.tolist()):
            for placed in self._place_unflattened(number, tuple(coordinate)).placed:
                ranks.append(rank)
                offsets.append(placed.box.offsets)
                lengths.append(placed.box.lengths)
        return _template_of(ranks, offsets, lengths, len(shape))

    def _flat_chunks(self, coordinates: Int64Array) -> dict[int, Template]:
        rows: dict[int, tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]] = {}
        for rank, coordinate in enumerate(coordinates.tolist()):
            for group in self._flat_groups:
                buffer, index = self._buffer(group, tuple(coordinate))
                for position in buffer.members_of(index):
                    ranks, offsets, lengths = rows.setdefault(buffer.tensors[position], ([], [], []))
                    for placed in buffer.place(position, index).placed:
                        ranks.append(rank)
                        offsets.append(placed.box.offsets)
                        lengths.append(placed.box.lengths)
        return {number: _template_of(*columns, len(self.tensors[number][1])) for number, columns in rows.items()}


def _fitted(
    assignment: Assignment, shape: tuple[int, ...], shape_of: dict[str, tuple[int, ...]], mesh: Mesh, faults: Faults
) -> Assignment:
    """The assignment, checked against the shape; optimizer state of a single element is whole on its ranks."""
    if assignment.follows is not None:
        expected = shape_of.get(assignment.follows)
        if expected is not None and shape not in ((), expected):
            if math.prod(shape) == 1:
                whole = Where(experts=assignment.where.experts, stage=assignment.where.stage, on=assignment.where.on)
                return dataclasses.replace(assignment, where=whole)
            faults.wrong.append(
                f"`{assignment.name}` has shape {list(shape)}, its parameter {list(expected)}: give it its own rule"
            )
            return assignment
    try:
        assignment.where.place(shape, mesh, dict.fromkeys(mesh.names, 0), assignment.name)
    except InvalidInputError as error:
        faults.wrong.append(error.message)
    return assignment


def _check_flat_orders(assignments: Sequence[Assignment], faults: Faults) -> None:
    settings: dict[tuple[str, str, str | None], object] = {}
    for assignment in assignments:
        flat = assignment.where.flat
        if flat is None:
            continue
        if settings.setdefault(_group_of(assignment), flat) != flat:
            faults.wrong.append(
                f"`{assignment.name}`: rules of flat buffer `{flat.name}` differ in axis, multiple or order"
            )
        if flat.order and TensorName.parse(assignment.name).path not in flat.order:
            faults.wrong.append(f"`{assignment.name}` is in flat buffer `{flat.name}`, but not in its `order`")


def _group_of(assignment: Assignment) -> tuple[str, str, str | None]:
    """Flat buffers are apart by name, state key and slot: `exp_avg` and `exp_avg_sq` have one each."""
    parsed = TensorName.parse(assignment.name)
    assert assignment.where.flat is not None
    return assignment.where.flat.name, parsed.key, parsed.slot


def _in_order(numbers: Sequence[int], assignments: Sequence[Assignment]) -> tuple[int, ...]:
    flat = assignments[numbers[0]].where.flat
    assert flat is not None
    place = {path: position for position, path in enumerate(flat.order)}
    paths = {number: TensorName.parse(assignments[number].name).path for number in numbers}
    return tuple(sorted(numbers, key=lambda number: (place.get(paths[number], 0), paths[number])))


def _simple_template(where: Where, shape: tuple[int, ...], mesh: Mesh, coordinates: Int64Array) -> Template:
    num = len(coordinates)
    offsets = np.zeros((num, len(shape)), np.int64)
    lengths = np.broadcast_to(np.array(shape, np.int64), (num, len(shape))).copy()
    for step in where.shard if shape else ():
        size, index = lengths[:, step.dim], coordinates[:, mesh.index(step.axis)]
        piece = -(-size // mesh.size(step.axis))
        start = np.minimum(size, piece * index)
        offsets[:, step.dim] += start
        lengths[:, step.dim] = np.minimum(size, start + piece) - start
    held = np.flatnonzero((lengths > 0).all(axis=1)).astype(np.int32)
    return held, offsets[held], lengths[held]


def _template_of(
    ranks: list[int], offsets: list[tuple[int, ...]], lengths: list[tuple[int, ...]], num_dims: int
) -> Template:
    form = (len(ranks), num_dims)
    return (
        np.array(ranks, np.int32),
        np.array(offsets, np.int64).reshape(form),
        np.array(lengths, np.int64).reshape(form),
    )


def _restricted(template: Template, having: NDArray[np.bool_]) -> Template:
    ranks, offsets, lengths = template
    if having.all():
        return template
    rows = having[ranks]
    return ranks[rows], offsets[rows], lengths[rows]


def _joined(chunks: dict[int, Template], num_dims: int) -> RankTable:
    numbers = sorted(chunks)
    if not numbers:
        none = np.zeros((0, num_dims), np.int64)
        return RankTable(
            rank=np.zeros(0, np.int32), boxes=BoxTable(tensor=np.zeros(0, np.int32), offsets=none, lengths=none)
        )
    boxes = BoxTable(
        tensor=np.repeat(np.array(numbers, np.int32), [len(chunks[number][0]) for number in numbers]),
        offsets=np.concatenate([pad_dims(chunks[number][1], num_dims, 0) for number in numbers]),
        lengths=np.concatenate([pad_dims(chunks[number][2], num_dims, 1) for number in numbers]),
    )
    return RankTable(rank=np.concatenate([chunks[number][0] for number in numbers]), boxes=boxes)
