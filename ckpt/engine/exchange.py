"""Load together: every stored byte is read by one rank and passed on to the others that want it.

In: a stored checkpoint and this rank's pieces. Out: the pieces, filled. All ranks of the world call together. Works in rounds
that hold at most `exchange_round_bytes` per rank, so that host memory stays bounded however much is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.read import Progress, run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.world import World, raise_together
from ckpt.errors import CheckpointError, RankFailedError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable
from ckpt.kernels import copy_boxes
from ckpt.layout.box import BoxTable
from ckpt.plan.exchange import (
    Transfers,
    cut_units,
    join_pieces,
    nbytes_of,
    num_rounds,
    packed_pieces,
    pieces_of,
    plan_exchange,
)
from ckpt.plan.read import ReadPlan

AMPLIFICATION_MAX = 1.02  # bytes read over bytes wanted, of all ranks, above which ranks share their reads


@dataclass(frozen=True, kw_only=True)
class ReadBytes:
    """What a load asked of the store on this rank."""

    wanted: int
    read: int
    exchanged: bool


def read_together(
    stored: StoredCheckpoint, pieces: PieceTable, world: World, *, progress: Progress | None = None
) -> ReadBytes:
    """Fill `pieces`. Ranks share their reads when `options.exchange` says so, or when it is "auto" and reading alone would
    fetch more than 1.02 times the bytes that all ranks want."""
    fragments, plan, error = None, None, None
    try:
        fragments = stored.fragments(np.unique(pieces.boxes.tensor))
        plan = stored.plan(fragments, pieces)
    except CheckpointError as problem:
        error = problem
    share = _decide(stored, world, plan, error)
    assert fragments is not None and plan is not None
    if not share:
        try:
            run_reads(stored.job(fragments, pieces, plan), progress=progress)
        except CheckpointError as problem:
            error = problem
        raise_together(world, error, "the state is partly changed: load again")
        return ReadBytes(wanted=plan.wanted_nbytes, read=plan.read_nbytes, exchanged=False)
    read = _exchange(stored, fragments, pieces, world, progress)
    return ReadBytes(wanted=plan.wanted_nbytes, read=read, exchanged=True)


def _decide(stored: StoredCheckpoint, world: World, plan: ReadPlan | None, error: CheckpointError | None) -> bool:
    """The same answer on every rank; an error on every rank when one of them cannot read."""
    mine = np.array([-1, -1] if plan is None else [plan.wanted_nbytes, plan.read_nbytes], np.int64)
    answers = [a.copy().view(np.int64) for a in world.all_gather(mine.view(np.uint8))]
    if error is not None:
        raise error
    failed = [rank for rank, answer in enumerate(answers) if answer[0] < 0]
    if failed:
        raise RankFailedError(f"rank {failed[0]} cannot read its part of the index")
    wanted, read = (int(sum(answer[i] for answer in answers)) for i in (0, 1))
    choice = stored.options.exchange
    if world.size == 1 or world.size > stored.options.exchange_ranks_max or choice == "never":
        return False
    return choice == "always" or read > AMPLIFICATION_MAX * wanted


def _exchange(
    stored: StoredCheckpoint, fragments: FragmentTable, pieces: PieceTable, world: World, progress: Progress | None
) -> int:
    specs = stored.specs
    round_bytes = stored.options.exchange_round_bytes * world.size
    wanted = _all_boxes(world, pieces.boxes)
    transfers = plan_exchange(cut_units(fragments, specs), specs, wanted, round_bytes=round_bytes)
    involved = transfers.take((transfers.wanter == world.rank) | (transfers.reader == world.rank))
    total = 0
    for number in range(num_rounds(specs, round_bytes)):
        total += _round(stored, fragments, pieces, world, involved.take(involved.round == number), progress)
    return total


def _round(
    stored: StoredCheckpoint,
    fragments: FragmentTable,
    pieces: PieceTable,
    world: World,
    rows: Transfers,
    progress: Progress | None,
) -> int:
    """Read what this rank reads for anyone, then swap. A rank that fails still swaps, so that nobody hangs."""
    specs = stored.specs
    reads = rows.take(rows.reader == world.rank)
    own, others = reads.take(reads.wanter == world.rank), reads.take(reads.wanter != world.rank)
    sizes = nbytes_of(others.boxes, specs)
    send = np.empty(int(sizes.sum()), np.uint8)
    error: CheckpointError | None = None
    nbytes = 0
    try:
        plan_pieces = join_pieces([pieces_of(own, pieces), packed_pieces(others.boxes, specs, send.ctypes.data)])
        plan = stored.plan(fragments, plan_pieces)
        run_reads(stored.job(fragments, plan_pieces, plan), progress=progress)
        nbytes = plan.read_nbytes
    except CheckpointError as problem:
        error = problem
    edges = np.searchsorted(others.wanter, np.arange(world.size + 1))
    at = np.append(0, np.cumsum(sizes))[edges]
    mine = rows.take((rows.wanter == world.rank) & (rows.reader != world.rank))
    incoming = nbytes_of(mine.boxes, specs)
    by_reader = np.append(0, np.cumsum(incoming))[np.searchsorted(mine.reader, np.arange(world.size + 1))]
    parts = [send[at[rank] : at[rank + 1]] for rank in range(world.size)]
    received = world.all_to_all(parts, np.diff(by_reader).tolist())
    raise_together(world, error, "the state is partly changed: load again")
    _place(mine, pieces, specs, np.concatenate(received))
    return nbytes


def _place(rows: Transfers, pieces: PieceTable, specs: Sequence[object], data: NDArray[np.uint8]) -> None:
    """Copy what came from the readers into this rank's pieces."""
    if not len(rows.wanter):
        return
    source = packed_pieces(rows.boxes, specs, data.ctypes.data)  # type: ignore[arg-type]
    target = pieces_of(rows, pieces)
    itemsize = source.strides[:, -1]
    copy_boxes(
        source=source.address,
        source_limit=source.limit,
        target=target.address,
        target_limit=target.limit,
        lengths=source.boxes.lengths,
        source_strides=source.strides,
        target_strides=target.strides[:, : source.strides.shape[1]],
        itemsize=itemsize,
    )


def _all_boxes(world: World, boxes: BoxTable) -> list[BoxTable]:
    """The boxes that every rank wants."""
    head = np.array([len(boxes), boxes.num_dims], np.int64)
    body = [head.view(np.uint8), np.ascontiguousarray(boxes.tensor, np.int32).view(np.uint8)]
    body += [np.ascontiguousarray(c, np.int64).reshape(-1).view(np.uint8) for c in (boxes.offsets, boxes.lengths)]
    return [_unpack_boxes(answer.copy()) for answer in world.all_gather(np.concatenate(body))]


def _unpack_boxes(data: NDArray[np.uint8]) -> BoxTable:
    count, num_dims = (int(n) for n in data[:16].view(np.int64))
    tensor = data[16 : 16 + 4 * count].view(np.int32)
    rest = data[16 + 4 * count :].copy().view(np.int64).reshape(2, count, num_dims)
    return BoxTable(tensor=tensor, offsets=rest[0], lengths=rest[1])
