"""Decide which rank reads which part of a checkpoint for all ranks that want it.

In: the fragments of the tensors that this rank wants, and the boxes that every rank wants. Out: units with one reader each, and
what of them goes to whom. Pure: no I/O. Every rank that wants a unit decides alike, from what they all know; ranks need not
know the fragments of tensors that they do not want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable, Int64Array, pad_dims
from ckpt.plan.read import candidates, contiguous_strides
from ckpt.plan.records import corners, mix
from ckpt.plan.save import arange_per

UNIT_BYTES = 8 << 20  # a larger fragment is cut into row slabs of at most about this size


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Parts of units that ranks want. Row i: rank `wanter[i]` wants box i out of a unit that rank `reader[i]` reads."""

    boxes: BoxTable
    wanter: Int64Array  # [N]
    reader: Int64Array  # [N]
    position: Int64Array  # [N] bytes of the checkpoint before the unit, tensors end to end
    piece: Int64Array  # [N] row of the wanter's boxes
    shared: NDArray[np.bool_]  # [N] whether several ranks want the unit; one that a rank wants alone it reads by itself

    def __len__(self) -> int:
        return len(self.wanter)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Transfers:
        return Transfers(
            boxes=self.boxes.take(rows),
            wanter=self.wanter[rows],
            reader=self.reader[rows],
            position=self.position[rows],
            piece=self.piece[rows],
            shared=self.shared[rows],
        )

    def in_order(self, round_bytes: int) -> Transfers:
        """Sorted by (round, reader, wanter, position, piece), the same way on every rank that has these rows."""
        return self.take(
            np.lexsort((self.piece, self.position, self.wanter, self.reader, self.position // round_bytes))
        )


def cut_units(fragments: FragmentTable, specs: Sequence[TensorSpec], *, block_bytes: int) -> BoxTable:
    """The fragments, those larger than a unit cut along their first long dim; sorted as the fragments are.

    Cut between two checksum blocks where the rows allow it, so that no block is read by two ranks.
    """
    boxes = fragments.boxes
    rows = np.arange(len(boxes))
    dim = np.argmax(boxes.lengths > 1, axis=1)
    length = boxes.lengths[rows, dim]
    per_index = np.maximum(fragments.nbytes // np.maximum(length, 1), 1)
    step = np.maximum(UNIT_BYTES // per_index, 1)
    whole = block_bytes // np.gcd(per_index, block_bytes)  # so many indices are a whole number of blocks
    step = np.where(whole <= step, step // whole * whole, step)
    parts = -(-length // step)
    rows = np.repeat(rows, parts)
    begin = arange_per(parts) * step[rows]
    out = boxes.take(rows)
    at = np.arange(len(rows))
    out.offsets[at, dim[rows]] += begin
    out.lengths[at, dim[rows]] = np.minimum(step[rows], length[rows] - begin)
    return out


def plan_exchange(units: BoxTable, specs: Sequence[TensorSpec], wanted: Sequence[BoxTable]) -> Transfers:
    """Give every unit one reader among the ranks that want some of it.

    Args:
        units: of all tensors that this rank wants (others may be missing).
        wanted: per rank the boxes it wants, each sorted by tensor.
    """
    position = _positions(units, specs)
    parts = [_meet(units, specs, boxes) for boxes in wanted]
    unit = np.concatenate([part[0] for part in parts])
    wanter = np.repeat(np.arange(len(wanted)), [len(part[0]) for part in parts])
    num_dims = max((part[2].num_dims for part in parts), default=1)
    boxes = BoxTable(
        tensor=np.concatenate([part[2].tensor for part in parts]),
        offsets=np.concatenate([pad_dims(part[2].offsets, num_dims, 0) for part in parts]),
        lengths=np.concatenate([pad_dims(part[2].lengths, num_dims, 1) for part in parts]),
    )
    reader, shared = _readers(unit, wanter, position)
    return Transfers(
        boxes=boxes,
        wanter=wanter,
        reader=reader,
        position=position[unit],
        piece=np.concatenate([part[1] for part in parts]),
        shared=shared,
    )


def num_rounds(specs: Sequence[TensorSpec], round_bytes: int) -> int:
    """Rounds of an exchange of so many bytes of the checkpoint each; equal on all ranks."""
    return -(-sum(spec.nbytes for spec in specs) // round_bytes)


def round_bytes_for(
    transfers: Transfers, specs: Sequence[TensorSpec], rank: int, *, memory_bytes: int, round_bytes_max: int
) -> int:
    """The largest round, halved as often as it takes, for which what this rank sends and gets fits into `memory_bytes`.

    Twice: while one round is placed the next one is read. Never less than a unit.
    """
    moved = transfers.take(transfers.shared & (transfers.reader != transfers.wanter))
    nbytes = nbytes_of(moved.boxes, specs)
    sides = [moved.reader == rank, moved.wanter == rank]
    round_bytes = round_bytes_max
    while round_bytes > UNIT_BYTES:
        peaks = [np.bincount(moved.position[s] // round_bytes, weights=nbytes[s]).max(initial=0.0) for s in sides]
        if 2 * sum(peaks) <= memory_bytes:
            break
        round_bytes //= 2
    return max(round_bytes, UNIT_BYTES)


def _positions(units: BoxTable, specs: Sequence[TensorSpec]) -> Int64Array:
    """[U] bytes of the checkpoint before each unit's first element, tensors end to end in order of their ids."""
    sizes = np.array([spec.nbytes for spec in specs], np.int64)
    base = np.cumsum(sizes) - sizes
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    first, _ = corners(specs, units)
    out: Int64Array = base[units.tensor] + first * itemsizes[units.tensor]
    return out


def _meet(units: BoxTable, specs: Sequence[TensorSpec], boxes: BoxTable) -> tuple[Int64Array, Int64Array, BoxTable]:
    """(unit, row of boxes, common box) of all pairs that meet. Boxes of tensors without units meet nothing."""
    low, counts = candidates(units, boxes, specs)
    row = np.repeat(np.arange(len(boxes)), counts)
    unit = np.repeat(low, counts) + arange_per(counts)
    num_dims = max(units.num_dims, boxes.num_dims)
    u_off, u_len = pad_dims(units.offsets[unit], num_dims, 0), pad_dims(units.lengths[unit], num_dims, 1)
    b_off, b_len = pad_dims(boxes.offsets[row], num_dims, 0), pad_dims(boxes.lengths[row], num_dims, 1)
    start = np.maximum(u_off, b_off)
    lengths = np.minimum(u_off + u_len, b_off + b_len) - start
    keep = (lengths > 0).all(axis=1) & (units.tensor[unit] == boxes.tensor[row])
    common = BoxTable(tensor=units.tensor[unit[keep]], offsets=start[keep], lengths=lengths[keep])
    return unit[keep], row[keep], common


def _readers(unit: Int64Array, wanter: Int64Array, position: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """[N] of each row the rank that reads its unit, one of the unit's wanters; and whether there are several.

    Units that the same ranks want are dealt to them in turn, region by region, so that each has as much to do in each round.
    Neighbours in the checkpoint go to one reader, so that what it reads is few long ranges without other ranks' units between.
    """
    if not len(unit):
        return np.empty(0, np.int64), np.empty(0, bool)
    pairs = np.unique(np.stack([unit, wanter], axis=1), axis=0)
    starts = np.flatnonzero(np.append(True, pairs[1:, 0] != pairs[:-1, 0]))
    counts = np.diff(np.append(starts, len(pairs)))
    wanters = np.add.reduceat(mix(pairs[:, 1].astype(np.uint64)), starts)  # one number for each set of ranks
    region = position[pairs[starts, 0]] // UNIT_BYTES
    order = np.lexsort((region, wanters))
    new_set = np.append(True, np.diff(wanters[order]) != 0)
    new_turn = new_set | np.append(True, np.diff(region[order]) != 0)
    turn = np.empty(len(order), np.int64)
    turn[order] = np.cumsum(new_turn)
    first = np.empty(len(order), np.int64)  # sets begin with different members
    first[order] = np.maximum.accumulate(np.where(new_set, np.cumsum(new_turn), 0))
    spread = (wanters % counts.astype(np.uint64)).astype(np.int64)
    chosen = pairs[starts + (turn - first + spread) % counts, 1]
    at = np.searchsorted(pairs[starts, 0], unit)
    return chosen[at], counts[at] > 1


def nbytes_of(boxes: BoxTable, specs: Sequence[TensorSpec]) -> Int64Array:
    """[N] bytes of each box."""
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    out: Int64Array = boxes.volumes() * itemsizes[boxes.tensor]
    return out


def packed_pieces(boxes: BoxTable, specs: Sequence[TensorSpec], base: int) -> PieceTable:
    """Pieces that lie end to end, row-major, from memory address `base` on."""
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)[boxes.tensor]
    nbytes = boxes.volumes() * itemsizes
    ends = np.cumsum(nbytes)
    address = (ends - nbytes + base).astype(np.uint64)
    return PieceTable(
        boxes=boxes,
        address=address,
        limit=address + nbytes.astype(np.uint64),
        strides=contiguous_strides(boxes.lengths, itemsizes),
    )


def pieces_of(transfers: Transfers, pieces: PieceTable) -> PieceTable:
    """This rank's own memory for rows that it wants itself."""
    row = transfers.piece
    num_dims = max(transfers.boxes.num_dims, pieces.boxes.num_dims)
    offsets = pad_dims(transfers.boxes.offsets, num_dims, 0)
    strides = pad_dims(pieces.strides[row], num_dims, 0)
    shift = ((offsets - pad_dims(pieces.boxes.offsets[row], num_dims, 0)) * strides).sum(axis=1)
    return PieceTable(
        boxes=BoxTable(
            tensor=transfers.boxes.tensor, offsets=offsets, lengths=pad_dims(transfers.boxes.lengths, num_dims, 1)
        ),
        address=pieces.address[row] + shift.astype(np.uint64),
        limit=pieces.limit[row],
        strides=strides,
    )


def rows_of_tensors(fragments: FragmentTable, tensor: NDArray[np.integer]) -> FragmentTable:
    """The fragments of the tensors from the least to the greatest of `tensor`."""
    low, high = (int(tensor.min()), int(tensor.max())) if len(tensor) else (0, -1)
    rows = slice(*np.searchsorted(fragments.boxes.tensor, [low, high + 1]).tolist())
    blocks = slice(int(fragments.block_starts[rows.start]), int(fragments.block_starts[rows.stop]))
    boxes = fragments.boxes
    return FragmentTable(
        boxes=BoxTable(tensor=boxes.tensor[rows], offsets=boxes.offsets[rows], lengths=boxes.lengths[rows]),
        writer=fragments.writer[rows],
        offsets=fragments.offsets[rows],
        nbytes=fragments.nbytes[rows],
        checksums=fragments.checksums[blocks],
        block_starts=fragments.block_starts[rows.start : rows.stop + 1] - blocks.start,
    )


def join_pieces(tables: Sequence[PieceTable]) -> PieceTable:
    """Several piece tables as one, sorted by tensor."""
    num_dims = max(table.boxes.num_dims for table in tables)
    tensor = np.concatenate([table.boxes.tensor for table in tables])
    order = np.argsort(tensor, kind="stable")
    boxes = BoxTable(
        tensor=tensor[order],
        offsets=np.concatenate([pad_dims(t.boxes.offsets, num_dims, 0) for t in tables])[order],
        lengths=np.concatenate([pad_dims(t.boxes.lengths, num_dims, 1) for t in tables])[order],
    )
    return PieceTable(
        boxes=boxes,
        address=np.concatenate([t.address for t in tables])[order],
        limit=np.concatenate([t.limit for t in tables])[order],
        strides=np.concatenate([pad_dims(t.strides, num_dims, 0) for t in tables])[order],
    )
