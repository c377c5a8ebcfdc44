"""The public functions: save, async_save, load, open, and the training-loop form of them.

In: the user's state and a URL. Out: checkpoints. Thin: turns arguments into calls of state, engine and store, and keeps one
session per run and process group. The functions of this module are called from the thread that trains.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - registers its own end first; see _finish_all
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from ckpt import config
from ckpt.commit import find, retention
from ckpt.commit.gc import collect_garbage
from ckpt.config import Options
from ckpt.engine.background import Background, PendingSave
from ckpt.engine.load import Loaded, Rename, load_state
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.save import Attempt, Request, Saved, SaveSession
from ckpt.engine.torch_world import current_world
from ckpt.engine.view import Checkpoint
from ckpt.engine.world import World
from ckpt.errors import CheckpointError, InvalidInputError, NotFoundError, SaveFailedError
from ckpt.format.spec import LocalState
from ckpt.layout.document import to_document
from ckpt.layout.layout import Layout
from ckpt.state import Collector
from ckpt.store.base import Store
from ckpt.store.open import open_store

_log = logging.getLogger("ckpt")

State = Mapping[str, Any]
Url = str | os.PathLike[str]


class Run:
    """One run folder, as one rank of one process group uses it: store, world and save session.

    Made by all ranks of the group together. Owned by the training thread.
    """

    def __init__(
        self,
        url: Url,
        *,
        group: dist.ProcessGroup | None = None,
        options: Options | None = None,
        storage_options: Mapping[str, Any] | None = None,
        keep_last: int | None = None,
    ) -> None:
        self.options = config.from_environment(options)
        self._keep_last = keep_last
        self.store: Store = open_store(url, options=self.options, storage_options=storage_options)
        self.world: World = current_world(group, self.options.exchange_timeout_s)
        self._session = SaveSession(self.store, self.world, self.options)
        self._collector = Collector()
        self._background = Background()
        self._pending: PendingSave | None = None
        _live.add(self)

    def save(self, state: State, request: Request, layout: Layout | None) -> Saved:
        """Save and return when durable. All ranks call."""
        self.check()
        local, error = self._collect(state, layout)
        saved = self._session.save(local, request, error)
        self._retire()
        return saved

    def async_save(self, state: State, request: Request, layout: Layout | None) -> PendingSave:
        """Copy the state, return, go on in the background. All ranks call."""
        self.check()
        local, error = self._collect(state, layout)
        attempt = self._session.stage(local, request, error)
        self._pending = PendingSave(request.step, self._background.submit(lambda: self._finish(attempt)))
        return self._pending

    def _finish(self, attempt: Attempt) -> Saved:
        saved = self._session.finish(attempt)
        self._retire()
        return saved

    def _retire(self) -> None:
        """Rank 0 forgets what `keep_last` no longer keeps, and removes it. The save stands, whatever happens here."""
        if self._keep_last is None or self.world.rank != 0:
            return
        try:
            old = find.steps(self.store)[: -self._keep_last]
            if old:
                retention.forget(self.store, old)
                collect_garbage(self.store, options=self.options)
        except CheckpointError as error:
            _log.warning("old checkpoints in %s could not be removed: %s", self.store.url, error.message)

    def check(self) -> None:
        """Wait for the save that is still on its way; SaveFailedError if it failed and nobody asked it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except Exception as error:
            raise SaveFailedError(
                f"the background save of step {pending.step} failed: {_first_line(error)}",
                hints=("the checkpoints before it are untouched; saving again is safe",),
            ) from error

    def close(self) -> None:
        """Finish the save on its way and let go of thread and store. May be called twice."""
        try:
            self.check()
        finally:
            self._background.close()
            self.store.close()

    def _collect(self, state: State, layout: Layout | None) -> tuple[LocalState, BaseException | None]:
        try:
            return self._collector.collect(state, rank=self.world.rank, world=self.world.size, layout=layout), None
        except CheckpointError as error:  # the other ranks must hear of it before this one raises
            return LocalState.empty(), error


_live: weakref.WeakSet[Run] = weakref.WeakSet()


def _finish_all() -> None:
    """A process that ends waits for the saves on their way; one that failed and was never asked about is logged."""
    for run in list(_live):
        try:
            run.check()
        except SaveFailedError as error:
            _log.error("%s", error.message)


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
            found[0].close()
        # The group is kept alive with the run, so that its id stays its own.
        found = _runs[key] = (Run(url, group=group, options=options, storage_options=storage), group or default)
    return found[0]


