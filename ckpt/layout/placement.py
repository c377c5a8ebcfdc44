"""Exact index arithmetic: which boxes of a global tensor a rank holds, and where they lie in its local tensor.

In: shapes, sizes, coordinates. Out: `Placed` boxes. Pure. Works on index ranges per dim, never on single elements, and
never knows names, ranks or meshes with names (those are in rules.py and layout.py).

The local content of one dim is a list of `(start, stop)` ranges of the global dim, in local order. Sharding cuts that
list; the boxes are the product of the lists of all dims.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError
from ckpt.layout.box import Box, boxes_of_flat_range

Ranges = tuple[tuple[int, int], ...]  # (start, stop) of the global dim, elements, stop exclusive, in local order


@dataclass(frozen=True)
class Shard:
    """Cut tensor dim `dim` over this mesh dim, as torch.chunk does: equal pieces rounded up, the last ones shorter."""

    dim: int


@dataclass(frozen=True)
class StridedShard:
    """Cut tensor dim `dim` over this mesh dim inside each of `split_factor` pieces (torch's `_StridedShard`)."""

    dim: int
    split_factor: int


@dataclass(frozen=True)
class Replicate:
    """Every rank along this mesh dim holds the same."""


DimPlacement = Shard | StridedShard | Replicate


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A box of a global tensor and where it lies in the rank's local tensor."""

    box: Box
    local_offsets: tuple[int, ...]  # elements, one per local dim; one only when the local tensor is a flat buffer


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What one rank holds of one tensor.

    In a local tensor of the global tensor's dims every box lies as an n-d region. In a flat buffer (`flat` is its name)
    every box lies in one piece, row-major, from `local_offsets[0]` on.
    """

    local_shape: tuple[int, ...]  # elements; of the whole flat buffer when `flat`
    placed: tuple[Placed, ...]  # none when the rank's piece is empty
    flat: str | None = None


def chunk_range(size: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Start and stop of piece `index` as torch.chunk cuts: ceil(size / num_chunks) each, the last short or empty."""
    piece = -(-size // num_chunks)
    start = min(size, piece * index)
    return start, min(size, start + piece)


def ranges_size(ranges: Ranges) -> int:
    """Number of elements in the local dim."""
    return sum(stop - start for start, stop in ranges)


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Drop empty ranges and join those that follow each other both globally and locally."""
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def cut_ranges(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The part `start <= i < stop` of the local dim."""
    out: list[tuple[int, int]] = []
    position = 0
    for first, last in ranges:
        lower, upper = max(start, position), min(stop, position + last - first)
        if lower < upper:
            out.append((first + lower - position, first + upper - position))
        position += last - first
    return tuple(out)


def shard_ranges(ranges: Ranges, num_chunks: int, index: int) -> Ranges:
    """Piece `index` of the local dim cut into `num_chunks`, as torch.chunk cuts."""
    return cut_ranges(ranges, *chunk_range(ranges_size(ranges), num_chunks, index))


def strided_shard_ranges(ranges: Ranges, split_factor: int, num_chunks: int, index: int) -> Ranges:
    """Cut the local dim into `split_factor` pieces, take piece `index` of `num_chunks` of each, one after the other."""
    size = ranges_size(ranges)
    out: list[tuple[int, int]] = []
    for split in range(split_factor):
        start, stop = chunk_range(size, split_factor, split)
        if start == stop:
            break
        first, last = chunk_range(stop - start, num_chunks, index)
        out.extend(cut_ranges(ranges, start + first, start + last))
    return merge_ranges(out)


def shard_parts(sizes: Sequence[int], num_chunks: int, index: int) -> Ranges:
    """Cut each part of a fused dim on its own and put the pieces with this index one after the other."""
    out: list[tuple[int, int]] = []
    begin = 0
    for size in sizes:
        start, stop = chunk_range(size, num_chunks, index)
        out.append((begin + start, begin + stop))
        begin += size
    return merge_ranges(out)


def place_ranges(dims: Sequence[Ranges], shape: Sequence[int]) -> Placement:
    """The boxes that the ranges of all dims make together.

    Args:
        dims: one list per dim; ranges beyond `shape` (padding) take room in the local tensor but hold nothing.
        shape: global, elements.
    """
    spans: list[list[tuple[int, int, int]]] = []  # per dim (global start, length, local start)
    for ranges, size in zip(dims, shape, strict=True):
        local = 0
        spans.append([])
        for start, stop in ranges:
            if min(stop, size) > start:
                spans[-1].append((start, min(stop, size) - start, local))
            local += stop - start
    placed = tuple(
        Placed(
            box=Box(offsets=tuple(s for s, _, _ in pick), lengths=tuple(n for _, n, _ in pick)),
            local_offsets=tuple(at for _, _, at in pick),
        )
        for pick in itertools.product(*spans)
    )
    return Placement(local_shape=tuple(ranges_size(ranges) for ranges in dims), placed=placed)


def dtensor_placement(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[DimPlacement],
    *,
    strided: Literal["order", "split"] = "order",
) -> Placement:
    """What the rank at `coordinate` holds of a DTensor: its local shape and its boxes.

    Args:
        shape: global, elements.
        mesh_shape: ranks along each mesh dim.
        coordinate: index of the rank in each mesh dim.
        placements: one per mesh dim.
        strided: what a StridedShard means where sizes are uneven (where all are even, both are the same).
            "order": the tensor dim was cut over the mesh dims in another order than theirs, each piece cut again: the
            bytes that `fully_shard` on a tensor-parallel module holds. Where no order gives these split factors, as
            "split". "split": mesh dims from left to right, a StridedShard cutting what is local by then, as torch's
            `_StridedShard._split_tensor` and so `distribute_tensor` do.
    """
    if not len(mesh_shape) == len(coordinate) == len(placements):
        raise InvalidInputError(
            f"a placement per mesh dim: mesh {tuple(mesh_shape)}, coordinate {tuple(coordinate)}, {list(placements)}"
        )
    placements = [_normalised(placement, shape) for placement in placements]
    dims: list[Ranges] = [((0, size),) if size else () for size in shape]
    for dim in range(len(shape)):
        order = shard_order(dim, mesh_shape, placements) if strided == "order" else None
        for mesh_dim in range(len(mesh_shape)) if order is None else order:
            placement, num, index = placements[mesh_dim], mesh_shape[mesh_dim], coordinate[mesh_dim]
            if isinstance(placement, Replicate) or placement.dim != dim:
                continue
            if order is None and isinstance(placement, StridedShard):
                dims[dim] = strided_shard_ranges(dims[dim], placement.split_factor, num, index)
            else:
                dims[dim] = shard_ranges(dims[dim], num, index)
    return place_ranges(dims, shape)


def dtensor_boxes(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[DimPlacement],
    *,
    strided: Literal["order", "split"] = "order",
) -> list[Placed]:
    """The boxes of `dtensor_placement`: what the rank at `coordinate` holds of a DTensor, in local row-major order."""
    return list(dtensor_placement(shape, mesh_shape, coordinate, placements, strided=strided).placed)


def _normalised(placement: DimPlacement, shape: Sequence[int]) -> DimPlacement:
    if isinstance(placement, Replicate) or 0 <= placement.dim < len(shape):
        return placement
    if not -len(shape) <= placement.dim < len(shape):
        raise InvalidInputError(f"{placement} names a dim that a tensor of shape {tuple(shape)} does not have")
    return dataclasses.replace(placement, dim=placement.dim + len(shape))


def shard_order(dim: int, mesh_shape: Sequence[int], placements: Sequence[DimPlacement]) -> list[int] | None:
    """Mesh dims that cut this tensor dim, outermost cut first; None when the split factors fit no order.

    The split factor of a mesh dim is the number of pieces that mesh dims to its right had already made.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate) or placement.dim != dim:
            continue
        wanted = placement.split_factor if isinstance(placement, StridedShard) else 1
        pieces = list(itertools.accumulate((mesh_shape[other] for other in order), operator.mul, initial=1))
        if wanted not in pieces:
            return None
        order.insert(pieces.index(wanted), mesh_dim)
    return order


def place_flat_range(placement: Placement, start: int, stop: int, at: int) -> list[Placed]:
    """The boxes of elements `start <= i < stop` of a rank's local tensor, read row-major, in a flat buffer.

    Args:
        placement: what the rank holds of the tensor before it was flattened.
        start, stop: elements of the local tensor in row-major order.
        at: where element `start` lies in the flat buffer.
    """
    shape = placement.local_shape
    out: list[Placed] = []
    for piece in boxes_of_flat_range(shape, start, stop):
        for placed in placement.placed:
            region = Box(offsets=placed.local_offsets, lengths=placed.box.lengths)
            common = region.intersect(piece)
            if common.volume:
                out.extend(_contiguous(common, placed, shape, at - start))
    return sorted(out, key=lambda placed: placed.local_offsets)


def _contiguous(common: Box, placed: Placed, shape: tuple[int, ...], shift: int) -> list[Placed]:
    """Cut a box of the local tensor into boxes that are each one piece in row-major order.

    From the last dim on, dims that the box spans whole stay together with one dim before them; the dims before that are
    walked one index at a time. Only a fused or padded inner dim needs more than one piece.
    """
    inner = len(shape)
    while inner > 0 and common.lengths[inner - 1] == shape[inner - 1]:
        inner -= 1
    walked = max(inner - 1, 0)
    out: list[Placed] = []
    for index in itertools.product(*(range(n) for n in common.lengths[:walked])):
        local = tuple(o + i for o, i in zip(common.offsets, index, strict=False)) + common.offsets[walked:]
        flat = 0
        for offset, size in zip(local, shape, strict=True):
            flat = flat * size + offset
        delta = (o - at for o, at in zip(local, placed.local_offsets, strict=True))
        offsets = tuple(b + d for b, d in zip(placed.box.offsets, delta, strict=True))
        lengths = (1,) * walked + common.lengths[walked:]
        out.append(Placed(box=Box(offsets=offsets, lengths=lengths), local_offsets=(flat + shift,)))
    return out
