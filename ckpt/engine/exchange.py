"""Load together: every stored byte that several ranks want is read by one of them and passed on to the others.

In: a stored checkpoint and this rank's pieces. Out: the pieces, filled. All ranks of the world call together. Works in rounds, so
that what is on its way stays within `read_buffer_bytes_max` however much is shared: while one round is put in place, the next one
is read. What one rank wants alone it reads by itself, straight into place.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckpt.config import MIB
from ckpt.engine.passing import Passing, host_id
from ckpt.engine.read import Progress, run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.world import World, raise_together
from ckpt.errors import CheckpointError, RankFailedError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable
from ckpt.kernels import ReadBuffer, copy_boxes
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.exchange import (
    Transfers,
    cut_units,
    join_pieces,
    nbytes_of,
    num_rounds,
    packed_pieces,
    pieces_of,
    plan_exchange,
    round_bytes_for,
    rows_of_tensors,
)
from ckpt.plan.read import ReadPlan

AMPLIFICATION_MAX = 1.02  # bytes read by all ranks over bytes wanted by any, above which ranks share their reads
# The same for files of one host, where reading twice costs less than passing on: docs/explanation/performance.md.
AMPLIFICATION_MAX_LOCAL = 2.5


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
    fetch more than 1.02 times the bytes that any rank wants (2.5 times, where the files and all ranks are on one host)."""
    fragments, plan, error = None, None, None
    try:
        fragments = stored.fragments(np.unique(pieces.boxes.tensor))
        plan = stored.plan(fragments, pieces)
    except CheckpointError as problem:
        error = problem
    share = _decide(stored, pieces, world, plan, error)
    assert fragments is not None and plan is not None
    if not share:
        try:
            run_reads(stored.job(fragments, pieces, plan), progress=progress)
        except CheckpointError as problem:
            error = problem
        raise_together(world, error, "the state is partly changed: load again")
        return ReadBytes(wanted=plan.wanted_nbytes, read=plan.read_nbytes, exchanged=False)
    wanted = plan.wanted_nbytes
    del plan
    read = _Exchange(stored, fragments, pieces, world, progress).run()
    return ReadBytes(wanted=wanted, read=read, exchanged=True)


def _decide(
    stored: StoredCheckpoint, pieces: PieceTable, world: World, plan: ReadPlan | None, error: CheckpointError | None
) -> bool:
    """The same answer on every rank; an error on every rank when one of them cannot read."""
    specs, choice = stored.specs if plan is not None else [], stored.options.exchange
    asked = 1 < world.size <= stored.options.exchange_ranks_max and choice != "never"
    per_tensor = np.zeros(len(specs) if asked else 0, np.int64)
    if asked and plan is not None:
        np.add.at(per_tensor, pieces.boxes.tensor, nbytes_of(pieces.boxes, specs))
    place = host_id() if stored.store.local_files else (0, world.rank)
    mine = np.array([-1 if plan is None else plan.read_nbytes, *place, *per_tensor], np.int64)
    answers = [a.copy().view(np.int64) for a in world.all_gather(mine.view(np.uint8))]
    if error is not None:
        raise error
    failed = [rank for rank, answer in enumerate(answers) if answer[0] < 0]
    if failed:
        raise RankFailedError(f"rank {failed[0]} cannot read its part of the index")
    if not asked or choice == "always":
        return asked
    read = int(sum(answer[0] for answer in answers))
    # Of one tensor all ranks together want no more than it has, however many replicas there are.
    whole = np.array([spec.nbytes for spec in specs], np.int64)
    wanted = int(np.minimum(sum(answer[3:] for answer in answers), whole).sum())
    one_host = all((answer[1:3] == answers[0][1:3]).all() for answer in answers)
    return read > (AMPLIFICATION_MAX_LOCAL if one_host else AMPLIFICATION_MAX) * wanted


