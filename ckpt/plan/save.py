"""Decide which rank writes which fragment: every element once, bytes even over the ranks that hold a copy.

In: the records of all ranks. Out: `SavePlan`, the same on every rank, and the rows that one rank writes. Pure: no I/O, no
clock, no randomness; no loop per fragment. Never moves a fragment to a rank that does not hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable, Int64Array, boxes_of_flat_range
from ckpt.plan.records import RECORD, box_keys, mix, record_nbytes, record_whole

# A fragment is cut between two writers only where both parts are at least so large: 1/256 of what a writer stores, so that what
# rounding costs stays far below 5 %, and within these limits.
CUT_BYTES_MIN = 4 << 10
CUT_BYTES_MAX = 1 << 20
CUT_PARTS = 256
SWEEPS_MAX = 64  # times that the shares of all holder sets are levelled again
SWEPT_SETS_MAX = 8192  # sets levelled again in all, so that planning stays quick


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """Who writes what. Records are those of all ranks, in rank order.

    Record i is written by its rank from byte `start[i]` to byte `stop[i]` of the fragment (row-major bytes of the box);
    nothing where the two are equal. Cuts are only hints in bytes: `rows_of_rank` rounds them to the coarsest slices of the box
    that are not larger than `grain[i]`.
    """

    rank_offsets: Int64Array  # [R + 1] records of rank r are rank_offsets[r] .. rank_offsets[r + 1]
    start: Int64Array  # [M] bytes
    stop: Int64Array  # [M] bytes, exclusive
    load: Int64Array  # [R] bytes that each rank writes
    grain: Int64Array  # [M] bytes; equal for all holders of a fragment

    @property
    def num_ranks(self) -> int:
        return len(self.rank_offsets) - 1


def plan_save(records: Sequence[NDArray[np.void]]) -> SavePlan:
    """Assign every distinct fragment to one of its holders (or cut it between several).

    Args:
        records: per rank its records (ckpt.plan.records); the same list on every rank gives the same plan.

    The holders of a fragment form a set. Sets are served from the smallest to the largest, each holder taking what makes the
    loads even; that is the best there is where sets are disjoint or within one another. Where they overlap in other ways (rows
    and columns of a mesh, tied stages), all sets are levelled again until nothing is gained. Then the fragments of a set are
    laid end to end and cut where each holder has its share, so that a set of k holders cuts at most k - 1 fragments. Integers
    only: every rank comes to the same plan, whatever its processor.
    """
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum([len(r) for r in records], out=offsets[1:])
    table = np.concatenate(records) if records else np.empty(0, RECORD)
    nbytes = record_nbytes(table)
    start, stop, grain = np.zeros(len(table), np.int64), nbytes.copy(), np.zeros(len(table), np.int64)
    keys = box_keys(table)
    if _all_distinct(keys):  # nothing is held twice: the usual case of fully sharded state, and no order is needed
        ends = np.append(0, np.cumsum(nbytes))
        return SavePlan(rank_offsets=offsets, start=start, stop=stop, load=np.diff(ends[offsets]), grain=grain)
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
        sets = _holder_sets(order, group_start[shared], counts[shared], ranks, nbytes)
        stop[np.concatenate([one.holders.ravel() for one in sets])] = 0  # nobody writes, unless said below
        _share(sets, start, stop, grain, load)
    return SavePlan(rank_offsets=offsets, start=start, stop=stop, load=load, grain=grain)


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


@dataclass(frozen=True, kw_only=True)
class _HolderSet:
    """All fragments that the same ranks hold."""

    holders: Int64Array  # [G, k] record numbers, by fragment and member
    members: Int64Array  # [k] ranks
    sizes: Int64Array  # [G] bytes of each fragment
    total: int  # bytes


def _holder_sets(
    order: Int64Array, group_start: Int64Array, counts: Int64Array, ranks: Int64Array, nbytes: Int64Array
) -> list[_HolderSet]:
    """The sets, from the smallest to the largest."""
    rows = _members(group_start, counts)
    set_hash = np.add.reduceat(mix(ranks[order[rows]].astype(np.uint64)), np.cumsum(counts) - counts)
    by_set = np.lexsort((group_start, set_hash, counts))
    ordered_hash = set_hash[by_set]
    edges = np.flatnonzero(np.append(True, ordered_hash[1:] != ordered_hash[:-1]))
    out = []
    for first, last in zip(edges, np.append(edges[1:], len(by_set)), strict=True):
        groups = by_set[first:last]
        size = int(counts[groups[0]])
        holders = order[group_start[groups][:, None] + np.arange(size)]
        sizes = nbytes[holders[:, 0]]
        out.append(_HolderSet(holders=holders, members=ranks[holders[0]], sizes=sizes, total=int(sizes.sum())))
    return out


def _share(
    sets: Sequence[_HolderSet], start: Int64Array, stop: Int64Array, grain: Int64Array, load: Int64Array
) -> None:
    """Distribute the fragments with several holders. Changes all arrays but `sets`."""
    shares = _even_shares(sets, load)  # `load` is now what each rank is planned to write
    for one, share in zip(sets, shares, strict=True):
        load[one.members] -= share
        # What the sets before were rounded by is made up for here, as far as this one goes.
        share = _level(load[one.members], one.total)
        level = int((load[one.members] + share).max())
        cut_min = min(max(level // CUT_PARTS, CUT_BYTES_MIN), CUT_BYTES_MAX)
        load[one.members] += _lay(one, share, cut_min, start, stop)
        grain[one.holders] = cut_min // 2


def _even_shares(sets: Sequence[_HolderSet], load: Int64Array) -> list[Int64Array]:
    """Per set the bytes that each member takes. Adds them to `load`.

    Levelling one set at a time can only lower the sum of the squares of the loads, and where no set lowers it any more the loads
    are as even as can be. Forth and back, so that what one end of a chain of sets has too much reaches the other in one sweep.
    """
    shares = [_taken(one, load) for one in sets]
    before = _squares(load)
    for _ in range(min(SWEEPS_MAX, SWEPT_SETS_MAX // len(sets))):
        for i in (*range(len(sets)), *reversed(range(len(sets)))):
            load[sets[i].members] -= shares[i]
            shares[i] = _taken(sets[i], load)
        after = _squares(load)
        if before - after <= before >> 20:
            break
        before = after
    return shares


def _taken(one: _HolderSet, load: Int64Array) -> Int64Array:
    share = _level(load[one.members], one.total)
    load[one.members] += share
    return share


def _squares(load: Int64Array) -> int:
    return sum(nbytes * nbytes for nbytes in load.tolist())


def _lay(one: _HolderSet, shares: Int64Array, cut_min: int, start: Int64Array, stop: Int64Array) -> Int64Array:
    """Lay the fragments of one holder set end to end and give member j the bytes from its first to its last share.

    Returns [k] bytes that each member writes.
    """
    ends = np.cumsum(one.sizes)
    begins = ends - one.sizes
    bounds = _snap(np.append(0, np.cumsum(shares)), begins, ends, cut_min)
    for j in range(len(one.members)):
        low, high = int(bounds[j]), int(bounds[j + 1])
        if low >= high:
            continue
        g0, g1 = int(np.searchsorted(ends, low, "right")), int(np.searchsorted(begins, high, "left"))
        mine = one.holders[g0:g1, j]
        start[mine] = np.maximum(low - begins[g0:g1], 0)
        stop[mine] = np.minimum(high, ends[g0:g1]) - begins[g0:g1]
    taken: Int64Array = np.diff(bounds)
    return taken


def _snap(bounds: Int64Array, begins: Int64Array, ends: Int64Array, cut_min: int) -> Int64Array:
    """Move each inner bound to the edge of its fragment unless both parts are large enough to be worth a cut."""
    out = bounds.copy()
    for i in range(1, len(bounds) - 1):
        g = min(int(np.searchsorted(ends, bounds[i], "right")), len(ends) - 1)
        low, high = int(begins[g]), int(ends[g])
        before, after = int(bounds[i]) - low, high - int(bounds[i])
        if min(before, after) < cut_min:
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

    A cut fragment is cut along the first dim whose slices are not larger than the grain, at the slice nearest to the planned
    byte; one part is then at most 2 n - 1 boxes. All holders round alike, so that the parts of all writers tile the fragment.
    """
    lo, hi = int(plan.rank_offsets[rank]), int(plan.rank_offsets[rank + 1])
    assert hi - lo == len(boxes), "the plan is of another structure"
    start, stop = plan.start[lo:hi], plan.stop[lo:hi]
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)[boxes.tensor]
    nbytes = boxes.volumes() * itemsizes
    cut = (stop > start) & ((start > 0) | (stop < nbytes))  # at most two per holder set
    whole = np.flatnonzero((stop > start) & ~cut)
    pieces, offsets, lengths = [whole], [boxes.offsets[whole]], [boxes.lengths[whole]]
    for row in np.flatnonzero(cut).tolist():
        shape = tuple(boxes.lengths[row].tolist())
        itemsize = int(itemsizes[row])
        bounds = [_round(int(at), shape, itemsize, int(plan.grain[lo + row])) for at in (start[row], stop[row])]
        parts = boxes_of_flat_range(shape, bounds[0], bounds[1])
        if parts:
            pieces.append(np.full(len(parts), row))
            offsets.append(boxes.offsets[row] + np.array([part.offsets for part in parts], np.int64))
            lengths.append(np.array([part.lengths for part in parts], np.int64))
    piece = np.concatenate(pieces)
    order = np.argsort(piece, kind="stable")
    rows = BoxTable(
        tensor=boxes.tensor[piece[order]],
        offsets=np.concatenate(offsets)[order],
        lengths=np.concatenate(lengths)[order],
    )
    return rows, piece[order]


def _round(at: int, shape: tuple[int, ...], itemsize: int, grain: int) -> int:
    """The element of a box of `shape` nearest to its byte `at` at which a slice of at most `grain` bytes begins."""
    slice_items = math.prod(shape)
    for length in shape:
        slice_items //= length
        if slice_items * itemsize <= grain:
            break
    slice_bytes = slice_items * itemsize
    return (2 * at + slice_bytes) // (2 * slice_bytes) * slice_items
