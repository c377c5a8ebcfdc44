"""How a save ends: this rank's receipt, the checkpoint's manifest, and the word to the other ranks when it fails.

In: attempts whose image is durable. Out: published checkpoints, or the reason why not, told to every rank through the store.
Rank 0 publishes; the others wait for it. Never a collective call. The order is that of DESIGN 5.5; commit/ holds each step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import ckpt.commit.publish as publishing
import ckpt.commit.receipts as receipts_of
from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.config import Options
from ckpt.engine.attempt import Attempt, Request
from ckpt.engine.world import World
from ckpt.errors import CheckpointError, SaveFailedError
from ckpt.format import manifest, receipt
from ckpt.state.memory import collector_paused
from ckpt.store.base import Store

PROGRAM = "ckpt 0.1.0"
_log = logging.getLogger("ckpt")


class Outcomes:
    """What becomes of one rank's saves. Owned by whoever finishes them, but for `give_up`, `told` and `published_change`."""

    def __init__(self, store: Store, world: World, options: Options) -> None:
        self._store, self._world, self._options = store, world, options
        self._assembler = Assembler(PROGRAM)
        self._deciding = threading.Lock()
        self._sent: str | None = None  # structure whose image table the committer has

    def settle(self, attempt: Attempt, file_name: str) -> bool:
        """Leave the receipt of a durable image, and return when the checkpoint is published. Whether a structure changed."""
        with collector_paused():
            payload = receipt.pack(self._receipt(attempt, file_name))
        step, rank, size = attempt.request.step, self._world.rank, self._world.size
        receipts_of.leave_receipt(self._store, step, attempt.id, rank, size, payload)  # 2.
        changed = self._commit(attempt) if rank == 0 else self._await(attempt)  # 3. index durable, 4. manifest created
        self._sent = attempt.structure
        return changed

    def forget(self) -> None:
        """A save failed: the committer may have its table by now, and no longer the one before."""
        self._sent = None

    def give_up(self, attempt: Attempt) -> bool:
        """Whether it can be given up: not once this rank publishes, for what others may have seen succeed stands. Any thread."""
        with self._deciding:
            attempt.abandoned = attempt.abandoned or not attempt.decided
            return attempt.abandoned

    def published_change(self, attempt: Attempt) -> bool | None:
        """Whether a structure changed with an attempt that is the checkpoint of its step after all; None when it is not known
        to be."""
        key = names.manifest_key(attempt.request.step)
        try:
            found = manifest.unpack(self._store.read(key), name=key)
        except CheckpointError:
            return None
        return found.structure_changed if found.attempt == attempt.id else None

    def report(self, step: int, attempt: str, error: BaseException) -> None:
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
    def telling_others(self, step: int, attempt_id: str) -> Iterator[None]:
        """When the block fails, so does the save: the other ranks are told through the store."""
        try:
            yield
        except Exception as error:
            self.report(step, attempt_id, error)
            raise

    def _receipt(self, attempt: Attempt, file_name: str) -> receipt.Receipt:
        thinned, is_new = attempt.thinned, self._sent != attempt.structure
        image = thinned.image if thinned is not None else attempt.image
        return receipt.Receipt(
            rank=self._world.rank,
            world=self._world.size,
            step=attempt.request.step,
            attempt=attempt.id,
            structure=attempt.structure,
            file=file_name,
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
