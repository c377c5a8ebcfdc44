"""Decide which rank writes which fragment: every element once, bytes even over the ranks that hold a copy.

In: the records of all ranks. Out: `SavePlan`, the same on every rank, and the rows that one rank writes. Pure: no I/O, no
clock, no randomness; no loop per fragment. Never moves a fragment to a rank that does not hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.records import RECORD, box_keys, mix, record_nbytes, record_whole

CUT_BYTES_MIN = 1 << 20  # a fragment is cut between two writers only where both parts are at least this large


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """Who writes what. Records are those of all ranks, in rank order.

    Record i is written by its rank from byte `start[i]` to byte `stop[i]` of the fragment (row-major bytes of the box);
    nothing where the two are equal. Cuts are only hints in bytes: `rows_of_rank` rounds them to whole rows.
    """

    rank_offsets: Int64Array  # [R + 1] records of rank r are rank_offsets[r] .. rank_offsets[r + 1]
    start: Int64Array  # [M] bytes
    stop: Int64Array  # [M] bytes, exclusive
    load: Int64Array  # [R] bytes that each rank writes

    @property
    def num_ranks(self) -> int:
        return len(self.rank_offsets) - 1


def plan_save(records: Sequence[NDArray[np.void]]) -> SavePlan:
    """Assign every distinct fragment to one of its holders (or cut it between several).

    Args:
        records: per rank its records (ckpt.plan.records); the same list on every rank gives the same plan.

    The holders of a fragment form a set. Sets are served from the smallest to the largest; within a set the fragments are
    laid end to end and cut where each holder reaches the level that makes the loads even, so that a set of k holders cuts at
    most k - 1 fragments.
    """
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum([len(r) for r in records], out=offsets[1:])
    table = np.concatenate(records) if records else np.empty(0, RECORD)
    nbytes = record_nbytes(table)
    start, stop = np.zeros(len(table), np.int64), nbytes.copy()
    keys = box_keys(table)
    if _all_distinct(keys):  # nothing is held twice: the usual case of fully sharded state, and no order is needed
        ends = np.append(0, np.cumsum(nbytes))
        return SavePlan(rank_offsets=offsets, start=start, stop=stop, load=np.diff(ends[offsets]))
    ranks = np.repeat(np.arange(len(records)), np.diff(offsets))
    order, group_start = _group(table, keys)
    counts = np.diff(np.append(group_start, len(table)))
    shared = counts > 1
    lowest = shared & record_whole(table[order[group_start]])
    stop[order[_members(group_start[lowest] + 1, counts[lowest] - 1)]] = 0
    shared &= ~lowest
    alone = order[group_start[~shared]]
    load = np.bincount(ranks[alone], weights=nbytes[alone], minlength=len(records)).astype(np.int64)
    if shared.any():
        _share(order, group_start[shared], counts[shared], ranks, nbytes, start, stop, load)
    return SavePlan(rank_offsets=offsets, start=start, stop=stop, load=load)


def _all_distinct(keys: NDArray[np.uint64]) -> bool:
    ordered = np.sort(keys)
    return bool((ordered[1:] != ordered[:-1]).all())


def _group(table: NDArray[np.void], keys: NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
    """Order of the records that puts equal boxes together (lowest rank first), and where each group starts."""
    order = np.argsort(keys, kind="stable")
    columns = [table[field][order] for field in ("name", "first", "last")]
    keys = keys[order]
    same_key = keys[1:] == keys[:-1]
    same_box = np.ones(len(same_key), bool)
    for column in columns:
        same_box &= column[1:] == column[:-1]
    if not np.array_equal(same_key, same_box):  # two boxes share a key: exact order
        order = np.lexsort((table["last"], table["first"], table["name"]))
        same_box[:] = True
        for field in ("name", "first", "last"):
            column = table[field][order]
            same_box &= column[1:] == column[:-1]
    new = np.append(np.ones(min(1, len(table)), bool), ~same_box)
    return order.astype(np.int64), np.flatnonzero(new)


def _share(
    order: Int64Array,
    group_start: Int64Array,
    counts: Int64Array,
    ranks: Int64Array,
    nbytes: Int64Array,
    start: Int64Array,
    stop: Int64Array,
    load: Int64Array,
) -> None:
    """Distribute the groups with several holders. Changes `start`, `stop` and `load`."""
    rows = _members(group_start, counts)
    stop[order[rows]] = 0  # nobody writes, unless said below
    set_hash = np.add.reduceat(mix(ranks[order[rows]].astype(np.uint64)), np.cumsum(counts) - counts)
    by_set = np.lexsort((group_start, set_hash, counts))
    ordered_hash = set_hash[by_set]
    edges = np.flatnonzero(np.append(True, ordered_hash[1:] != ordered_hash[:-1]))
    for first, last in zip(edges, np.append(edges[1:], len(by_set)), strict=True):
        groups = by_set[first:last]
        size = int(counts[groups[0]])
        holders = order[group_start[groups][:, None] + np.arange(size)]  # [G, k] record numbers
        members = ranks[holders[0]]
        shares = _level(load[members], int(nbytes[holders[:, 0]].sum()))
        _lay(holders, nbytes[holders[:, 0]], members, shares, start, stop, load)


def _lay(
    holders: Int64Array,
    sizes: Int64Array,
    members: Int64Array,
    shares: Int64Array,
    start: Int64Array,
    stop: Int64Array,
    load: Int64Array,
) -> None:
    """Lay the fragments of one holder set end to end and give member j the bytes from its first to its last share."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    bounds = _snap(np.append(0, np.cumsum(shares)), begins, ends)
    for j in range(len(members)):
        low, high = int(bounds[j]), int(bounds[j + 1])
        if low >= high:
            continue
        g0, g1 = int(np.searchsorted(ends, low, "right")), int(np.searchsorted(begins, high, "left"))
        mine = holders[g0:g1, j]
        start[mine] = np.maximum(low - begins[g0:g1], 0)
        stop[mine] = np.minimum(high, ends[g0:g1]) - begins[g0:g1]
        load[members[j]] += high - low


