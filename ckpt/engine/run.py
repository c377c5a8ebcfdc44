"""One run, as one rank uses it: saves that block, saves in the background, and what becomes of them.

In: the user's state, step by step. Out: checkpoints, `PendingSave`s, events. `Run` is called from the thread that trains; the
background thread only finishes what was begun, and never calls a collective.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from ckpt import config
from ckpt.collector import collector_paused
from ckpt.commit import find, pins, retention
from ckpt.commit.complete import Request
from ckpt.commit.gc import collect_garbage
from ckpt.config import Memory, Options
from ckpt.engine import opening
from ckpt.engine.attempt import Attempt, Saved
from ckpt.engine.keeper import Follower, Keeper, OwnImage
from ckpt.engine.load import Loaded, Rename, load_state
from ckpt.engine.near import load_near
from ckpt.engine.pace import Pace
from ckpt.engine.pending import PendingSave, failed_error
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.save import SaveSession
from ckpt.engine.torch_world import current_world
from ckpt.engine.worker import Worker
from ckpt.engine.world import World
from ckpt.errors import (
    AlreadyExistsError,
    CheckpointError,
    SaveFailedError,
    first_line,
)
from ckpt.events import Events, Operation, Outcome, Sink, Timeline
from ckpt.format.spec import LocalState
from ckpt.layout.layout import Layout
from ckpt.snapshot import fence
from ckpt.state import Collector
from ckpt.store.base import Store
from ckpt.store.open import open_store

_ABANDON_S = 5.0  # a save that is given up has so long to notice
_EVENTS_S = 5.0  # the last events have so long to be told when a run is closed
_log = logging.getLogger("ckpt")

State = Mapping[str, Any]
Url = str | os.PathLike[str]


class MakeKeeper(Protocol):
    """Finds or starts what keeps images of this rank. All ranks call together."""

    def __call__(self, url: str, world: World, options: Options) -> Keeper: ...


class MakeSinks(Protocol):
    """Makes the sinks of a run's events."""

    def __call__(self, store: Store, options: Options, *, rank: int, world: int) -> Sequence[Sink]: ...


