"""How a save ends: one rank's receipt, the checkpoint's manifest, and the word to the other ranks when it fails.

In: the packed receipt of an image that is durable. Out: a published checkpoint, or the reason why not, told to every rank
through the store. Rank 0 publishes, the others wait. No collective call, no torch: a trainer's thread or its agent runs it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ckpt.commit.publish as publishing
import ckpt.commit.receipts as receipts_of
from ckpt import failpoints
from ckpt.collector import collector_paused
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.commit.waiting import SYSTEM_CLOCK, Clock
from ckpt.config import Options
from ckpt.errors import CheckpointError, first_line
from ckpt.events import Timeline
from ckpt.format import manifest, receipt
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
    incremental: bool = False  # refer to what an earlier checkpoint holds already


class Completion:
    """What becomes of one rank's saves into one store. One owner; `report` and `published_change` any thread."""

    def __init__(self, store: Store, options: Options, *, rank: int, world: int, clock: Clock = SYSTEM_CLOCK) -> None:
        """
        Args:
            clock: of the waits for other ranks; what its `sleep` raises ends them.
        """
        self._store, self._options, self._rank, self._world, self._clock = store, options, rank, world, clock
        self._assembler = Assembler(PROGRAM)

    def complete(
        self, request: Request, attempt: str, payload: bytes, timeline: Timeline, decide: Callable[[], None]
    ) -> bool:
        """Steps 2 to 7 (ckpt/commit/publish.py), when 1 is done. Returns whether a structure changed.

        Args:
            payload: the rank's packed receipt.
            decide: called on rank 0 just before the manifest is made; what it raises keeps it from being made.
        """
        receipts_of.leave_receipt(self._store, request.step, attempt, self._rank, self._world, payload)
        if self._rank == 0:
            return self._commit(request, attempt, timeline, decide)
        return self.outcome(request.step, attempt, timeline)

    def published_change(self, step: int, attempt: str) -> bool | None:
        """Whether a structure changed with an attempt that is the checkpoint of its step after all; None when it is not known
        to be."""
        key = names.manifest_key(step)
        try:
            found = manifest.unpack(self._store.read(key), name=key)
        except CheckpointError:
            return None
        return found.structure_changed if found.attempt == attempt else None

    def report(self, step: int, attempt: str, error: BaseException) -> None:
        """Tell the other ranks. A store that cannot take even that leaves them to their deadline."""
        if getattr(error, "kind", "") in ("outcome-unknown", "left"):
            return  # it may be published, or will be by the agent: nobody may call it aborted
        try:
            if self._rank == 0:
                publishing.abort(self._store, step, attempt, first_line(error))
            else:
                receipts_of.leave_failure(self._store, step, attempt, self._rank, self._world, error)
        except CheckpointError as problem:
            error.add_note(f"the other ranks could not be told: {problem.message}")

    @contextlib.contextmanager
    def telling_others(self, step: int, attempt: str) -> Iterator[None]:
        """When the block fails, so does the save: the other ranks are told through the store."""
        try:
            yield
        except Exception as error:
            self.report(step, attempt, error)
            raise

    def _commit(self, request: Request, attempt: str, timeline: Timeline, decide: Callable[[], None]) -> bool:
        """Rank 0: wait for all receipts, write the index, publish."""
        with timeline.phase("receipts"):
            payloads = receipts_of.collect_receipts(
                self._store,
                request.step,
                attempt,
                self._world,
                timeout_s=self._options.commit_timeout_s,
                options=self._options,
                clock=self._clock,
            )
        with timeline.phase("commit"):
            return self._publish(request, attempt, payloads, decide)

    def _publish(self, request: Request, attempt: str, payloads: dict[int, bytes], decide: Callable[[], None]) -> bool:
        step = request.step
        with collector_paused():
            found = [receipt.unpack(payloads[rank], name=f"rank {rank}") for rank in range(self._world)]
            assembled = self._assembler.assemble(
                found, metadata=request.metadata, metrics=request.metrics, layout=request.layout
            )
        for name, data in assembled.files.items():
            failpoints.hit("save.before-index")
            self._store.put(f"{names.attempt_folder(step, attempt)}/{name}", data)
        decide()
        publishing.publish(self._store, step, attempt, manifest.pack(assembled.manifest), options=self._options)
        self._drop_receipts(step, attempt)
        return assembled.manifest.structure_changed

    def outcome(self, step: int, attempt: str, timeline: Timeline) -> bool:
        """Step 7, on any rank but 0: wait until the attempt is published. Whether a structure changed."""
        timeout_s = self._options.commit_timeout_s + self._options.outcome_grace_s
        with timeline.phase("commit"):
            publishing.await_outcome(
                self._store, step, attempt, timeout_s=timeout_s, options=self._options, clock=self._clock
            )
        key = names.manifest_key(step)
        return manifest.unpack(self._store.read(key), name=key).structure_changed

    def _drop_receipts(self, step: int, attempt: str) -> None:
        """The checkpoint is published; its receipts are only clutter, and gc removes what cannot be removed now."""
        prefix = names.receipts_prefix(step, attempt)
        try:
            self._store.delete([entry.key for entry in self._store.list(prefix)])
        except CheckpointError as error:
            _log.warning("receipts of step %d are left in %s: %s", step, self._store.url, error.message)
