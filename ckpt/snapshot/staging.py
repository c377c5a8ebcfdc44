"""Fill an image from the state's memory, lazily: what a fence guards is copied while training goes on.

In: a packer, a buffer, and which storages a fence guards. Out: a full image, chunk by chunk in an order that puts first what
changes first. What nobody guards is copied before `begin` returns. Chunks are claimed one at a time: by the copying thread, and
by the training thread when a fence holds it, so that it never waits for work that it could do itself. Never writes to a store.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.events import Timeline
from ckpt.kernels import set_thread_nice
from ckpt.layout.box import Int64Array
from ckpt.snapshot import fence
from ckpt.snapshot.devices import DeviceCopies
from ckpt.snapshot.pack import Packer

_WAITING, _CLAIMED, _DONE = range(3)


class Staging:
    """One image on its way. `begin` and `hold` on the training thread; `run` on the copying thread; `wait_for` on any."""

    def __init__(self, packer: Packer, memory: NDArray[np.uint8], *, timeline: Timeline, devices: DeviceCopies) -> None:
        self._packer, self._memory, self._timeline, self._devices = packer, memory, timeline, devices
        self._program = program = packer.sources.program
        self._image = memory[: program.layout.total_bytes]
        self._changed = threading.Condition()
        self._state = np.full(program.num_chunks, _WAITING, np.int8)  # of each chunk, as far as the host copies
        self._order: list[int] = []
        self._late = np.zeros(len(program.piece), bool)  # parts that `begin` left for later
        self._apart = np.zeros(program.num_chunks, bool)  # a device puts something into the chunk, at its own time
        self._summed = np.zeros(program.num_chunks, bool)
        self._error: BaseException | None = None
        self._keep_alive: tuple[object, ...] = ()
        self.fence_s = 0.0  # that the training thread was held

    @property
    def memory(self) -> NDArray[np.uint8]:
        """What the image lies in, for whoever gave it."""
        return self._memory

    @property
    def copied(self) -> bool:
        """True when no fence needs to hold for this any more."""
        return bool((self._state == _DONE).all()) and self._devices.finished

    def begin(self, guarded: Sequence[fence.Storages], keep_alive: tuple[object, ...]) -> None:
        """Copy what nobody guards; start the copies from devices; put the fences up for the rest.

        Args:
            guarded: by optimizer, in the order in which they will step.
            keep_alive: owners of the memory that is copied late.
        """
        program, packer = self._program, self._packer
        for storages in guarded:
            self._late |= fence.lies_in(packer.sources.storage, storages)
        on_device = self._devices.start(packer, self._image, self._late)
        self._late &= ~on_device
        packer.copy_parts(np.flatnonzero(~self._late & ~on_device), self._image, 0)
        for chunk in range(program.num_chunks):
            low, high = program.chunk_range(chunk)
            packer.put_raw(chunk, self._image[low:high])
        chunk_of = program.position // program.chunk_bytes
        self._apart[chunk_of[on_device]] = True
        self._state[:] = _DONE
        self._state[chunk_of[self._late]] = _WAITING
        self._order = self._urgent_first(guarded, chunk_of)
        if not self.copied:
            self._keep_alive = keep_alive
            fence.add(self)

    def _urgent_first(self, guarded: Sequence[fence.Storages], chunk_of: Int64Array) -> list[int]:
        """Chunks by when the first of their tensors changes."""
        turn = np.full(self._program.num_chunks, len(guarded), np.int64)
        if len(guarded) > 1:
            storage = self._packer.sources.storage
            for number in reversed(range(len(guarded))):
                turn[chunk_of[fence.lies_in(storage, guarded[number])]] = number
        return [int(chunk) for chunk in np.argsort(turn, kind="stable") if self._state[chunk] == _WAITING]

    def run(self) -> None:
        """Copy until nothing is left to claim. The copying thread; never raises: `wait_for` does."""
        start, nbytes = time.perf_counter(), 0
        while (chunk := self._claim(self._order)) is not None:
            nbytes += self._copy(chunk, summed=True)
        if nbytes:
            self._timeline.add("copy", start, time.perf_counter(), nbytes=nbytes)

    def hold(self, storages: fence.Storages | None) -> None:
        """Return when what lies in these storages is copied. The training thread, at a fence: it copies, too."""
        start = time.perf_counter()
        self._devices.hold()
        wanted = self._chunks_of(storages)
        while (chunk := self._claim(wanted)) is not None:
            self._copy(chunk, summed=False)
        with self._changed:
            self._changed.wait_for(lambda: bool((self._state[wanted] == _DONE).all()))
        stop = time.perf_counter()
        self.fence_s += stop - start
        self._timeline.add("fence", start, stop)

    def wait_for(self, chunk: int) -> NDArray[np.uint8]:
        """The bytes of a chunk, when they are all there and summed. Raises what stopped the copy. The writing thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or bool(self._state[chunk] == _DONE))
        if self._error is not None:
            raise self._error
        self._devices.wait_for(chunk)
        low, high = self._program.chunk_range(chunk)
        if not self._summed[chunk]:
            start = time.perf_counter()
            self._packer.checksum(chunk, self._image[low:high])
            self._summed[chunk] = True
            self._timeline.add("checksum", start, time.perf_counter(), nbytes=high - low)
        return self._image[low:high]

    def give_up(self, error: BaseException) -> None:
        """Leave what nobody has begun to copy, and let no fence hold for it; the image is at rest on return. Any thread."""
        with self._changed:
            if not (self._state == _DONE).all():
                self._error = self._error or error
            self._state[self._state == _WAITING] = _DONE
            self._changed.notify_all()
            self._changed.wait_for(lambda: bool((self._state == _DONE).all()))
            self._keep_alive = ()
        for chunk in range(self._program.num_chunks):
            self._devices.wait_for(chunk)

    def _claim(self, chunks: Sequence[int]) -> int | None:
        with self._changed:
            for chunk in chunks:
                if self._state[chunk] == _WAITING:
                    self._state[chunk] = _CLAIMED
                    return int(chunk)
        return None

    def _copy(self, chunk: int, *, summed: bool) -> int:
        """Copy what is late in `chunk`, and sum the chunk while it is in the cache. Returns its bytes."""
        low, high = self._program.chunk_range(chunk)
        buffer = self._image[low:high]
        try:
            if summed:
                failpoints.hit("stage.before-chunk")
            rows = self._packer.rows_of(chunk)
            late = np.flatnonzero(self._late[rows]) + rows.start
            if summed and not self._apart[chunk]:
                # One thread: two would take 1.7 times the time of processors, which the training needs.
                self._packer.pack(chunk, buffer, late, threads=1)
                self._summed[chunk] = True
            else:
                self._packer.copy_parts(late, buffer, low)
        except BaseException as error:  # noqa: BLE001 - raised by `wait_for`; the training must not stop for it
            self._error = self._error or error
        with self._changed:
            self._state[chunk] = _DONE
            if (self._state == _DONE).all():
                self._keep_alive = ()
            self._changed.notify_all()
        return high - low

    def _chunks_of(self, storages: fence.Storages | None) -> list[int]:
        if storages is None:
            return self._order
        rows = self._late & fence.lies_in(self._packer.sources.storage, storages)
        wanted = set(np.unique(self._program.position[rows] // self._program.chunk_bytes).tolist())
        return [chunk for chunk in self._order if chunk in wanted]


class Copier:
    """The thread that copies, one staging after the other. Owned by one session; `close` may be called twice."""

    def __init__(self, nice: int) -> None:
        self._nice = nice
        self._tasks: queue.SimpleQueue[Staging | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if it does not run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckpt-copy", daemon=True)
            self._thread.start()

    def submit(self, staging: Staging) -> None:
        """Copy `staging` after all earlier ones."""
        self.start()
        self._tasks.put(staging)

    def close(self) -> None:
        """Stop the thread when it has done what was submitted."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        set_thread_nice(self._nice)
        while (staging := self._tasks.get()) is not None:
            staging.run()
            del staging  # nothing of a step is kept until the next one
