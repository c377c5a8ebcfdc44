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
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import ckpt.commit.publish as publishing
from ckpt import failpoints
from ckpt.collector import collector_paused
from ckpt.commit import names
from ckpt.commit.complete import Completion, Request
from ckpt.config import Options
from ckpt.engine.attempt import Attempt, Saved
from ckpt.engine.flush import Flusher
from ckpt.engine.incremental import Earlier, Whole
from ckpt.engine.keeper import Keeper
from ckpt.engine.planned import Planned, Planner
from ckpt.engine.worker import Worker
from ckpt.engine.world import World
from ckpt.errors import AgentError, AlreadyExistsError, CheckpointError, SaveFailedError
from ckpt.events import Timeline
from ckpt.format import receipt
from ckpt.format.checksum import sha256
from ckpt.format.image import padded_object
from ckpt.format.spec import LocalState
from ckpt.kernels import crc32c
from ckpt.snapshot.devices import DeviceCopies
from ckpt.snapshot.fence import NOTHING, Guarded
from ckpt.snapshot.images import Images
from ckpt.snapshot.pack import Packer, PackProgram, Sources, bind
from ckpt.snapshot.staging import Staging, changed_error
from ckpt.store.base import Store

_SILENT = ("agent-gone", "timeout", "bad-frame")  # errors of an agent that is dead, or as good as that
_log = logging.getLogger("ckpt")


