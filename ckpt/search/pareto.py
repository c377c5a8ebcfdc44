"""Which of several points no other one beats in every metric.

In: values, higher is better. Out: numbers of points, layers, distances. Pure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(values: ArrayLike) -> list[int]:
    """Numbers of the rows of [points, metrics] that no other row dominates: is at least as good in all, and better in one.

    Equal rows are all kept. Rows with NaN or minus infinity are never on the front.
    """
    array = np.asarray(values, np.float64)
    alive = np.flatnonzero(np.isfinite(array).all(axis=1))
    order = alive[np.lexsort(array[alive].T[::-1])[::-1]]  # falling: a row can be dominated by rows before it alone
    kept: list[int] = []
    for i in order.tolist():
        chosen = array[kept]
        if not ((chosen >= array[i]).all(axis=1) & (chosen > array[i]).any(axis=1)).any():
            kept.append(i)
    return sorted(kept)


def layers(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """[points] 0 on the front, 1 on the front of the rest, and so on; rows that are not finite come last."""
    rank = np.full(len(values), len(values), np.int64)
    left: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    least: NDArray[np.bool_] = np.asarray((values[:, None] >= values[None]).all(axis=2))
    beats = least & ~least.T & left[:, None]  # [i, j] i dominates j
    better = beats.sum(axis=0)  # how many that are left dominate a point
    level = 0
    while left.any():
        found = left & (better == 0)
        rank[found] = level
        better -= beats[found].sum(axis=0)
        left &= ~found
        level += 1
    return rank


def crowding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[points] how far apart the neighbours of a point are, summed over metrics in units of their range; infinite at the ends."""
    out = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]] or 1.0
        out[order[[0, -1]]] = np.inf
        out[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return out


def survivors(values: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """Numbers of `num` points: by layer, within a layer those with the most room (NSGA-II, Deb et al. 2002)."""
    rank = layers(values)
    room = np.zeros(len(values))
    last = np.flatnonzero(rank == np.sort(rank)[min(num, len(rank)) - 1])  # the layer that is cut
    room[last] = crowding(values[last])
    return np.lexsort((-room, rank))[:num]
