"""Find the magnitudes at given ranks exactly, by histograms that add up: nothing is sorted, gathered or sent.

In: the elements of a tile. Out: counts to fold over tiles, and from their sums thresholds. A magnitude is |x| rounded to float32,
as its 31 bits: they rise with it, so that the place of a rank among the upper 16 bits, and then among the lower 15, is its own.
Pure. Equal magnitudes have one threshold: whoever keeps what reaches it keeps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Summary

HIGH_BITS, LOW_BITS = 16, 15
PASSES = 2

RanksOf = Callable[[int], Sequence[int]]  # the ranks that are wanted among so many elements; 1 is the greatest


def counted(tile: kernels.Tile, number: int, constants: Constants, *, threads: int = 1) -> Summary:
    """What pass `number` (0 or 1) finds in a tile. `constants`: what `resolved` gave after pass 0."""
    num = len(tile.sources)
    if number == 0:
        bins = np.zeros((num, 1 << HIGH_BITS), np.uint64)
        kernels.histogram(tile, bins, shift=LOW_BITS, bits=HIGH_BITS, prefix=[-1] * num, threads=threads)
        return Summary(sums={"bins": bins})
    prefixes = constants["prefix"]
    bins = np.zeros((len(prefixes), num, 1 << LOW_BITS), np.uint64)
    for place, prefix in enumerate(prefixes):
        kernels.histogram(tile, bins[place], shift=0, bits=LOW_BITS, prefix=prefix, threads=threads)
    return Summary(sums={"bins": bins})


def resolved(number: int, summary: Summary, constants: Constants, ranks_of: RanksOf) -> Constants:
    """After pass 0 what pass 1 needs; after pass 1 `bits` [R, S]: the magnitude at each rank, of each source."""
    bins = summary.sums["bins"]
    if number == 0:
        counts = bins.sum(axis=1, dtype=np.int64).tolist()
        wanted = np.array([ranks_of(count) for count in counts], np.int64).T.tolist()  # [R][S]
        found = [[place_of(row, rank) for row, rank in zip(bins, ranks, strict=True)] for ranks in wanted]
        return {
            "prefix": [[place for place, _ in row] for row in found],
            "left": [[left for _, left in row] for row in found],
        }
    bits = np.zeros(bins.shape[:2], np.uint32)
    for r, (rows, prefix, left) in enumerate(zip(bins, constants["prefix"], constants["left"], strict=True)):
        for s, (row, high, rank) in enumerate(zip(rows, prefix, left, strict=True)):
            bits[r, s] = (high << LOW_BITS) | place_of(row, rank)[0]
    return {"bits": bits}


def place_of(bins: NDArray[np.uint64], wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th greatest element, and which one in it that is."""
    above = np.cumsum(bins[::-1].astype(np.int64))[::-1]  # elements in this bin or a higher one
    place = int(np.flatnonzero(above >= min(wanted, int(above[0])))[-1]) if above[0] else 0
    return place, wanted - int(above[place] - bins[place])


def rank_of(share: float, count: int) -> int:
    """The rank of the last element that a share of `count` elements keeps: at least one."""
    return max(1, round(share * count))
