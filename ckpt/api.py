"""The public functions: save, async_save, load, open, and the training-loop form of them.

In: the user's state and a URL. Out: checkpoints. Thin: turns arguments into calls of state, engine and store, and keeps one
session per run and process group. The functions of this module are called from the thread that trains.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - registers its own end first; see _finish_all
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ckpt import config
from ckpt.commit.complete import Request
from ckpt.config import Memory, OnlineAverage, Options
from ckpt.engine.attempt import Saved
from ckpt.engine.load import Loaded, Rename
from ckpt.engine.pending import PendingSave
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.restore import Restored, restore
from ckpt.engine.run import LIVE, Run, State, Url
from ckpt.engine.view import Checkpoint
from ckpt.engine.world import World
from ckpt.errors import CheckpointError, InvalidInputError, SaveFailedError, first_line
from ckpt.events import Sink, Timeline
from ckpt.layout.document import to_document
from ckpt.layout.layout import Layout
from ckpt.observe import default_sinks
from ckpt.snapshot import fence
from ckpt.store.open import open_store

if TYPE_CHECKING:
    from ckpt.agent.tier import Tier
    from ckpt.merge.beside import Beside

_log = logging.getLogger("ckpt")


_ending: dict[str, float] = {}  # "grace_s": set when the process was told to end


def _finish_all() -> None:
    """A process that ends waits for the saves on their way; one that failed and was never asked about is logged."""
    for run in list(LIVE):
        try:
            if hasattr(sys, "last_value"):  # an error ended the program; what agents hold they see to themselves
                run.leave()
            run.close(_ending.get("grace_s"))
        except Exception as error:  # noqa: BLE001 - one run that fails must not keep others from being finished
            _log.error("%s", first_line(error))


def _end_orderly(grace_s: float) -> None:
    """Let SIGTERM end this process as `sys.exit(143)` does, with at most `grace_s` for the saves on their way.

    Only in the main thread, and only where nobody else handles the signal.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    pid = os.getpid()

    def end(number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
        if os.getpid() != pid:  # forked: the saves are the parent's
            os.kill(os.getpid(), number)
            return
        _ending["grace_s"] = grace_s
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


# Before concurrent.futures stops its pools, which stores write with; plain `atexit` comes after that.
getattr(threading, "_register_atexit", atexit.register)(_finish_all)

_runs: dict[tuple[str, int], tuple[Run, dist.ProcessGroup | None]] = {}


def _run_of(url: Url, group: dist.ProcessGroup | None, options: Options | None, storage: Any) -> Run:
    """The run that earlier calls with this URL and group made: plans and buffers are kept from save to save."""
    default = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    key = (os.fspath(url), id(group or default))
    found = _runs.get(key)
    if found is None or (options is not None and options != found[0].options):
        if found is not None:
            try:
                found[0].close()
            except SaveFailedError as error:  # making a run is something that all ranks do together
                _log.error("%s", error.message)
        # The group is kept alive with the run, so that its id stays its own.
        run = Run(url, group=group, options=options, storage_options=storage, sinks=default_sinks)
        found = _runs[key] = (run, group or default)
    return found[0]


def save(
    state: State,
    url: Url,
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    incremental: bool = False,
    process_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Saved:
    """Save `state` as checkpoint `step` of the run at `url`; return when it is durable and complete on all ranks.

    Every rank of `process_group` calls, with its part of the state. The first call with a structure exchanges 32 bytes per
    fragment between the ranks; later ones make no collective call.

    Args:
        state: name -> module, optimizer, scheduler, loader, `ckpt.RNG()`, tensors, or plain nested values.
        url: a folder, or an fsspec URL such as `s3://bucket/run`.
        step: not negative; a step that exists is refused.
        metrics: numbers to find and weigh checkpoints by; rank 0's are stored.
        metadata: any JSON value by name; rank 0's are stored.
        layout: where plain tensors lie that are parts of larger ones (docs/reference/layout-files.md).
        incremental: write only what has changed since the newest complete checkpoint of this run, and refer to its files for the
            rest (docs/how-to/incremental.md). Needs one image of the rank's state in host memory. All ranks alike.
        process_group: the ranks that save together; the default group when None.

    Raises:
        AlreadyExistsError: the step exists; nothing was touched.
        InvalidInputError: a value that cannot be stored, or tensors that are not whole over all ranks.
        RankFailedError: another rank failed, is missing or disagrees; no checkpoint was made.
        StoreError: the store refused or cannot be reached; no checkpoint was made.
    """
    run = _run_of(url, process_group, options, storage_options)
    return run.save(state, _request(step, metrics, metadata, layout, incremental), layout)


def async_save(
    state: State,
    url: Url,
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    incremental: bool = False,
    process_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> PendingSave:
    """Like `save`, but return before the state is stored; the rest goes on in threads of this process.

    Tensors of attached optimizers (`ckpt.attach`) are copied while training goes on, until just before their next step; all
    others are copied before this returns. At most `images_max` saves are on their way, each with one copy of the rank's part
    of the state in host memory; a call when all are waits (option `when_busy`). A failure is raised by `pending.wait()` and at
    the next call for this run.
    """
    run = _run_of(url, process_group, options, storage_options)
    return run.async_save(state, _request(step, metrics, metadata, layout, incremental), layout)


def load(
    state: State,
    url: Url,
    *,
    step: int | None = None,
    strict: bool = True,
    rename: Rename = None,
    include: Sequence[str] | None = None,
    layout: Layout | None = None,
    process_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Fill `state` in place from checkpoint `step` (the newest complete one when None), saved on whatever layout.

    Every rank of `process_group` calls, with the state of the layout that it trains on. Only the top-level names that
    `state` has are loaded: `{"model": model}` reads no optimizer state.

    Args:
        strict: refuse names that are missing or extra.
        rename: stored name -> name in `state`; names that it does not give stay.
        include: fill only tensors and objects whose name in `state` matches one of these patterns, such as
            `"model/layers.0.**"`; all others stay as they are and are not read. `*` stands for one part of a name, `**` for
            any, as in layout files. Objects (`"scheduler"`) go by their own name.

    Raises:
        NotFoundError: no run at `url`, or no such complete checkpoint in it.
        MismatchError: names, shapes or dtypes differ; lists all differences, before anything changed.
        DamagedError: stored bytes are not what was written.
    """
    run = _run_of(url, process_group, options, storage_options)
    return run.load(state, step, layout, strict=strict, rename=rename, include=include, progress=progress)


def open(  # noqa: A001 - `ckpt.open` reads like what it does
    url: Url,
    *,
    step: int | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open checkpoint `step` (the newest complete one when None) for reading. Needs no process group and no model.

    `checkpoint["model/layers.3.wq.weight"][128:256]` reads just those rows (rounded to checksum blocks).
    """
    chosen = config.from_environment(options)
    store = open_store(url, options=chosen, storage_options=storage_options)
    return Checkpoint(StoredCheckpoint(store, "latest" if step is None else step, chosen))


def _request(step: int, metrics: Any, metadata: Any, layout: Layout | None, incremental: bool) -> Request:
    if type(step) is not int or step < 0:
        raise InvalidInputError(f"step must be a whole number from 0 on, found {step!r}")
    document = None if layout is None else to_document(layout)
    return Request(
        step=step,
        metrics=dict(metrics or {}),
        metadata=dict(metadata or {}),
        layout=document,
        incremental=incremental,
    )


class Checkpointer:
    """The training-loop form: `restore` once, `step` at every step, `close` at the end. All ranks make and call it alike.

    Saves in the background are copied while training goes on: `step` attaches the optimizers in the state, whose next step then
    waits for what is not copied yet (`ckpt.attach`). SIGTERM ends the process as `sys.exit` would, after the saves on their way
    or `terminate_grace_s`, unless the program handles the signal itself.

    Args:
        every: save when the step is a multiple of this.
        keep_last: keep this many newest checkpoints, remove older ones after each save; None keeps all.
        background: False makes every save block until it is durable.
        incremental: as for `save`.
        sinks: where events go besides the log of the run (ckpt.observe).
        memory: also keep snapshots in the memory of agents, one per rank, that outlive this process (docs/how-to/memory.md).
        merge: keep an average of the checkpoints up, in a process of its own on the node of rank 0 (docs/how-to/merge.md). What
            goes wrong with it is logged and in `average.failures`; it never fails a save.

    Attributes:
        average: the average that is kept up, on rank 0; None without `merge`.
        restored: what `restore` found last, None when there was nothing.
        skipped: saves that were due and left out because the ones before were not over (option `when_busy="skip"`).
    """

    def __init__(
        self,
        url: Url,
        *,
        every: int,
        keep_last: int | None = None,
        background: bool = True,
        incremental: bool = False,
        layout: Layout | None = None,
        process_group: dist.ProcessGroup | None = None,
        options: Options | None = None,
        storage_options: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
        memory: Memory | None = None,
        merge: OnlineAverage | None = None,
    ) -> None:
        if every < 1 or (keep_last is not None and keep_last < 1):
            raise InvalidInputError(f"every and keep_last must be at least 1, found {every} and {keep_last}")
        self._every, self._background, self._layout = every, background, layout
        self._incremental, self._memory = incremental, memory
        self._tier: Tier | None = None
        self._owed = False  # a save that is due, and could not be made under its step
        self.restored: Restored | None = None
        if memory is not None and not background:
            raise InvalidInputError("snapshots in memory need saves in the background: background=True")
        self.average = None if merge is None else self._make_average(url, merge, options, storage_options)
        self._run = Run(
            url,
            group=process_group,
            options=options,
            storage_options=storage_options,
            keep_last=keep_last,
            follower=self.average,
            sinks=lambda store, options, rank, world: [
                *default_sinks(store, options, rank=rank, world=world),
                *sinks,
            ],
            keeper=None if memory is None else functools.partial(self._make_tier, memory, storage_options),
        )
        _end_orderly(self._run.options.terminate_grace_s)

    def _make_average(
        self, url: Url, rule: OnlineAverage, options: Options | None, storage: Mapping[str, Any] | None
    ) -> Beside:
        from ckpt.merge.beside import Beside  # YAML and methods take a while to import, and few need them

        return Beside(os.fspath(url), rule, config.from_environment(options), storage)

    def _make_tier(
        self, memory: Memory, storage: Mapping[str, Any] | None, url: str, world: World, options: Options
    ) -> Tier:
        from ckpt.agent.tier import Tier  # Flight takes a while to import, and few need it

        self._tier = Tier(url, world, memory, options, storage)
        return self._tier

    @property
    def skipped(self) -> int:
        return self._run.skipped

    def restore(self, state: State, *, strict: bool = True, rename: Rename = None) -> int | None:
        """Load the newest complete checkpoint into `state`; its step, or None when the run has none. All ranks call.

        With `memory`, from the nearest tier that has the newest step: the memory of agents, else the store. What turns out to be
        damaged, on any rank, is passed over for the next older one on either tier, by all ranks alike and with a warning.
        `restored` says what was loaded and what was passed over. A damaged checkpoint in the store is left as it is; a save that
        is due at its step is made one step later, unless it is forgotten by then. `ckpt.load`, which is asked for a certain
        checkpoint, raises instead.

        Also gets ready for the first save, as `prepare` does, and protects the restored state in the agents' memory.

        Raises:
            DamagedError: `nothing-restored`: all that there is turned out to be damaged; lists it. The state may be partly
                overwritten.
            MismatchError: names, shapes or dtypes differ from what was saved; lists all differences.
            StoreError: the store refused or cannot be reached, and memory has nothing.
            RankFailedError: another rank failed with one of these, or is missing.
        """
        self.restored = restore(self._run, self._tier, state, self._layout, strict=strict, rename=rename)
        self._run.resume()
        self.prepare(state)
        if self.restored is None:
            return None
        if self._tier is not None:
            self._protect_again(state, self.restored.step)
        return self.restored.step

    def _protect_again(self, state: State, step: int) -> None:
        """Protect what was restored in the groups of this job, before training goes on; the log says when that fails."""
        pending = self._run.keep(state, _request(step, None, None, self._layout, False), self._layout)
        pending.outcome(self._run.options.protect_timeout_s)

    def prepare(self, state: State) -> None:
        """Plan, take memory and start threads now, so that the first save costs no more than later ones. All ranks call.

        `restore` does it, too; it is worth a call of its own once the optimizer has its slots, when nothing was restored.
        """
        self._attach(state)
        self._run.prepare(state, self._layout, background=self._background)

    def step(
        self,
        step: int,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> PendingSave | None:
        """Save when it is time. Returns the save on its way, or None when there was nothing to do. All ranks call.

        A step whose number a damaged checkpoint has, which `restore` went back behind, is kept in memory alone where there is
        `memory`, else skipped; the next step is saved in its place.

        Raises:
            SaveFailedError: an earlier save failed, with its step and cause; this one is on its way all the same. `busy`: the
                saves before are not over and the policy is to fail.
        """
        for_memory = self._memory is not None and self._run.snapshot_due(step, self._memory)
        due = self._owed or step % self._every == 0
        self._owed = due and self._run.is_taken(step)
        if (for_memory and not due) or (self._owed and self._memory is not None):
            self._attach(state)
            return self._run.keep(state, _request(step, metrics, metadata, self._layout, False), self._layout)
        if not due:
            return None
        if self._owed:
            return self._run.skip_taken(step)
        request = _request(step, metrics, metadata, self._layout, self._incremental)
        if self._background:
            self._attach(state)
            return self._run.async_save(state, request, self._layout)
        saved = self._run.save(state, request, self._layout)
        return PendingSave.over(step, Timeline(), saved)

    def _attach(self, state: State) -> None:
        found = list(fence.find_optimizers(state))
        if found:
            fence.attach(*found)

    def close(self) -> None:
        """Wait for the saves on their way and let go of everything, agents included: the job is over. May be called twice."""
        if self._owed:
            self._owed = False
            _log.error("the last save was not made: a damaged checkpoint has its step, and no step came after it")
        self._run.close(_ending.get("grace_s"), over="grace_s" not in _ending)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if error is None:
                self.close()
            else:  # the job may come back for what its agents hold, who go on without this process
                self._run.leave()
                self._run.close(_ending.get("grace_s"))
        except CheckpointError as problem:
            if error is None:
                raise
            _log.error("%s", problem.message)  # what ended the loop is the error to raise
            error.add_note(problem.message)
