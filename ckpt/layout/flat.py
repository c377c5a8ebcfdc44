"""Flat buffers: tensors laid one after the other, padded, and cut evenly over an axis (ZeRO-1 style).

In: the members of a buffer with their local placements. Out: what each piece of the buffer holds of each member. Pure.
Never knows rules or names beyond those handed in.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.layout.placement import Placed, Placement, place_flat_range


@dataclass(frozen=True, kw_only=True)
class FlatBuffer:
    """One buffer, the same for all ranks along the axis that cuts it."""

    name: str
    tensors: tuple[int, ...]  # the members, in buffer order, as indices into the caller's table
    placements: tuple[Placement, ...]  # of each member, before it was flattened
    starts: tuple[int, ...]  # where each member starts, elements; and the end of the last one
    piece: int  # elements that each rank holds, padding included

    @staticmethod
    def build(
        name: str, tensors: Sequence[int], placements: Sequence[Placement], *, multiple: int, axis_size: int
    ) -> FlatBuffer:
        """A buffer of these members, padded to a multiple of `multiple * axis_size` elements."""
        sizes = (math.prod(placement.local_shape) for placement in placements)
        starts = tuple(itertools.accumulate(sizes, initial=0))
        unit = multiple * axis_size
        return FlatBuffer(
            name=name,
            tensors=tuple(tensors),
            placements=tuple(placements),
            starts=starts,
            piece=-(-starts[-1] // unit) * unit // axis_size,
        )

    def members_of(self, index: int) -> range:
        """Positions in `tensors` of the members that piece `index` may hold something of."""
        first = bisect.bisect_right(self.starts, index * self.piece) - 1
        last = bisect.bisect_left(self.starts, (index + 1) * self.piece)
        return range(max(first, 0), min(last, len(self.tensors)))

    def place(self, position: int, index: int) -> Placement:
        """What piece `index` holds of member `position`."""
        begin = index * self.piece
        start = max(begin, self.starts[position])
        stop = min(begin + self.piece, self.starts[position + 1])
        placed: list[Placed] = []
        if start < stop:
            base = self.starts[position]
            placed = place_flat_range(self.placements[position], start - base, stop - base, start - begin)
        return Placement(local_shape=(self.piece,), placed=tuple(placed), flat=self.name)
