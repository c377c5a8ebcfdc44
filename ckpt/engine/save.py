"""Save one rank's part of a checkpoint, and commit it when all ranks have.

In: a `LocalState` and a store. Out: a published checkpoint, or an error on every rank. `SaveSession` keeps plan, image layout
and buffers between steps, so that a step of the same structure makes no collective call. `prepare`, `stage` and `save` run on
the training thread; `finish` may run on another one, for one attempt after the other, and never calls a collective.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
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
from ckpt.engine.flush import Flusher
from ckpt.engine.incremental import Earlier, Thinned, Whole
from ckpt.engine.planned import Planned, Planner
from ckpt.engine.world import World
from ckpt.errors import AlreadyExistsError, CheckpointError, SaveFailedError
from ckpt.events import Timeline
from ckpt.format import manifest, receipt
from ckpt.format.checksum import sha256
from ckpt.format.image import padded_object
from ckpt.format.spec import LocalState
from ckpt.kernels import crc32c
from ckpt.snapshot.devices import DeviceCopies
from ckpt.snapshot.fence import NOTHING, Guarded
from ckpt.snapshot.images import Images
from ckpt.snapshot.pack import Packer, PackProgram, Sources, bind
from ckpt.snapshot.staging import Copier, Staging, changed_error
from ckpt.state.memory import collector_paused
from ckpt.store.base import Store

PROGRAM = "ckpt 0.1.0"
# A fence that held longer than this makes later saves copy before they sum: 18 instead of 10 CPU ms per 100 MB, but sooner.
_HURRY_S = 0.005
_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What goes with the state of one save. Equal on all ranks; rank 0's is stored."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] | None = None
    incremental: bool = False  # refer to what an earlier checkpoint holds already


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one rank's save did."""

    step: int
    attempt: str
    nbytes: int  # of this rank's image, as written
    seconds: dict[str, float]  # by phase (ckpt/events.py)
    direct: bool = False  # whether the image was written around the page cache
    structure_changed: bool = False  # on some rank, since the ranks planned together


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
    timeline: Timeline
    staging: Staging | None = None
    expected: NDArray[np.uint32] | None = None  # checksums of the state as it was in the call
    keep_alive: tuple[object, ...] = ()
    decided: bool = False  # this rank has begun to publish it
    abandoned: bool = False
    thinned: Thinned | None = None  # what an incremental save writes instead of the whole image

    @property
    def written(self) -> PackProgram:
        """The image as it is in the store."""
        return self.thinned.program if self.thinned is not None else self.program

    @property
    def structure(self) -> str:
        """Equal for attempts of equal image tables."""
        return self.image_digest + (f"-{self.thinned.key}" if self.thinned is not None else "")