class Run:
    """One run folder, as one rank of one process group uses it: store, world and save session.

    Made by all ranks of the group together. Owned by the training thread. At most `images_max` saves are on their way. What
    became of one is acted upon (planning anew after a failure or a changed structure) at the same later call on every rank,
    so that ranks that learn of it at different times never disagree on who talks to whom.
    """

    def __init__(
        self,
        url: Url,
        *,
        group: dist.ProcessGroup | None = None,
        options: Options | None = None,
        storage_options: Mapping[str, Any] | None = None,
        keep_last: int | None = None,
        sinks: MakeSinks | None = None,
        keeper: MakeKeeper | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.options = config.from_environment(options)
        self._keep_last, self._follower = keep_last, follower
        self.store: Store = open_store(url, options=self.options, storage_options=storage_options)
        self.world: World = current_world(group, self.options.exchange_timeout_s)
        rank, world = self.world.rank, self.world.size
        self.events = Events(sinks(self.store, self.options, rank=rank, world=world) if sinks else ())
        self.keeper = None if keeper is None else keeper(os.fspath(url), self.world, self.options)
        self._session = SaveSession(self.store, self.world, self.options, self.keeper)
        self._collector = Collector()
        self._background = Worker("ckpt-save", self.options.flush_nice)
        self._keeping = Worker("ckpt-keep", self.options.flush_nice)
        self._in_memory: deque[PendingSave] = deque()  # saves to the memory of agents alone
        self._pace: Pace | None = None
        self._was_busy = self._was_storing = False  # a snapshot, or a save, was on its way at the step before
        self._telling = Worker("ckpt-events", self.options.flush_nice)
        self._on_their_way: deque[tuple[PendingSave, Attempt | None]] = deque()
        self._failed: list[tuple[PendingSave, BaseException]] = []  # that nobody was told of yet
        self.skipped = 0  # saves, by the policy `when_busy`
        self.resumed = False  # the job goes on from what an earlier start of it has left; see `_is_kept`
        self._damaged: set[int] = set()  # steps in the store that the job went back behind; equal on all ranks
        LIVE.add(self)

    def prepare(self, state: State, layout: Layout | None, *, background: bool) -> None:
        """Plan, and make ready memory and threads, so that the first save costs what later ones do. All ranks call."""
        self._settle(0)
        local, error = self._collect(state, layout, Timeline(), stage_devices=False)
        self._session.prepare(local, error, background=background)
        self._background.start()

    def save(self, state: State, request: Request, layout: Layout | None) -> Saved:
        """Save and return when durable. All ranks call. An earlier failure is raised when this save is done."""
        self._settle(0)  # raises nothing: ranks hear of failures at different calls, and must all take part in this one
        failed = self._first_failure()
        timeline = Timeline()
        with self._told(timeline, request.step):
            local, error = self._collect(state, layout, timeline, stage_devices=True)
            saved = self._session.save(local, request, error, timeline)
            timeline.add("call", timeline.start, time.perf_counter())
        self._committed(saved.step)
        if failed is not None:
            raise failed
        return saved

    @collector_paused()
    def _begin(
        self, state: State, request: Request, layout: Layout | None, timeline: Timeline, *, to_store: bool = True
    ) -> Attempt:
        """Collect and stage. Without the cyclic collector, which would look at what is gone again on return."""
        local, error = self._collect(state, layout, timeline, stage_devices=False)
        return self._session.stage(local, request, error, timeline, fence.guarded(local), to_store=to_store)

    def async_save(self, state: State, request: Request, layout: Layout | None) -> PendingSave:
        """Begin to copy the state, return, go on in the background. All ranks call."""
        timeline = Timeline()
        self._was_storing = True
        if not self._make_room(request.step, timeline):
            return self._skip(request.step, timeline)
        failed = self._first_failure()
        try:
            attempt = self._begin(state, request, layout, timeline)
        except BaseException as problem:
            # The other ranks will find this save failed; it keeps its place, so that all act upon it at the same call.
            self._on_their_way.append((PendingSave.over(request.step, timeline, problem), None))
            self._on_their_way[-1][0].told = True
            if failed is None and isinstance(problem, AlreadyExistsError) and self._is_kept(request.step):
                return self._skip(request.step, timeline, f"step {request.step} is complete already")
            if failed is not None:
                problem.add_note(failed.message)
            raise
        future = self._background.submit(lambda: self._finish(attempt))
        pending = PendingSave(request.step, future, timeline, attempt.staging)
        self._on_their_way.append((pending, attempt))
        timeline.add("call", timeline.start, time.perf_counter())
        if failed is not None:
            raise failed
        return pending

    def snapshot_due(self, step: int, memory: Memory) -> bool:
        """Whether to snapshot into memory at this step. All ranks call, at every step."""
        if memory.every != "auto":
            return step % memory.every == 0
        if self._pace is None:
            self._pace = Pace(self.world, memory.cost_max)
        storing = bool(self._on_their_way) and not self._on_their_way[-1][0].done()
        self._pace.note(time.perf_counter(), busy=self._was_busy, excluded=storing or self._was_storing)
        self._was_storing = storing
        self._was_busy = bool(self._in_memory) and not self._in_memory[-1].done()
        due = self._pace.due(step)
        self._was_busy |= due
        return due

    def keep(self, state: State, request: Request, layout: Layout | None) -> PendingSave:
        """Snapshot into the memory of the agents alone. All ranks call.

        Skipped, on this rank or another, while the one before is not protected; then, and when protecting fails, the snapshot
        before stands, and events and log say so. Raises what is wrong with the state itself.
        """
        timeline = Timeline()
        while self._in_memory and self._in_memory[0].done():
            self._in_memory.popleft()
        try:
            attempt = self._begin(state, request, layout, timeline, to_store=False)
        except SaveFailedError as error:
            if error.kind != "skipped":
                raise
            return self._skip(request.step, timeline)
        pending = PendingSave(
            request.step, self._keeping.submit(lambda: self._finish_kept(attempt)), timeline, attempt.staging
        )
        self._in_memory.append(pending)
        timeline.add("call", timeline.start, time.perf_counter())
        return pending

    def _finish_kept(self, attempt: Attempt) -> Saved:
        try:
            with self._told(attempt.timeline, attempt.request.step, attempt.id):
                return self._session.finish(attempt)
        except Exception as error:
            _log.warning("the snapshot of step %d is not protected: %s", attempt.request.step, first_line(error))
            raise

    def resume(self) -> None:
        """The job goes on from here: what an earlier start of it may still complete is no mistake of this one's."""
        self.resumed = self._session.may_appear = True

    def go_back_behind(self, step: int) -> None:
        """The checkpoint of `step` in the store is damaged, and the job goes on from an older one. All ranks call."""
        self._damaged.add(step)
        self._session.refer_to_nothing()
        if self.world.rank == 0:
            place = f"{self.store.url}@{step}"
            _log.warning(
                "step %d in %s is damaged and is left as it is: `ckpt verify %s` lists the damage. Until it is forgotten "
                "(`ckpt forget %s`), a save that is due at step %d is made one step later",
                step, self.store.url, place, place, step,
            )  # fmt: skip

    def is_taken(self, step: int) -> bool:
        """Whether `step` cannot be saved, as the damaged checkpoint that this job went back behind has its number. All ranks
        call, with the same steps; only at one that was damaged does that cost an exchange."""
        if step not in self._damaged:
            return False
        if not self._anyone(self._session.is_there(step)):
            self._damaged.discard(step)  # somebody has forgotten it
            return False
        if self.world.rank == 0:
            _log.warning("step %d in %s is there, and damaged: the next step is saved instead", step, self.store.url)
        return True

    def skip_taken(self, step: int) -> PendingSave:
        """What a save of a step that is taken returns."""
        return self._skip(step, Timeline(), "a damaged checkpoint has its number; the next step is saved instead")

    @collector_paused()
    def load_from(
        self,
        stored: StoredCheckpoint,
        state: State,
        layout: Layout | None,
        *,
        strict: bool,
        rename: Rename,
        include: Sequence[str] | None = None,
        progress: Progress | None = None,
        timeline: Timeline | None = None,
    ) -> Loaded:
        """Fill `state` from a checkpoint that all ranks have opened. All ranks call.

        Without the cyclic collector: it took a third of the time of a load of 20,000 tensors, to find nothing.
        """
        fence.fence()  # a save to another run may still be copying what is filled here
        timeline = timeline or Timeline()
        with self._failed_load_told(timeline, stored.step):
            loaded = load_state(
                stored,
                state,
                self.world,
                layout=layout,
                strict=strict,
                rename=rename,
                include=include,
                progress=progress,
                timeline=timeline,
            )
        timeline.add("total", timeline.start, time.perf_counter(), nbytes=loaded.wanted_nbytes)
        self._tell_later(timeline, loaded.step, stored.manifest.attempt, "ok", operation="load")
        return loaded

    @collector_paused()
    def load_near(self, own: OwnImage | None, step: int, state: State, layout: Layout | None) -> Loaded | None:
        """Fill `state` from images in memory of the ranks' own; None when these are not enough. All ranks call."""
        fence.fence()
        timeline = Timeline()
        with self._failed_load_told(timeline, step):
            loaded = load_near(own, state, self.world, self.options, layout=layout, timeline=timeline)
        if loaded is not None:
            timeline.add("total", timeline.start, time.perf_counter(), nbytes=loaded.wanted_nbytes)
            self._tell_later(timeline, step, own.attempt if own else "", "ok", operation="load")
        return loaded

    def newest_step(self, *, below: int | None = None) -> int:
        """As `opening.newest_step`."""
        return opening.newest_step(self.store, self.world, below=below)

    def open_found(self, step: int) -> StoredCheckpoint:
        """As `opening.open_found`."""
        self._settle(0)
        with self._failed_load_told(Timeline(), step):
            return opening.open_found(self.store, self.world, self.options, step)

    def _finish(self, attempt: Attempt) -> Saved:
        with self._told(attempt.timeline, attempt.request.step, attempt.id):
            saved = self._session.finish(attempt)
        self._committed(saved.step)
        return saved

    def load(
        self,
        state: State,
        step: int | None,
        layout: Layout | None,
        *,
        strict: bool,
        rename: Rename,
        include: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Loaded:
        """Fill `state` from checkpoint `step`, from the newest one when None. All ranks call."""
        self._settle(0)
        timeline = Timeline()
        with self._failed_load_told(timeline, -1 if step is None else step):
            stored = opening.open_together(self.store, self.world, self.options, step)
        return self.load_from(
            stored,
            state,
            layout,
            strict=strict,
            rename=rename,
            include=include,
            progress=progress,
            timeline=timeline,
        )

    @contextlib.contextmanager
    def _failed_load_told(self, timeline: Timeline, step: int) -> Iterator[None]:
        """When the block fails, the events hear of it."""
        try:
            yield
        except CheckpointError as error:
            timeline.add("total", timeline.start, time.perf_counter())
            self._tell_later(timeline, step, "", "failed", first_line(error), operation="load")
            raise

    @contextlib.contextmanager
    def _told(self, timeline: Timeline, step: int, attempt: str = "") -> Iterator[None]:
        """Whatever becomes of the block goes to the events."""
        try:
            yield
        except Exception as error:
            timeline.add("total", timeline.start, time.perf_counter())
            self._tell_later(timeline, step, attempt, "failed", first_line(error))
            raise
        self._tell_later(timeline, step, attempt, "ok")

    def _tell_later(
        self,
        timeline: Timeline,
        step: int,
        attempt: str,
        outcome: Outcome,
        error: str = "",
        operation: Operation = "save",
    ) -> None:
        """Tell the events on a thread of their own: a log in an object store takes requests."""
        tell = functools.partial(
            self.events.tell,
            timeline,
            operation=operation,
            run=self.store.url,
            step=step,
            attempt=attempt,
            rank=self.world.rank,
            world=self.world.size,
            outcome=outcome,
            error=error,
        )
        self._telling.submit(tell)

    # the saves on their way

    def _make_room(self, step: int, timeline: Timeline) -> bool:
        """See that there is an image for one more save. False: this save is to be skipped, on every rank."""
        limit = self.options.images_max - 1
        busy = len(self._on_their_way) > limit and not self._on_their_way[0][0].done()
        if self.options.when_busy != "wait":
            busy = self._anyone(busy)
            if busy and self.options.when_busy == "fail":
                other = self._on_their_way[0][0].step
                raise SaveFailedError(
                    f"step {step} was not saved: step {other} is still on its way, on this rank or another",
                    kind="busy",
                    hints=("save less often, or set the option `when_busy` to wait or skip",),
                )
            if busy:
                return False
        with timeline.phase("wait"):
            self._settle(limit)
        return True

    def _anyone(self, flag: bool) -> bool:
        """Whether it is so on some rank: ranks must skip the same saves. The one word that policies other than wait cost."""
        return any(bool(answer[0]) for answer in self.world.all_gather(np.array([flag], np.uint8)))

    def _is_kept(self, step: int) -> bool:
        """Whether an earlier start of this job has saved this step after all, after this one had gone on from an older step:
        an agent that nobody could ask had it under way. That checkpoint is whole, and stands; a second one is not made."""
        if not self.resumed or not self._session.is_stored(step):
            return False
        _log.warning("step %d is in %s already, saved by an earlier start of this job: it stands", step, self.store.url)
        return True

    def _skip(self, step: int, timeline: Timeline, why: str = "") -> PendingSave:
        self.skipped += 1
        timeline.add("call", timeline.start, time.perf_counter())
        timeline.add("total", timeline.start, time.perf_counter())
        self._tell_later(timeline, step, "", "skipped")
        why = why or "the saves before it were not over"
        error = SaveFailedError(f"step {step} was skipped: {why}", kind="skipped")
        return PendingSave.over(step, timeline, error, skipped=True)

    def _settle(self, limit: int) -> None:
        """Wait until at most `limit` saves are on their way, and act upon what became of the others."""
        while len(self._on_their_way) > limit:
            pending, attempt = self._on_their_way[0]
            error, changed = pending.outcome(), pending.structure_changed()
            published = None if error is None or attempt is None else self._session.published_change(attempt)
            if error is not None and published is not None:
                # This rank could not see it in time; the others did, and act upon what they saw.
                _log.warning("step %d is complete after all: %s", pending.step, first_line(error))
                error, changed = None, published
            self._note_failure(pending, error)
            if error is not None or changed:
                self._session.plan_again()
            self._on_their_way.popleft()

    def _note_failure(self, pending: PendingSave, error: BaseException | None) -> None:
        """A failure that somebody is to be told of, once."""
        if error is not None and not pending.told:
            pending.told = True
            if not self._is_kept(pending.step):
                self._failed.append((pending, error))

    def _first_failure(self) -> SaveFailedError | None:
        """The earliest failure that nobody was told of, of saves that are settled and of those known to have failed."""
        for pending, _ in self._on_their_way:
            self._note_failure(pending, pending.failure())
        if not self._failed:
            return None
        found, self._failed = self._failed, []
        return failed_error(found)

    def _committed(self, step: int) -> None:
        """Rank 0 gives word of a complete checkpoint and retires old ones. The save stands, whatever happens here."""
        if self.world.rank != 0:
            return
        try:
            if self._follower is not None:
                self._follower.before_retention(self.store)
                self._follower.committed(step)
        except Exception as error:  # noqa: BLE001 - the save is published; other ranks have seen it succeed
            _log.error("what follows the checkpoints of %s failed: %s", self.store.url, first_line(error))
        self._retire()

    def _retire(self) -> None:
        """Forget what `keep_last` no longer keeps and nothing pins, and remove it."""
        if self._keep_last is None:
            return
        try:
            steps = find.steps(self.store)
            pinned = pins.pinned(self.store, steps)
            kept = [step for step in steps if step not in self._damaged][-self._keep_last :]  # a damaged one is none
            old = [step for step in steps if step < min(kept, default=0) and step not in pinned]
            if old:
                retention.forget(self.store, old)
                collect_garbage(self.store, options=self.options)
        except Exception as error:  # noqa: BLE001 - the save is published; other ranks have seen it succeed
            _log.warning("old checkpoints in %s could not be removed: %s", self.store.url, first_line(error))

    def check(self) -> None:
        """Wait for the saves that are still on their way; SaveFailedError if one failed and nobody was told."""
        self._settle(0)
        failed = self._first_failure()
        if failed is not None:
            raise failed

    def abandon(self, reason: str) -> None:
        """Give up the saves on their way: the ranks are told, nothing of them will be published or taken for a checkpoint.

        What an agent has in its memory stays its business: it goes on without this process.
        """
        self.leave()
        for pending, attempt in self._on_their_way:
            if attempt is not None and not pending.done():
                self._session.abandon(
                    attempt, SaveFailedError(f"step {pending.step} was given up: {reason}", kind="abandoned")
                )

    def leave(self) -> None:
        """This process ends for an error: do not wait for what agents go on with without it. Then `close`."""
        if self.keeper is not None:
            self.keeper.leave()

    def close(self, grace_s: float | None = None, *, over: bool = False) -> None:
        """Finish the saves on their way, within `grace_s` where given, and let go of threads and store. May be called twice.

        Args:
            over: the job is, too: agents give their memory back.
        """
        if grace_s is not None and not self._wait_within(grace_s):
            self.abandon(f"the process ends, and it was not durable after {grace_s:.1f} s")
            if not self._wait_within(_ABANDON_S):
                # A store that does not answer: the threads are daemons, and what they write nobody will take for a save.
                raise SaveFailedError(
                    f"saves to {self.store.url} were given up while the store did not answer", kind="abandoned"
                )
        try:
            self.check()
        finally:
            self._background.close()
            self._keeping.close()
            self._session.close()
            if self.keeper is not None:
                self.keeper.close(over=over)
            if self._follower is not None:
                self._follower.close(*(() if grace_s is None else (grace_s,)))
            if self._telling.close(_EVENTS_S):
                self.events.close()
            else:
                _log.warning(
                    "events of %s are lost: their log did not take them within %.0f s", self.store.url, _EVENTS_S
                )
            self.store.close()

    def _wait_within(self, grace_s: float) -> bool:
        deadline = time.monotonic() + grace_s
        pending = [*(pending for pending, _ in self._on_their_way), *self._in_memory]
        for one in pending:
            one.outcome(max(0.0, deadline - time.monotonic()))
        return all(one.done() for one in pending)

    def _collect(
        self, state: State, layout: Layout | None, timeline: Timeline, *, stage_devices: bool
    ) -> tuple[LocalState, BaseException | None]:
        rank, world = self.world.rank, self.world.size
        with timeline.phase("walk"):
            try:
                collect = self._collector.collect
                return collect(state, rank=rank, world=world, layout=layout, stage_devices=stage_devices), None
            except CheckpointError as error:  # the other ranks must hear of it before this one raises
                return LocalState.empty(), error


LIVE: weakref.WeakSet[Run] = weakref.WeakSet()  # whose saves a process that ends waits for

# A forked process has none of the threads that finish saves: they are its parent's business alone.
os.register_at_fork(after_in_child=LIVE.clear)