class _Exchange:
    """One load of ranks that read for each other. Used once; all ranks make and run one together."""

    def __init__(
        self,
        stored: StoredCheckpoint,
        fragments: FragmentTable,
        pieces: PieceTable,
        world: World,
        progress: Progress | None,
    ) -> None:
        self._stored, self._fragments, self._pieces, self._world = stored, fragments, pieces, world
        self._progress, self._specs = progress, stored.specs
        self._buffer = ReadBuffer()
        units = cut_units(fragments, self._specs, block_bytes=stored.manifest.block_bytes)
        transfers = plan_exchange(units, self._specs, _all_boxes(world, pieces.boxes))
        involved = transfers.take((transfers.wanter == world.rank) | (transfers.reader == world.rank))
        self._alone = involved.take(~involved.shared)
        shared = involved.take(involved.shared)
        self._round_bytes = self._agree_round_bytes(shared)
        self._shared = shared.in_order(self._round_bytes)
        self._rounds = self._shared.position // self._round_bytes
        sent = (self._shared.reader == world.rank) & (self._shared.wanter != world.rank)
        per_round = np.bincount(self._rounds[sent], weights=nbytes_of(self._shared.boxes, self._specs)[sent])
        slots = world.all_gather(np.array([per_round.max(initial=0)], np.int64).view(np.uint8))
        self._slot_bytes = max(int(slot.copy().view(np.int64)[0]) for slot in slots)

    def _agree_round_bytes(self, shared: Transfers) -> int:
        """The most that fits into the memory of every rank."""
        options = self._stored.options
        reads = options.read_threads * self._stored.read_bytes_max
        mine = round_bytes_for(
            shared,
            self._specs,
            self._world.rank,
            memory_bytes=max(options.read_buffer_bytes_max - reads, MIB),
            round_bytes_max=options.exchange_round_bytes * self._world.size,
        )
        answers = self._world.all_gather(np.array([mine], np.int64).view(np.uint8))
        return min(int(answer.copy().view(np.int64)[0]) for answer in answers)

    def run(self) -> int:
        """Carry it out; returns the bytes that this rank read."""
        passing = Passing(self._world, self._slot_bytes)
        order = passing.order()
        total = 0
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="ckpt-exchange") as pool:
                ahead: Future[int] = pool.submit(self._read, self._round(0), self._alone, passing.slot(0), order)
                for number in range(max(num_rounds(self._specs, self._round_bytes), 1)):
                    rows = self._round(number)
                    error: CheckpointError | None = None
                    try:
                        total += ahead.result()
                        passing.announce(number, self._starts(rows, order))
                    except CheckpointError as problem:
                        error = problem
                    # A rank that fails comes here as well, so that nobody waits for it.
                    raise_together(self._world, error, "the state is partly changed: load again")
                    if number + 1 < num_rounds(self._specs, self._round_bytes):
                        following = self._round(number + 1)
                        ahead = pool.submit(self._read, following, None, passing.slot(number + 1), order)
                    self._place(passing, number, rows)
        finally:
            passing.close()
        return total

    def _round(self, number: int) -> Transfers:
        first, last = np.searchsorted(self._rounds, [number, number + 1])
        return self._shared.take(np.arange(first, last))

    def _for_others(self, rows: Transfers, order: Int64Array) -> Transfers:
        """What this rank reads for others, in the order in which it lies in the slot."""
        others = rows.take((rows.reader == self._world.rank) & (rows.wanter != self._world.rank))
        return others.take(np.argsort(order[others.wanter], kind="stable"))

    def _starts(self, rows: Transfers, order: Int64Array) -> Int64Array:
        """[W] where each rank's part of the slot begins."""
        sizes = np.zeros(self._world.size, np.int64)
        sizes[order] = self._sizes(rows, mine=True)
        starts: Int64Array = (np.cumsum(sizes) - sizes)[order]
        return starts

    def _sizes(self, rows: Transfers, *, mine: bool) -> Int64Array:
        """[W] bytes that this rank has for each other one, or that each has for this one."""
        rank = self._world.rank
        side, peer = (rows.reader, rows.wanter) if mine else (rows.wanter, rows.reader)
        moved = (side == rank) & (peer != rank)
        nbytes = nbytes_of(rows.boxes, self._specs)
        return np.bincount(peer[moved], weights=nbytes[moved], minlength=self._world.size).astype(np.int64)

    def _read(self, rows: Transfers, alone: Transfers | None, slot: NDArray[np.uint8], order: Int64Array) -> int:
        """Read what this rank reads of a round: its own parts into place, those of others into the slot."""
        rank = self._world.rank
        own, others = rows.take((rows.reader == rank) & (rows.wanter == rank)), self._for_others(rows, order)
        tables = [pieces_of(own, self._pieces), packed_pieces(others.boxes, self._specs, slot.ctypes.data)]
        nbytes = self._run(join_pieces(tables))
        return nbytes if alone is None else nbytes + self._run(join_pieces([pieces_of(alone, self._pieces)]))

    def _run(self, pieces: PieceTable) -> int:
        if not len(pieces.boxes):
            return 0
        fragments = rows_of_tensors(self._fragments, pieces.boxes.tensor)
        plan = self._stored.plan(fragments, pieces)
        run_reads(replace(self._stored.job(fragments, pieces, plan), buffer=self._buffer), progress=self._progress)
        return plan.read_nbytes

    def _place(self, passing: Passing, number: int, rows: Transfers) -> None:
        """Copy what came from the readers into this rank's pieces."""
        rank = self._world.rank
        base = passing.swap(number, self._sizes(rows, mine=True).tolist(), self._sizes(rows, mine=False).tolist())
        mine = rows.take((rows.wanter == rank) & (rows.reader != rank))  # sorted by reader
        if not len(mine):
            return
        nbytes = nbytes_of(mine.boxes, self._specs)
        before = np.cumsum(nbytes) - nbytes
        first = np.searchsorted(mine.reader, mine.reader)
        address = (base[mine.reader] + before - before[first]).astype(np.uint64)
        source, target = packed_pieces(mine.boxes, self._specs, 0), pieces_of(mine, self._pieces)
        copy_boxes(
            source=address,
            source_limit=address + nbytes.astype(np.uint64),
            target=target.address,
            target_limit=target.limit,
            lengths=source.boxes.lengths,
            source_strides=source.strides,
            target_strides=target.strides[:, : source.strides.shape[1]],
            itemsize=source.strides[:, -1],
            threads=self._stored.options.copy_threads,
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
