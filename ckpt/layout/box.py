"""Boxes: axis-aligned n-d ranges of a global tensor, one by one and as columns.

In: shapes and ranges. Out: `Box` values and `BoxTable` columns. Pure: no I/O, no torch. Never knows where a box is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, order=True)
class Box:
    """A range of elements of a global tensor: in dim d, `offsets[d] <= index < offsets[d] + lengths[d]`.

    A 0-d tensor has one box with empty tuples. A box with a zero length holds no element.
    """

    offsets: tuple[int, ...]  # elements, inclusive
    lengths: tuple[int, ...]  # elements

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.lengths) or any(n < 0 for n in (*self.offsets, *self.lengths)):
            raise InvalidInputError(f"not a box: offsets {self.offsets}, lengths {self.lengths}")

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.lengths)

    def intersect(self, other: Box) -> Box:
        """The common box; one of zero volume when the two are disjoint."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        stops = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        )
        return Box(offsets=starts, lengths=tuple(max(0, e - s) for s, e in zip(starts, stops, strict=True)))

    def slices(self) -> tuple[slice, ...]:
        """The box as an index into an array of the global shape."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements of a tensor of this shape."""
    return Box(offsets=(0,) * len(shape), lengths=tuple(shape))


def boxes_of_flat_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the elements `start <= i < stop` of a row-major tensor into boxes, in order of i.

    For a 2-d tensor: part of a first row, a block of whole rows, part of a last row; so for n dims at most
    2 n - 1 boxes (the decomposition of ByteCheckpoint, arXiv 2407.20143). Each box is contiguous in row-major order, and
    the boxes follow each other without a gap.
    """
    size = math.prod(shape)
    if not 0 <= start <= stop <= size:
        raise InvalidInputError(f"flat range [{start}, {stop}) is outside a tensor of shape {tuple(shape)}")
    if start == stop:
        return []
    if not shape:
        return [whole(shape)]
    row = size // shape[0]
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _prefixed(first, boxes_of_flat_range(shape[1:], start - first * row, stop - first * row))
    out: list[Box] = []
    block_start = first
    if start % row:
        out += _prefixed(first, boxes_of_flat_range(shape[1:], start % row, row))
        block_start += 1
    block_stop = stop // row
    if block_stop > block_start:
        rest = tuple(shape[1:])
        out.append(Box(offsets=(block_start,) + (0,) * len(rest), lengths=(block_stop - block_start, *rest)))
    if stop % row:
        out += _prefixed(last, boxes_of_flat_range(shape[1:], 0, stop % row))
    return out


def _prefixed(index: int, boxes: list[Box]) -> list[Box]:
    return [Box(offsets=(index, *box.offsets), lengths=(1, *box.lengths)) for box in boxes]


@dataclass(frozen=True, kw_only=True)
class BoxTable:
    """Many boxes as columns. Row i is a box of tensor `tensor[i]`.

    Boxes of fewer dims than `num_dims` are padded at the end with offset 0 and length 1, which changes neither their volume
    nor their row-major order.
    """

    tensor: NDArray[np.int32]  # [N] index into the table of tensors that goes with this table
    offsets: Int64Array  # [N, D]
    lengths: Int64Array  # [N, D]

    def __post_init__(self) -> None:
        assert self.offsets.shape == self.lengths.shape == (len(self.tensor), self.offsets.shape[1])

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def num_dims(self) -> int:
        return int(self.offsets.shape[1])

    def volumes(self) -> Int64Array:
        """[N] number of elements of each box."""
        out = np.ones(len(self), np.int64)
        for dim in range(self.num_dims):  # a product over a short axis is several times slower
            out *= self.lengths[:, dim]
        return out

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> BoxTable:
        """The given rows, in the given order."""
        return BoxTable(tensor=self.tensor[rows], offsets=self.offsets[rows], lengths=self.lengths[rows])

    def box(self, row: int, num_dims: int) -> Box:
        """Row `row` as a Box of `num_dims` dims."""
        return Box(
            offsets=tuple(self.offsets[row, :num_dims].tolist()),
            lengths=tuple(self.lengths[row, :num_dims].tolist()),
        )

    @staticmethod
    def build(items: Iterable[tuple[int, Box]]) -> BoxTable:
        """A table from (tensor index, box) pairs."""
        pairs = list(items)
        num_dims = max((len(box.offsets) for _, box in pairs), default=1) or 1
        offsets = np.zeros((len(pairs), num_dims), np.int64)
        lengths = np.ones((len(pairs), num_dims), np.int64)
        for row, (_, box) in enumerate(pairs):
            offsets[row, : len(box.offsets)] = box.offsets
            lengths[row, : len(box.lengths)] = box.lengths
        return BoxTable(tensor=np.array([t for t, _ in pairs], np.int32), offsets=offsets, lengths=lengths)


def pad_dims(array: Int64Array, num_dims: int, fill: int) -> Int64Array:
    """Widen an [N, d] column to [N, num_dims], new dims at the end holding `fill`."""
    if array.shape[1] == num_dims:
        return array
    out = np.full((array.shape[0], num_dims), fill, np.int64)
    out[:, : array.shape[1]] = array
    return out