def _snap(bounds: Int64Array, begins: Int64Array, ends: Int64Array) -> Int64Array:
    """Move each inner bound to the edge of its fragment unless both parts are large enough to be worth a cut."""
    out = bounds.copy()
    for i in range(1, len(bounds) - 1):
        g = min(int(np.searchsorted(ends, bounds[i], "right")), len(ends) - 1)
        low, high = int(begins[g]), int(ends[g])
        before, after = int(bounds[i]) - low, high - int(bounds[i])
        if min(before, after) < CUT_BYTES_MIN:
            out[i] = low if before < after else high
    out[-1] = ends[-1]
    result: Int64Array = np.maximum.accumulate(out)
    return result


def _level(load: Int64Array, total: int) -> Int64Array:
    """How many of `total` bytes each member takes so that the largest load becomes as small as can be."""
    order = np.argsort(load, kind="stable")
    levels = load[order]
    room = np.arange(1, len(levels) + 1) * np.append(
        levels[1:], np.iinfo(np.int64).max // (len(levels) + 1)
    ) - np.cumsum(levels)
    k = int(np.argmax(room >= total)) + 1  # the k least loaded members share
    level = (total + int(levels[:k].sum())) // k
    shares = np.zeros(len(load), np.int64)
    shares[order[:k]] = np.maximum(level - levels[:k], 0)
    shares[order[0]] += total - int(shares.sum())
    return shares


def _members(group_start: Int64Array, counts: Int64Array) -> Int64Array:
    """All positions of the given groups."""
    out: Int64Array = np.repeat(group_start, counts) + arange_per(counts)
    return out


def arange_per(counts: Int64Array) -> Int64Array:
    """0..counts[0], 0..counts[1], ... in one array."""
    total = int(counts.sum())
    out: Int64Array = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return out


def rows_of_rank(
    plan: SavePlan, rank: int, specs: Sequence[TensorSpec], boxes: BoxTable
) -> tuple[BoxTable, Int64Array]:
    """The boxes that `rank` writes, and for each the number of the piece (row of `boxes`) that it is a part of.

    A cut fragment is cut along its first dim longer than one, at the row nearest to the planned byte; all holders round
    alike, so that the parts of all writers tile the fragment.
    """
    lo, hi = int(plan.rank_offsets[rank]), int(plan.rank_offsets[rank + 1])
    assert hi - lo == len(boxes), "the plan is of another structure"
    start, stop = plan.start[lo:hi], plan.stop[lo:hi]
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    nbytes = boxes.volumes() * itemsizes[boxes.tensor]
    rows = np.flatnonzero(stop > start)
    offsets, lengths = boxes.offsets[rows].copy(), boxes.lengths[rows].copy()
    for i in np.flatnonzero((start[rows] > 0) | (stop[rows] < nbytes[rows])):  # at most two per holder set
        row = rows[i]
        dim = int(np.argmax(lengths[i] > 1))
        whole = int(boxes.lengths[row, dim])
        low = round(int(start[row]) * whole / int(nbytes[row]))
        high = round(int(stop[row]) * whole / int(nbytes[row]))
        offsets[i, dim] += low
        lengths[i, dim] = high - low
    keep = lengths.min(axis=1, initial=1) > 0
    cut = BoxTable(tensor=boxes.tensor[rows[keep]], offsets=offsets[keep], lengths=lengths[keep])
    return cut, rows[keep]