class SaveSession:
    """All saves of one rank into one run. Made by all ranks together."""

    def __init__(self, store: Store, world: World, options: Options, keeper: Keeper | None = None) -> None:
        self._store, self._world, self._options, self._keeper = store, world, options, keeper
        self._planner = Planner(world, options.chunk_bytes, kept=keeper is not None)
        self._count = 0
        self.may_appear = False  # whether a step may be completed by an earlier start of this job
        self._sources: Sources | None = None
        self._images = Images(options.images_max)
        self._reserved_for = ""  # the session that the keeper has room for
        self._copier = Worker("ckpt-copy", options.copy_nice)
        # Of whoever finishes:
        self._completion = Completion(store, options, rank=world.rank, world=world.size)
        self._deciding = threading.Lock()
        self._sent: str | None = None  # structure whose image table the committer has
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
            if self._keeper is not None:
                self._keeper.reserve(nbytes, pinned=_on_device(local))
                self._reserved_for = self._planner.session
            else:
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
        *,
        to_store: bool = True,
    ) -> Attempt:
        """Begin to copy `local` into an image; then `finish`. All ranks call, with less than `images_max` saves on their way.

        Args:
            guarded: what fences guard; all else is copied before this returns.
            to_store: else only into the memory of agents; SaveFailedError (`skipped`) when none of that is free.
        """
        attempt = self._prepare(local, request, error, timeline or Timeline(), to_store=to_store)
        with self._telling_others(attempt):
            memory = self._take(attempt, pinned=_on_device(local))
            specs = (
                local.specs
            )  # `local` itself would be kept until the save is over, and the collector look at all of it
            attempt.staging = Staging(
                attempt.packer,
                memory,
                timeline=attempt.timeline,
                devices=DeviceCopies(local),
                name_of=lambda number: specs[number].name,
            )
            try:
                if self._options.check_fence:
                    attempt.expected = self._checksums_now(attempt, local)
                attempt.staging.begin(guarded, attempt.keep_alive)
            except BaseException as problem:
                self._put_back(attempt, problem)
                raise
            attempt.keep_alive = ()
            self._copier.submit(attempt.staging.run)
        return attempt

    def _take(self, attempt: Attempt, *, pinned: bool) -> NDArray[np.uint8]:
        """Memory for the image: the agent's where there is one, and it has some free."""
        step, nbytes = attempt.request.step, attempt.program.layout.total_bytes
        if self._keeper is not None and not attempt.request.incremental:
            memory = self._keeper.begin(step, attempt.id, nbytes)
            attempt.kept = memory is not None
            if memory is not None:
                return memory
        if not attempt.to_store:
            raise SaveFailedError(
                f"step {step} was not kept in memory: the step before is not protected, or the agent does not answer",
                kind="skipped",
            )
        return self._images.take(nbytes, pinned=pinned)

    @contextlib.contextmanager
    def _telling_others(self, attempt: Attempt) -> Iterator[None]:
        """As Completion.telling_others; of what is not for the store, the store hears nothing."""
        with self._completion.telling_others(attempt.request.step, attempt.id) if attempt.to_store else _nothing():
            yield

    def finish(self, attempt: Attempt) -> Saved:
        """Write, leave the receipt and wait for the outcome. No collective call. The steps are those of DESIGN 5.5."""
        return self._finish_kept(attempt) if attempt.kept else self._finish_here(attempt)

    def _finish_kept(self, attempt: Attempt) -> Saved:
        """Hand the image over to the agent, which protects and stores it; and hear what became of it."""
        timeline, nbytes = attempt.timeline, attempt.program.layout.total_bytes
        assert self._keeper is not None and attempt.staging is not None
        changed: bool | None = None
        try:
            with self._telling_others(attempt):
                for chunk in range(attempt.program.num_chunks):
                    attempt.staging.wait_for(chunk)
                self._refuse_changed(attempt)
                try:
                    changed = self._hand_over(attempt, self._keeper, attempt.staging.memory)
                except AgentError as error:
                    if (
                        not attempt.to_store
                        or error.kind not in _SILENT
                        or not self._keeper.take_back(attempt.staging.memory)
                    ):
                        raise
                    attempt.sealed = False
                    _log.warning("step %d is stored without its agent: %s", attempt.request.step, error.message)
        except BaseException as error:
            self._put_back(attempt, error)
            raise
        if changed is None:
            return self._finish_here(attempt, after_agent=True)
        self._put_back(attempt, None)
        timeline.add("total", timeline.start, time.perf_counter(), nbytes=nbytes)
        return Saved(
            step=attempt.request.step,
            attempt=attempt.id,
            nbytes=nbytes,
            seconds=timeline.seconds(),
            structure_changed=changed and attempt.to_store,
            tier="store" if attempt.to_store else "memory",
        )

    def _hand_over(self, attempt: Attempt, keeper: Keeper, memory: NDArray[np.uint8]) -> bool:
        """Whether a structure changed, once the image is stored, or protected if it is not for the store."""
        step, timeline, options = attempt.request.step, attempt.timeline, self._options
        nbytes = attempt.program.layout.total_bytes
        with timeline.phase("seal", nbytes=nbytes):
            payload = receipt.pack(self._receipt(attempt, whole=True))
            keeper.seal(
                memory,
                image_bytes=nbytes,
                receipt=payload,
                request=attempt.request,
                changed=attempt.changed,
                checksums=attempt.packer.checksums_between,
            )
        attempt.sealed = True
        if not attempt.to_store:
            with timeline.phase("protect", nbytes=nbytes):
                return keeper.protected(step, attempt.id, options.protect_timeout_s)
        with timeline.phase("write", nbytes=nbytes):
            keeper.flush(memory)
            return keeper.stored(step, attempt.id, options.commit_timeout_s + options.outcome_grace_s)

    def _finish_here(self, attempt: Attempt, *, after_agent: bool = False) -> Saved:
        """
        Args:
            after_agent: an agent that is dead by now was at it, and may have done some of this, or all.
        """
        step, timeline = attempt.request.step, attempt.timeline
        try:
            with self._completion.telling_others(step, attempt.id):
                if attempt.request.incremental:
                    self._thin(attempt)
                nbytes = attempt.written.layout.total_bytes
                failpoints.hit("save.before-image")
                changed = self._completion.published_change(step, attempt.id) if after_agent else None
                if changed is None:
                    with timeline.phase("write", nbytes=nbytes):
                        direct = self._write_image(attempt, after_agent=after_agent)  # 1. this rank's image is durable
                    self._refuse_changed(attempt)
                    with collector_paused():
                        # The agent of rank 0 may commit: it has not what an earlier receipt of this process said.
                        payload = receipt.pack(self._receipt(attempt, whole=self._keeper is not None))
                    changed = self._completion.complete(  # 2. receipt, 3. index durable, 4. manifest
                        attempt.request, attempt.id, payload, timeline, lambda: self._decide(attempt)
                    )
                else:
                    direct = False
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
        """As `Completion.published_change`."""
        return self._completion.published_change(attempt.request.step, attempt.id)

    def is_stored(self, step: int) -> bool:
        """Whether a step is complete in the store, as far as that can be asked now."""
        try:
            return publishing.published_attempt(self._store, step) is not None
        except CheckpointError:
            return False

    def is_there(self, step: int) -> bool:
        """Whether the store has a manifest of a step, whatever is in it. A store that cannot be asked may have one."""
        try:
            return self._store.exists(names.manifest_key(step))
        except CheckpointError:
            return True

    def refer_to_nothing(self) -> None:
        """The next incremental save writes all: what lies in the store is not what was written. No save is on its way."""
        self._earlier.drop()

    def abandon(self, attempt: Attempt, error: CheckpointError) -> None:
        """Give up an attempt that another thread is finishing: stop its copies and tell the other ranks. Any thread.

        Nothing is done once this rank is publishing: what others may have seen succeed must not be taken back.
        """
        with self._deciding:
            if attempt.decided or attempt.sealed:  # published, or the agent's to publish
                return
            attempt.abandoned = True
        self._flusher.stop(error)
        staging = attempt.staging
        if staging is not None:
            staging.give_up(error)
        self._completion.report(attempt.request.step, attempt.id, error)

    def _decide(self, attempt: Attempt) -> None:
        """From here on the attempt may be published: it cannot be given up any more."""
        with self._deciding:
            if attempt.abandoned:
                raise SaveFailedError(f"step {attempt.request.step} was given up", kind="abandoned")
            attempt.decided = True

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
            staging.give_up(error or AssertionError("not all of the image was copied"))
            if attempt.kept and self._keeper is not None:
                self._keeper.release(staging.memory, sealed=attempt.sealed)
            else:
                self._images.give_back(staging.memory)

    # planning

    @collector_paused()
    def _prepare(
        self,
        local: LocalState,
        request: Request,
        error: BaseException | None,
        timeline: Timeline,
        *,
        to_store: bool = True,
    ) -> Attempt:
        with timeline.phase("plan"):
            session = self._planner.session
            planned, changed = self._planner.plan(local, step=request.step, target=self._store.url, error=error)
            if session != self._planner.session:
                self._count = 0
            self._reserve_again(local, planned)
            self._count += 1  # on every rank alike, whatever happens next
            attempt_id = f"{self._planner.session}-{self._count:06d}"  # shared by all ranks without a word
            if not to_store:
                if error is not None:
                    raise error
                attempt = self._attempt(local, request, planned, changed, attempt_id, timeline)
                attempt.to_store = False
                return attempt
            try:
                publishing.refuse_existing(self._store, request.step)
            except AlreadyExistsError as problem:
                if self.may_appear:
                    self._completion.report(request.step, attempt_id, problem)  # perhaps this rank alone sees it yet
                raise  # else every rank sees it, and nothing is to be touched
            except CheckpointError as problem:
                error = error or problem  # perhaps of this rank's way to the store alone
            with self._completion.telling_others(request.step, attempt_id):
                if error is not None:
                    raise error
                return self._attempt(local, request, planned, changed, attempt_id, timeline)

    def _reserve_again(self, local: LocalState, planned: Planned) -> None:
        """Room in the agents' memory, where nobody called `prepare` or all ranks have planned anew. All ranks call."""
        if self._keeper is None or self._reserved_for == self._planner.session:
            return
        payloads = [padded_object(obj.payload) for obj in local.objects]
        program = self._planner.program(local, planned, payloads)
        self._keeper.reserve(program.layout.total_bytes, pinned=_on_device(local))
        self._reserved_for = self._planner.session

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

    def _write_image(self, attempt: Attempt, *, after_agent: bool) -> bool:
        """Returns whether the page cache was left out."""
        step, rank, world = attempt.request.step, self._world.rank, self._world.size
        key = f"{names.attempt_folder(step, attempt.id)}/{self._file_name}"
        if after_agent:
            if self._store.exists(names.receipt_key(step, attempt.id, rank, world)):
                return False  # it is durable
            self._store.delete([key])  # a part of it, perhaps: nobody else writes there
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

    def _receipt(self, attempt: Attempt, *, whole: bool = False) -> receipt.Receipt:
        thinned, is_new = attempt.thinned, whole or self._sent != attempt.structure
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


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _on_device(local: LocalState) -> bool:
    return local.on_device is not None and bool(local.on_device.any())