class SaveSession:
    """All saves of one rank into one run. Made by all ranks together."""

    def __init__(self, store: Store, world: World, options: Options) -> None:
        self._store, self._world, self._options = store, world, options
        self._planner = Planner(world, options.chunk_bytes)
        self._count = 0
        self._sources: Sources | None = None
        self._images = Images(options.images_max)
        self._hurry = False  # a fence has held the training
        self._copier = Copier(options.copy_nice)
        # Of whoever finishes:
        self._deciding = threading.Lock()
        self._sent: str | None = None  # structure whose image table the committer has
        self._assembler = Assembler(PROGRAM)
        self._flusher = Flusher(store, options)
        self._earlier = Earlier(store, options)

    def plan_again(self) -> None:
        """Plan with the other ranks at the next save. All ranks call, before the same save."""
        self._planner.forget()

    def prepare(self, local: LocalState, error: BaseException | None = None, *, background: bool = True) -> None:
        """Plan, and take and touch memory, so that the first save is as fast as later ones. All ranks call.

        Args:
            background: memory for an image; else for the few buffers of a save that blocks.
        """
        planned, _ = self._planner.plan(local, step=-1, target=self._store.url, error=error, ahead=True)
        if error is not None:
            raise error
        payloads = [padded_object(obj.payload) for obj in local.objects]
        program = self._planner.program(local, planned, payloads)
        self._sources = bind(program, local.pieces, local.storage_of_piece, self._sources)
        if background:
            nbytes = program.layout.total_bytes
            self._images.give_back(self._images.take(nbytes, pinned=_on_device(local), touched=True))
            self._copier.start()
        self._flusher.prepare(0 if background else program.num_chunks)

    def save(
        self, local: LocalState, request: Request, error: BaseException | None = None, timeline: Timeline | None = None
    ) -> Saved:
        """Store `local` and return when the checkpoint is durable. All ranks call, with no save on its way.

        Args:
            error: why this rank has no state to save; then no rank saves and every rank raises.
        """
        try:
            if request.incremental:  # what is unchanged is known when all of the image is there
                attempt = self.stage(local, request, error, timeline)
            else:
                attempt = self._prepare(local, request, error, timeline or Timeline())
            saved = self.finish(attempt)
        except BaseException:
            self.plan_again()  # every rank failed with this one, and all must agree anew
            raise
        if saved.structure_changed:
            self.plan_again()
        return saved

    def stage(
        self,
        local: LocalState,
        request: Request,
        error: BaseException | None = None,
        timeline: Timeline | None = None,
        guarded: Guarded = NOTHING,
    ) -> Attempt:
        """Begin to copy `local` into an image; then `finish`. All ranks call, with less than `images_max` saves on their way.

        Args:
            guarded: what fences guard; all else is copied before this returns.
        """
        attempt = self._prepare(local, request, error, timeline or Timeline())
        with self._telling_others(request.step, attempt.id):
            pinned = _on_device(local)
            memory = self._images.take(attempt.program.layout.total_bytes, pinned=pinned)
            attempt.staging = Staging(
                attempt.packer,
                memory,
                timeline=attempt.timeline,
                devices=DeviceCopies(local),
                name_of=lambda number: local.specs[number].name,
                hurry=self._hurry,
            )
            try:
                if self._options.check_fence:
                    attempt.expected = self._checksums_now(attempt, local)
                attempt.staging.begin(guarded, attempt.keep_alive)
            except BaseException as problem:
                self._put_back(attempt, problem)
                raise
            attempt.keep_alive = ()
            self._copier.submit(attempt.staging)
        return attempt

    def finish(self, attempt: Attempt) -> Saved:
        """Write, leave the receipt and wait for the outcome. No collective call. The steps are those of DESIGN 5.5."""
        step, timeline = attempt.request.step, attempt.timeline
        try:
            with self._telling_others(step, attempt.id):
                if attempt.request.incremental:
                    self._thin(attempt)
                nbytes = attempt.written.layout.total_bytes
                failpoints.hit("save.before-image")
                with timeline.phase("write", nbytes=nbytes):
                    direct = self._write_image(attempt)  # 1. this rank's image is durable
                self._refuse_changed(attempt)
                with collector_paused():
                    payload = receipt.pack(self._receipt(attempt))
                receipts_of.leave_receipt(
                    self._store, step, attempt.id, self._world.rank, self._world.size, payload
                )  # 2.
                if self._world.rank == 0:
                    changed = self._commit(attempt)  # 3. index durable, 4. manifest created
                else:
                    changed = self._await(attempt)
        except BaseException as error:
            self._earlier.drop()
            self._sent = None  # the committer may have the table of this attempt by now, and no longer the one before
            self._put_back(attempt, error)
            raise
        if attempt.thinned is not None:
            self._earlier.keep(step, attempt.id, self._file_name, self._whole(attempt), attempt.thinned)
        self._put_back(attempt, None)
        self._sent = attempt.structure
        timeline.add("total", timeline.start, time.perf_counter(), nbytes=nbytes, direct=direct)
        return Saved(
            step=step,
            attempt=attempt.id,
            nbytes=nbytes,
            seconds=timeline.seconds(),
            direct=direct,
            structure_changed=changed,
        )

    def published_change(self, attempt: Attempt) -> bool | None:
        """Whether a structure changed with an attempt that is the checkpoint of its step after all; None when it is not known
        to be."""
        key = names.manifest_key(attempt.request.step)
        try:
            found = manifest.unpack(self._store.read(key), name=key)
        except CheckpointError:
            return None
        return found.structure_changed if found.attempt == attempt.id else None

    def abandon(self, attempt: Attempt, error: CheckpointError) -> None:
        """Give up an attempt that another thread is finishing: stop its copies and tell the other ranks. Any thread.

        Nothing is done once this rank is publishing: what others may have seen succeed must not be taken back.
        """
        with self._deciding:
            if attempt.decided:
                return
            attempt.abandoned = True
        self._flusher.stop(error)
        staging = attempt.staging
        if staging is not None:
            staging.give_up(error)
        self._report(attempt.request.step, attempt.id, error)

    def close(self) -> None:
        """Stop the copying thread and let go of the images. No save is on its way. May be called twice."""
        self._copier.close()
        self._images.close()
        self._flusher.close()

    def _put_back(self, attempt: Attempt, error: BaseException | None) -> None:
        """The image is free for another step."""
        staging, attempt.staging = attempt.staging, None
        attempt.keep_alive = ()
        if staging is not None:
            self._hurry |= staging.fence_s > _HURRY_S
            staging.give_up(error or AssertionError("not all of the image was copied"))
            self._images.give_back(staging.memory)

    # planning

    @collector_paused()
    def _prepare(self, local: LocalState, request: Request, error: BaseException | None, timeline: Timeline) -> Attempt:
        with timeline.phase("plan"):
            session = self._planner.session
            planned, changed = self._planner.plan(local, step=request.step, target=self._store.url, error=error)
            if session != self._planner.session:
                self._count = 0
            self._count += 1  # on every rank alike, whatever happens next
            attempt_id = f"{self._planner.session}-{self._count:06d}"  # shared by all ranks without a word
            try:
                publishing.refuse_existing(self._store, request.step)
            except AlreadyExistsError:
                raise  # every rank sees it, and nothing is to be touched
            except CheckpointError as problem:
                error = error or problem  # perhaps of this rank's way to the store alone
            with self._telling_others(request.step, attempt_id):
                if error is not None:
                    raise error
                return self._attempt(local, request, planned, changed, attempt_id, timeline)

    def _attempt(
        self,
        local: LocalState,
        request: Request,
        planned: Planned,
        changed: bool,
        attempt_id: str,
        timeline: Timeline,
    ) -> Attempt:
        payloads = [padded_object(obj.payload) for obj in local.objects]
        program = self._planner.program(local, planned, payloads)
        layout = program.layout
        image = receipt.ImageTable(
            specs=local.specs,
            rows=layout.rows,
            offsets=layout.offsets,
            nbytes=layout.nbytes,
            header_bytes=len(layout.header),
            header_crc32c=crc32c(layout.header),
        )
        self._sources = bind(program, local.pieces, local.storage_of_piece, self._sources)
        return Attempt(
            request=request,
            id=attempt_id,
            packer=Packer(self._sources, payloads, threads=self._options.copy_threads),
            program=program,
            image_digest=f"{planned.structure}-{image.header_crc32c:08x}-{len(layout.rows)}",
            image=image,
            objects=self._object_rows(local, payloads, program),
            block_bytes=planned.block_bytes,
            layout_digest=planned.layout_digest,
            describe=local.describe,
            changed=changed,
            timeline=timeline,
            keep_alive=local.keep_alive,
        )

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

    # a state that nobody may change

    def _checksums_now(self, attempt: Attempt, local: LocalState) -> NDArray[np.uint32]:
        """Checksums of the state at this moment, by a copy that the training waits for."""
        now = Packer(attempt.packer.sources, [b""] * len(attempt.program.layout.object_offsets), threads=1)
        scratch, devices = np.empty(attempt.program.layout.total_bytes, np.uint8), DeviceCopies(local)
        on_device = devices.start(now, scratch, np.zeros(len(attempt.program.piece), bool))
        now.copy_parts(np.flatnonzero(~on_device), scratch, 0)
        for chunk in range(attempt.program.num_chunks):
            devices.wait_for(chunk)
            low, high = attempt.program.chunk_range(chunk)
            now.checksum(chunk, scratch[low:high])
        return now.checksums

    def _refuse_changed(self, attempt: Attempt) -> None:
        """With `check_fence`: what was copied is what was there in the call."""
        if attempt.expected is None:
            return
        wrong = np.flatnonzero(attempt.expected != attempt.packer.checksums)
        if len(wrong):
            found = sorted({attempt.image.specs[attempt.packer.tensor_of_block(int(b))].name for b in wrong})
            raise changed_error(found)

    # writing

    def _write_image(self, attempt: Attempt) -> bool:
        """Returns whether the page cache was left out."""
        key = f"{names.attempt_folder(attempt.request.step, attempt.id)}/{self._file_name}"
        if attempt.thinned is not None and attempt.thinned.packer is not None:
            return self._flusher.write(key, attempt.thinned.program, attempt.thinned.packer, None)
        return self._flusher.write(key, attempt.program, attempt.packer, attempt.staging)

    def _thin(self, attempt: Attempt) -> None:
        """Wait for all of the image, and find what of it an earlier checkpoint holds."""
        assert attempt.staging is not None
        for chunk in range(attempt.program.num_chunks):
            attempt.staging.wait_for(chunk)
        with attempt.timeline.phase("digest", nbytes=attempt.program.layout.total_bytes):
            attempt.thinned = self._earlier.thin(self._whole(attempt))

    def _whole(self, attempt: Attempt) -> Whole:
        assert attempt.staging is not None
        return Whole(
            memory=attempt.staging.memory,
            program=attempt.program,
            specs=attempt.image.specs,
            checksums=attempt.packer.checksums,
            block_bytes=attempt.block_bytes,
            objects=attempt.objects,
        )

    @property
    def _file_name(self) -> str:
        return names.image_name(self._world.rank, self._world.size)

    def _receipt(self, attempt: Attempt) -> receipt.Receipt:
        thinned, is_new = attempt.thinned, self._sent != attempt.structure
        image = thinned.image if thinned is not None else attempt.image
        return receipt.Receipt(
            rank=self._world.rank,
            world=self._world.size,
            step=attempt.request.step,
            attempt=attempt.id,
            structure=attempt.structure,
            file=self._file_name,
            file_bytes=attempt.written.layout.total_bytes,
            block_bytes=attempt.block_bytes,
            checksums=attempt.packer.checksums,
            objects=thinned.objects if thinned is not None else attempt.objects,
            image=image if is_new else None,
            digests=thinned.digests if thinned is not None else None,
            extra={
                "structure_changed": attempt.changed,
                "layout": attempt.layout_digest,
                "tensors": attempt.describe() if is_new else None,
            },
        )

    # the outcome

    def _commit(self, attempt: Attempt) -> bool:
        """Rank 0: wait for all receipts, write the index, publish. Returns whether a structure changed."""
        step, request = attempt.request.step, attempt.request
        with attempt.timeline.phase("receipts"):
            payloads = receipts_of.collect_receipts(
                self._store,
                step,
                attempt.id,
                self._world.size,
                timeout_s=self._options.commit_timeout_s,
                options=self._options,
            )
        with attempt.timeline.phase("commit"):
            return self._publish(attempt, request, payloads)

    def _publish(self, attempt: Attempt, request: Request, payloads: dict[int, bytes]) -> bool:
        step = request.step
        with collector_paused():
            found = [receipt.unpack(payloads[rank], name=f"rank {rank}") for rank in range(self._world.size)]
            assembled = self._assembler.assemble(
                found, metadata=request.metadata, metrics=request.metrics, layout=request.layout
            )
        for name, data in assembled.files.items():
            failpoints.hit("save.before-index")
            self._store.put(f"{names.attempt_folder(step, attempt.id)}/{name}", data)
        with self._deciding:
            if attempt.abandoned:
                raise SaveFailedError(f"step {step} was given up", kind="abandoned")
            attempt.decided = True
        publishing.publish(self._store, step, attempt.id, manifest.pack(assembled.manifest), options=self._options)
        self._drop_receipts(step, attempt.id)
        return assembled.manifest.structure_changed

    def _await(self, attempt: Attempt) -> bool:
        step, options = attempt.request.step, self._options
        timeout_s = options.commit_timeout_s + options.outcome_grace_s
        with attempt.timeline.phase("commit"):
            publishing.await_outcome(self._store, step, attempt.id, timeout_s=timeout_s, options=options)
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
    def _telling_others(self, step: int, attempt_id: str) -> Iterator[None]:
        """When the block fails, so does the save: the other ranks are told through the store."""
        try:
            yield
        except Exception as error:
            self._report(step, attempt_id, error)
            raise


def _on_device(local: LocalState) -> bool:
    return local.on_device is not None and bool(local.on_device.any())