def save(
    state: State,
    url: Url,
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
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
        process_group: the ranks that save together; the default group when None.

    Raises:
        AlreadyExistsError: the step exists; nothing was touched.
        InvalidInputError: a value that cannot be stored, or tensors that are not whole over all ranks.
        RankFailedError: another rank failed, is missing or disagrees; no checkpoint was made.
        StoreError: the store refused or cannot be reached; no checkpoint was made.
    """
    run = _run_of(url, process_group, options, storage_options)
    return run.save(state, _request(step, metrics, metadata, layout), layout)


def async_save(
    state: State,
    url: Url,
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    process_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> PendingSave:
    """Like `save`, but return once the state may be changed; the rest goes on in a thread of this process.

    One save is on its way at a time: a second call waits for the first. A failure is raised by `pending.wait()` and by the
    next call for this run. The host holds one copy of the rank's part of the state.
    """
    run = _run_of(url, process_group, options, storage_options)
    return run.async_save(state, _request(step, metrics, metadata, layout), layout)


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
    run.check()
    stored = _open_together(run, step)
    return load_state(
        stored, state, run.world, layout=layout, strict=strict, rename=rename, include=include, progress=progress
    )


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


def _open_together(run: Run, step: int | None) -> StoredCheckpoint:
    """The same step on every rank, also while another job saves: rank 0 decides."""
    stored: StoredCheckpoint | None = None
    error: CheckpointError | None = None
    try:
        if run.world.rank == 0 or step is not None:
            stored = StoredCheckpoint(run.store, "latest" if step is None else step, run.options)
    except CheckpointError as problem:
        error = problem
    value = -1 if stored is None else stored.step
    answers = run.world.all_gather(np.array([value], np.int64).view(np.uint8))
    chosen = int(answers[0].copy().view(np.int64)[0])
    if error is not None:
        raise error
    if stored is None:
        if chosen < 0:
            raise NotFoundError(f"rank 0 found no checkpoint to load in {run.store.url}")
        stored = StoredCheckpoint(run.store, chosen, run.options)
    return stored


def _request(step: int, metrics: Any, metadata: Any, layout: Layout | None) -> Request:
    if type(step) is not int or step < 0:
        raise InvalidInputError(f"step must be a whole number from 0 on, found {step!r}")
    document = None if layout is None else to_document(layout)
    return Request(step=step, metrics=dict(metrics or {}), metadata=dict(metadata or {}), layout=document)


def _first_line(error: BaseException) -> str:
    return error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


class Checkpointer:
    """The training-loop form: `restore` once, `step` at every step, `close` at the end. All ranks make and call it alike.

    Args:
        every: save when the step is a multiple of this.
        keep_last: keep this many newest checkpoints, remove older ones after each save; None keeps all.
        background: False makes every save block until it is durable.
    """

    def __init__(
        self,
        url: Url,
        *,
        every: int,
        keep_last: int | None = None,
        background: bool = True,
        layout: Layout | None = None,
        process_group: dist.ProcessGroup | None = None,
        options: Options | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1 or (keep_last is not None and keep_last < 1):
            raise InvalidInputError(f"every and keep_last must be at least 1, found {every} and {keep_last}")
        self._every, self._background, self._layout = every, background, layout
        self._run = Run(url, group=process_group, options=options, storage_options=storage_options, keep_last=keep_last)

    def restore(self, state: State, *, strict: bool = True, rename: Rename = None) -> int | None:
        """Load the newest complete checkpoint into `state`; its step, or None when the run has none. All ranks call."""
        run = self._run
        try:
            stored = _open_together(run, None)
        except NotFoundError:
            return None
        return load_state(stored, state, run.world, layout=self._layout, strict=strict, rename=rename).step

    def step(
        self,
        step: int,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> PendingSave | None:
        """Save when it is time. Returns the save on its way, or None when there was nothing to do. All ranks call."""
        if step % self._every:
            return None
        request = _request(step, metrics, metadata, self._layout)
        if self._background:
            pending = self._run.async_save(state, request, self._layout)
        else:
            pending = PendingSave.done_with(self._run.save(state, request, self._layout))
        return pending

    def close(self) -> None:
        """Wait for the save on its way and let go of everything. May be called twice."""
        self._run.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
