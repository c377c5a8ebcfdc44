"""Save one rank's part of a checkpoint, and commit it when all ranks have.

In: a `LocalState` and a store. Out: a published checkpoint, or an error on every rank. `SaveSession` keeps plan, image layout
and buffers between steps, so that a step of the same structure makes no collective call. `stage` and `save` run on the
training thread; `finish` may run on another one and never calls a collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckpt.commit.publish as publishing
import ckpt.commit.receipts as receipts_of
from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.config import Options
from ckpt.engine.agree import agree, find_disagreements, names_by_hash
from ckpt.engine.pack import Packer, PackProgram, make_program
from ckpt.engine.structure import Digests
from ckpt.engine.world import World
from ckpt.errors import AlreadyExistsError, CheckpointError, RankFailedError
from ckpt.format import manifest, receipt
from ckpt.format.checksum import choose_block_bytes, sha256
from ckpt.format.image import lay_out, padded_object
from ckpt.format.spec import LocalState, TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.records import box_keys, make_records, mix
from ckpt.plan.save import plan_save, rows_of_rank
from ckpt.state.memory import collector_paused
from ckpt.store.base import Store

PROGRAM = "ckpt 0.1.0"
_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What goes with the state of one save. Equal on all ranks; rank 0's is stored."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one rank's save did. Seconds by phase; bytes of this rank's image."""

    step: int
    attempt: str
    nbytes: int
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What a structure needs; made once per structure."""

    structure: str
    keys: NDArray[np.uint64]  # [N] of the pieces
    rows: BoxTable
    piece_of_row: Int64Array
    block_bytes: int
    layout_digest: str


@dataclass(kw_only=True)
class Attempt:
    """One save on its way. Owned by one thread at a time: staged by the trainer, then handed to whoever finishes it."""

    request: Request
    id: str
    packer: Packer
    program: PackProgram
    image_digest: str
    image: receipt.ImageTable
    objects: list[receipt.ObjectRow]
    block_bytes: int
    layout_digest: str
    describe: Callable[[], dict[str, Any] | None]
    changed: bool
    staged: NDArray[np.uint8] | None
    seconds: dict[str, float]


class SaveSession:
    """All saves of one rank into one run. Made by all ranks together; one save at a time."""

    def __init__(self, store: Store, world: World, options: Options) -> None:
        self._store, self._world, self._options = store, world, options
        self._digests = Digests()
        self._planned: _Planned | None = None
        self._session = ""
        self._count = 0
        self._sent: str | None = None  # structure whose image table the committer has
        self._program: tuple[tuple[object, ...], PackProgram] | None = None
        self._assembler = Assembler(PROGRAM)
        self._buffers: list[NDArray[np.uint8]] = []
        self._image = np.empty(0, np.uint8)

    def save(self, local: LocalState, request: Request, error: BaseException | None = None) -> Saved:
        """Store `local` and return when the checkpoint is durable. All ranks call.

        Args:
            error: why this rank has no state to save; then no rank saves and every rank raises.
        """
        return self.finish(self._prepare(local, request, error))

    def stage(self, local: LocalState, request: Request, error: BaseException | None = None) -> Attempt:
        """Copy `local` into this session's image; afterwards the state may change. All ranks call; then `finish`."""
        attempt = self._prepare(local, request, error)
        start = time.perf_counter()
        with self._telling_others(request.step):
            total = attempt.program.layout.total_bytes
            if len(self._image) < total:
                self._image = allocate(total)
            attempt.staged = self._image[:total]
            for chunk in range(attempt.program.num_chunks):
                low, high = attempt.program.chunk_range(chunk)
                attempt.packer.fill(chunk, attempt.staged[low:high])
        attempt.seconds["stage"] = time.perf_counter() - start
        return attempt

    def finish(self, attempt: Attempt) -> Saved:
        """Write, leave the receipt and wait for the outcome. No collective call. The steps are those of DESIGN 5.5."""
        start = time.perf_counter()
        step = attempt.request.step
        with self._telling_others(step):
            failpoints.hit("save.before-image")
            self._write_image(attempt)  # 1. this rank's image is durable
            attempt.seconds["write"] = time.perf_counter() - start
            with collector_paused():
                payload = receipt.pack(self._receipt(attempt))
            receipts_of.leave_receipt(self._store, step, attempt.id, self._world.rank, self._world.size, payload)  # 2.
            if self._world.rank == 0:
                changed = self._commit(attempt)  # 3. index durable, 4. manifest created
            else:
                changed = self._await(attempt)
        attempt.seconds["total"] = (
            sum(attempt.seconds.get(k, 0.0) for k in ("plan", "stage")) + time.perf_counter() - start
        )
        self._sent = attempt.image_digest
        if changed:
            self._planned = None
        return Saved(step=step, attempt=attempt.id, nbytes=attempt.program.layout.total_bytes, seconds=attempt.seconds)

    # planning

    @collector_paused()
    def _prepare(self, local: LocalState, request: Request, error: BaseException | None) -> Attempt:
        start = time.perf_counter()
        planned = self._planned
        if planned is None:
            planned = self._planned = self._plan_with_others(local, request, error)
        self._count += 1  # on every rank alike, whatever happens next
        try:
            publishing.refuse_existing(self._store, request.step)
        except AlreadyExistsError:
            raise  # every rank sees it, and nothing is to be touched
        except CheckpointError as problem:
            error = error or problem  # perhaps of this rank's way to the store alone
        with self._telling_others(request.step):
            if error is not None:
                raise error
            with collector_paused():
                return self._attempt(local, request, planned, start)

    def _attempt(self, local: LocalState, request: Request, planned: _Planned, start: float) -> Attempt:
        changed = planned.structure != self._digests.structure(local)
        if changed:
            planned = self._plan_alone(local, planned)
        payloads = [padded_object(obj.payload) for obj in local.objects]
        program = self._program_for(local, planned, payloads)
        layout = program.layout
        image = receipt.ImageTable(
            specs=local.specs,
            rows=layout.rows,
            offsets=layout.offsets,
            nbytes=layout.nbytes,
            header_bytes=len(layout.header),
            header_crc32c=crc32c(layout.header),
        )
        return Attempt(
            request=request,
            id=self._attempt_id,
            packer=Packer(program, local.pieces, payloads, threads=self._options.copy_threads),
            program=program,
            image_digest=f"{planned.structure}-{image.header_crc32c:08x}-{len(layout.rows)}",
            image=image,
            objects=self._object_rows(local, payloads, program),
            block_bytes=planned.block_bytes,
            layout_digest=planned.layout_digest,
            describe=local.describe,
            changed=changed,
            staged=None,
            seconds={"plan": time.perf_counter() - start},
        )

    def _plan_with_others(self, local: LocalState, request: Request, error: BaseException | None) -> _Planned:
        """Agree with all ranks on the plan of this structure. The only place that makes collective calls."""
        records = None
        if error is None:
            try:
                with collector_paused():
                    records = make_records(local.specs, local.pieces.boxes)
            except CheckpointError as problem:
                error = problem
        agreement = agree(self._world, step=request.step, target=self._store.url, records=records, error=error)
        assert records is not None
        known = names_by_hash([spec.name for spec in local.specs])
        differing = find_disagreements(agreement.records, known)
        if differing:
            raise RankFailedError(
                f"ranks disagree on dtype, global shape or role of {', '.join(differing[:20])};"
                f" rank {self._world.rank} has {_described(local.specs, differing)}",
                kind="rank-disagrees",
                hints=("a tensor cut over ranks must be a DTensor, or be described by `layout=` or ckpt.annotate",),
            )
        self._session, self._count, self._sent = agreement.session, 0, None
        plan = plan_save(agreement.records)
        rows, piece_of_row = rows_of_rank(plan, self._world.rank, local.specs, local.pieces.boxes)
        return _Planned(
            structure=self._digests.structure(local),
            keys=_piece_keys(records),
            rows=rows,
            piece_of_row=piece_of_row,
            block_bytes=choose_block_bytes(int(plan.load.sum())),
            layout_digest=self._digests.layout(local),
        )

    def _plan_alone(self, local: LocalState, old: _Planned) -> _Planned:
        """A structure that changed since the plan: keep what the plan says of the pieces that it knows, write all others.

        No collective call. Replicas of a new piece are then written by each holder and the committer keeps one; the next
        save plans together again, because the manifest says that a structure changed.
        """
        keys = _piece_keys(make_records(local.specs, local.pieces.boxes))
        order = np.argsort(old.keys)
        at = np.minimum(np.searchsorted(old.keys, keys, sorter=order), max(len(order) - 1, 0))
        known = old.keys[order[at]] == keys if len(order) else np.zeros(len(keys), bool)
        new_of_old = np.full(len(old.keys), -1, np.int64)
        new_of_old[order[at[known]]] = np.flatnonzero(known)
        kept = np.flatnonzero(new_of_old[old.piece_of_row] >= 0)
        pieces = np.concatenate([new_of_old[old.piece_of_row[kept]], np.flatnonzero(~known)])
        offsets, lengths = local.pieces.boxes.offsets[pieces].copy(), local.pieces.boxes.lengths[pieces].copy()
        width = min(offsets.shape[1], old.rows.num_dims)
        offsets[: len(kept), :width] = old.rows.offsets[kept, :width]
        lengths[: len(kept), :width] = old.rows.lengths[kept, :width]
        rows = BoxTable(tensor=local.pieces.boxes.tensor[pieces], offsets=offsets, lengths=lengths)
        return dataclasses.replace(
            old,
            structure=self._digests.structure(local),
            layout_digest=self._digests.layout(local),
            keys=keys,
            rows=rows,
            piece_of_row=pieces,
        )

    def _program_for(self, local: LocalState, planned: _Planned, payloads: list[bytes]) -> PackProgram:
        objects = [(obj.name, len(data)) for obj, data in zip(local.objects, payloads, strict=True)]
        key = (planned.structure, len(planned.rows), planned.rows.lengths.tobytes(), *objects)
        if self._program is None or self._program[0] != key:
            layout = lay_out(local.specs, planned.rows, objects)
            program = make_program(
                layout,
                local.specs,
                local.pieces.boxes,
                planned.piece_of_row[layout.source],
                chunk_bytes=self._options.chunk_bytes,
                block_bytes=planned.block_bytes,
            )
            self._program = (key, program)
        return self._program[1]

    def _object_rows(self, local: LocalState, payloads: list[bytes], program: PackProgram) -> list[receipt.ObjectRow]:
        return [
            receipt.ObjectRow(
                name=obj.name,
                kind=obj.kind,
                rank=self._world.rank,
                writer=self._world.rank,
                dp_rank=obj.dp_rank,
                dp_size=obj.dp_size,
                digest=sha256(data),
                byte_offset=offset,
                nbytes=len(data),
            )
            for obj, data, offset in zip(local.objects, payloads, program.layout.object_offsets, strict=True)
        ]

    # writing

    def _write_image(self, attempt: Attempt) -> None:
        key = f"{names.attempt_folder(attempt.request.step, attempt.id)}/{self._file_name}"
        writer = self._store.open_writer(key, nbytes=attempt.program.layout.total_bytes)
        try:
            if attempt.staged is not None:
                self._write_staged(attempt, attempt.staged, writer)
            else:
                self._write_through_buffers(attempt, writer)
            failpoints.hit("save.before-image-commit")
            writer.commit()
        except BaseException:
            writer.abort()
            raise

    def _write_staged(self, attempt: Attempt, image: NDArray[np.uint8], writer: Any) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-write") as pool:
            pending: deque[Future[None]] = deque()
            for chunk in range(attempt.program.num_chunks):
                low, high = attempt.program.chunk_range(chunk)
                if len(pending) >= self._options.write_buffers:
                    pending.popleft().result()
                pending.append(pool.submit(writer.write, image[low:high].data))
                attempt.packer.checksum(chunk, image[low:high])
                failpoints.hit("save.in-image")
            for future in pending:
                future.result()

    def _write_through_buffers(self, attempt: Attempt, writer: Any) -> None:
        """Fill one buffer while another is written: the host never holds more than `write_buffers` chunks."""
        while len(self._buffers) < min(self._options.write_buffers, attempt.program.num_chunks):
            self._buffers.append(allocate(self._options.chunk_bytes))
        free = deque(self._buffers)
        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-write") as pool:
            pending: deque[tuple[Future[None], NDArray[np.uint8]]] = deque()
            for chunk in range(attempt.program.num_chunks):
                if not free:
                    future, buffer = pending.popleft()
                    future.result()
                    free.append(buffer)
                buffer = free.popleft()
                low, high = attempt.program.chunk_range(chunk)
                attempt.packer.fill_and_checksum(chunk, buffer)
                pending.append((pool.submit(writer.write, buffer[: high - low].data), buffer))
                failpoints.hit("save.in-image")
            for future, _ in pending:
                future.result()

    @property
    def _file_name(self) -> str:
        return names.image_name(self._world.rank, self._world.size)

    def _receipt(self, attempt: Attempt) -> receipt.Receipt:
        return receipt.Receipt(
            rank=self._world.rank,
            world=self._world.size,
            step=attempt.request.step,
            attempt=attempt.id,
            structure=attempt.image_digest,
            file=self._file_name,
            file_bytes=attempt.program.layout.total_bytes,
            block_bytes=attempt.block_bytes,
            checksums=attempt.packer.checksums,
            objects=attempt.objects,
            image=attempt.image if self._sent != attempt.image_digest else None,
            extra={
                "structure_changed": attempt.changed,
                "layout": attempt.layout_digest,
                "tensors": attempt.describe() if self._sent != attempt.image_digest else None,
            },
        )

    # the outcome

    def _commit(self, attempt: Attempt) -> bool:
        """Rank 0: wait for all receipts, write the index, publish. Returns whether a structure changed."""
        start = time.perf_counter()
        step = attempt.request.step
        payloads = receipts_of.collect_receipts(
            self._store,
            step,
            attempt.id,
            self._world.size,
            timeout_s=self._options.commit_timeout_s,
            options=self._options,
        )
        attempt.seconds["receipts"] = time.perf_counter() - start
        request = attempt.request
        with collector_paused():
            found = [receipt.unpack(payloads[rank], name=f"rank {rank}") for rank in range(self._world.size)]
            assembled = self._assembler.assemble(
                found, metadata=request.metadata, metrics=request.metrics, layout=request.layout
            )
        for name, data in assembled.files.items():
            failpoints.hit("save.before-index")
            self._store.put(f"{names.attempt_folder(step, attempt.id)}/{name}", data)
        publishing.publish(self._store, step, attempt.id, manifest.pack(assembled.manifest), options=self._options)
        self._drop_receipts(step, attempt.id)
        attempt.seconds["commit"] = time.perf_counter() - start
        return assembled.manifest.structure_changed

    def _await(self, attempt: Attempt) -> bool:
        start = time.perf_counter()
        step, options = attempt.request.step, self._options
        timeout_s = options.commit_timeout_s + options.outcome_grace_s
        publishing.await_outcome(self._store, step, attempt.id, timeout_s=timeout_s, options=options)
        attempt.seconds["commit"] = time.perf_counter() - start
        key = names.manifest_key(step)
        return manifest.unpack(self._store.read(key), name=key).structure_changed

    def _drop_receipts(self, step: int, attempt: str) -> None:
        """The checkpoint is published; its receipts are only clutter, and gc removes what cannot be removed now."""
        prefix = names.receipts_prefix(step, attempt)
        try:
            self._store.delete([entry.key for entry in self._store.list(prefix)])
        except CheckpointError as error:
            _log.warning("receipts of step %d are left in %s: %s", step, self._store.url, error.message)

    def _report(self, step: int, attempt: str, error: BaseException) -> None:
        """Tell the other ranks. A store that cannot take even that leaves them to their deadline."""
        if getattr(error, "kind", "") == "outcome-unknown":
            return  # it may be published: nobody may call it aborted
        rank, size = self._world.rank, self._world.size
        try:
            if rank == 0:
                reason = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                publishing.abort(self._store, step, attempt, reason)
            else:
                receipts_of.leave_failure(self._store, step, attempt, rank, size, error)
        except CheckpointError as problem:
            error.add_note(f"the other ranks could not be told: {problem.message}")

    @contextlib.contextmanager
    def _telling_others(self, step: int) -> Iterator[None]:
        """When the block fails, so does the save: the other ranks are told through the store, and all agree anew."""
        try:
            yield
        except BaseException as error:
            self._planned = None
            if isinstance(error, Exception):
                self._report(step, self._attempt_id, error)
            raise

    @property
    def _attempt_id(self) -> str:
        """Shared by all ranks without a word: the session's id and the number of the save in it."""
        return f"{self._session}-{self._count:06d}"


def _piece_keys(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N] one key per box of a tensor of this dtype and shape: the corners alone also fit a tensor of another shape."""
    return mix(box_keys(records) ^ mix(records["size"]))


def allocate(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory, every page touched once (a first touch costs ten times a reuse)."""
    buffer = np.frombuffer(mmap.mmap(-1, max(nbytes, mmap.PAGESIZE)), np.uint8)
    buffer[:: mmap.PAGESIZE] = 0
    return buffer


def _described(specs: list[TensorSpec], differing: list[str]) -> str:
    text = " ".join(differing)
    found = [f"`{s.name}` {s.dtype} {list(s.shape)} {s.role}" for s in specs if f"`{s.name}`" in text]
    return ", ".join(found[:20]) or "none of them"
