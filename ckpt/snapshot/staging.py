"""Fill an image from the state's memory, lazily: what a fence guards is copied while training goes on.

In: a packer, a buffer, and which storages a fence guards. Out: a full image, chunk by chunk in an order that puts first what
changes first. What nobody guards is copied before `begin` returns. Chunks are claimed one at a time: by the copying thread, and
by the training thread when a fence holds it, so that it never waits for work that it could do itself. Never writes to a store.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.errors import SaveFailedError
from ckpt.events import Timeline
from ckpt.layout.box import Int64Array
from ckpt.snapshot import fence
from ckpt.snapshot.devices import DeviceCopies
from ckpt.snapshot.pack import Packer

_WAITING, _CLAIMED, _DONE = range(3)
_NAMED_MAX = 20  # tensors in a message
_REST_S = 60.0  # a chunk that is being copied is copied within that
_version = operator.attrgetter("_version")


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """Tensors that are copied late, and torch's counts of their changes in place at the call. Changes of `.data` do not count."""

    tensors: Sequence[torch.Tensor] = ()
    storage: fence.Storages = field(default_factory=lambda: np.empty(0, np.uint64))
    versions: Sequence[int] = ()

    def changed(self, storages: fence.Storages) -> fence.Storages:
        """Those of these ascending storages that hold a tensor which was changed since the call."""
        rows = np.flatnonzero(fence.lies_in(self.storage, storages)).tolist() if len(self.tensors) else []
        return self.storage[[row for row in rows if _version(self.tensors[row]) != self.versions[row]]]


def _watched(guarded: fence.Guarded) -> _Watched:
    try:
        versions = list(map(_version, guarded.tensors))
    except RuntimeError:  # tensors made in inference mode keep no count
        return _Watched()
    return _Watched(tensors=guarded.tensors, storage=guarded.storage, versions=versions)


class Staging:
    """One image on its way. `begin` and `hold` on the training thread; `run` on the copying thread; `wait_for` on any."""

    def __init__(
        self,
        packer: Packer,
        memory: NDArray[np.uint8],
        *,
        timeline: Timeline,
        devices: DeviceCopies,
        name_of: Callable[[int], str] = str,
    ) -> None:
        """
        Args:
            name_of: the name of a tensor by its number in the pieces, for messages.
        """
        self._name_of = name_of
        self._packer, self._memory, self._timeline, self._devices = packer, memory, timeline, devices
        self._program = program = packer.sources.program
        self._image = memory[: program.layout.total_bytes]
        self._changed = threading.Condition()
        self._state = np.full(program.num_chunks, _WAITING, np.int8)  # of each chunk, as far as the host copies
        self._order: list[int] = []
        self._late = np.zeros(len(program.piece), bool)  # parts that `begin` left for later
        self._summed = np.zeros(program.num_chunks, bool)
        self._error: BaseException | None = None
        self._keep_alive: tuple[object, ...] = ()
        self._watched = _Watched()
        self.fence_s = 0.0  # that the training thread was held

    @property
    def memory(self) -> NDArray[np.uint8]:
        """What the image lies in, for whoever gave it."""
        return self._memory

    @property
    def copied(self) -> bool:
        """True when no fence needs to hold for this any more."""
        return bool((self._state == _DONE).all()) and self._devices.finished

    def begin(self, guarded: fence.Guarded, keep_alive: tuple[object, ...]) -> None:
        """Copy what nobody guards; start the copies from devices; put the fences up for the rest.

        Args:
            guarded: what is left for later.
            keep_alive: owners of the memory that is copied late.
        """
        program, packer = self._program, self._packer
        for storages in guarded.turns:
            self._late |= fence.lies_in(packer.sources.storage, storages)
        on_device = self._devices.start(packer, self._image, self._late)
        self._late &= ~on_device
        packer.copy_parts(np.flatnonzero(~self._late & ~on_device), self._image, 0)
        for chunk in range(program.num_chunks):
            low, high = program.chunk_range(chunk)
            packer.put_raw(chunk, self._image[low:high])
        chunk_of = program.position // program.chunk_bytes
        self._state[:] = _DONE
        self._state[chunk_of[self._late]] = _WAITING
        self._order = self._urgent_first(guarded.turns, chunk_of)
        self._watched = _watched(guarded)
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
            nbytes += self._copy(chunk)
        if nbytes:
            self._timeline.add("copy", start, time.perf_counter(), nbytes=nbytes)

    def hold(self, storages: fence.Storages | None) -> None:
        """Return when what lies in these storages is copied. The training thread, at a fence: it copies, too."""
        start = time.perf_counter()
        self._devices.hold()
        wanted = self._chunks_of(storages)
        mine: list[int] = []
        try:
            while (chunk := self._claim(wanted, mine)) is not None:
                self._copy(chunk)
        finally:
            self._let_go(mine)  # an interrupt may come between any two lines
        with self._changed:
            if not self._changed.wait_for(lambda: bool((self._state[wanted] == _DONE).all()), _REST_S):
                self._error = self._error or SaveFailedError(
                    f"the copying thread has not finished a part of the state within {_REST_S:.0f} s", kind="stalled"
                )
        stop = time.perf_counter()
        self.fence_s += stop - start
        self._timeline.add("fence", start, stop)

    def wait_for(self, chunk: int) -> NDArray[np.uint8]:
        """The bytes of a chunk, when they are all there and summed. Raises what stopped the copy. The writing thread.

        Not before the whole image is copied: sums and writes would take processors and memory from the copy, for which the
        training may have to wait.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or bool((self._state == _DONE).all()))
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
            self._changed.wait_for(lambda: bool((self._state == _DONE).all()), _REST_S)
            self._keep_alive, self._watched = (), _Watched()
        for chunk in range(self._program.num_chunks):
            self._devices.wait_for(chunk)

    def _claim(self, chunks: Sequence[int], mine: list[int] | None = None) -> int | None:
        with self._changed:
            for chunk in chunks:
                if self._state[chunk] == _WAITING:
                    if mine is not None:
                        mine.append(chunk)
                    self._state[chunk] = _CLAIMED
                    return int(chunk)
        return None

    def _let_go(self, mine: Sequence[int]) -> None:
        """Chunks that this thread claimed and, interrupted, did not copy: the save fails, and nobody waits for them."""
        left = [chunk for chunk in mine if self._state[chunk] == _CLAIMED]
        if left:
            with self._changed:
                self._error = self._error or SaveFailedError(
                    "the copy of the state was interrupted", kind="interrupted"
                )
                self._state[left] = _DONE
                self._changed.notify_all()

    def _copy(self, chunk: int) -> int:
        """Copy what is late in `chunk`. Returns its bytes.

        Sums are left to whoever writes: a copy that nothing reads at once can go past the caches, in 0.6 of the time, and both
        together take no more of a processor than one pass that does both.
        """
        low, high = self._program.chunk_range(chunk)
        buffer = self._image[low:high]
        try:
            if threading.current_thread() is not threading.main_thread():
                failpoints.hit("stage.before-chunk")
            rows = self._packer.rows_of(chunk)
            late = np.flatnonzero(self._late[rows]) + rows.start
            self._packer.copy_parts(late, buffer, low)
            self._refuse_changed(late)
        except Exception as error:  # noqa: BLE001 - raised by `wait_for`; the training must not stop for it
            self._error = self._error or error
        with self._changed:
            self._state[chunk] = _DONE
            if (self._state == _DONE).all():
                self._keep_alive, self._watched = (), _Watched()
            self._changed.notify_all()
        return high - low

    def _refuse_changed(self, rows: Int64Array) -> None:
        """SaveFailedError when a tensor of these parts was changed in place since the call, as far as torch counts."""
        storage = self._packer.sources.storage
        changed = self._watched.changed(np.unique(storage[rows]))
        if len(changed):
            program, pieces = self._program, self._packer.sources.pieces
            numbers = np.unique(pieces.boxes.tensor[program.piece[np.isin(storage, changed)]])
            raise changed_error([self._name_of(int(number)) for number in numbers])

    def _chunks_of(self, storages: fence.Storages | None) -> list[int]:
        if storages is None:
            return self._order
        rows = self._late & fence.lies_in(self._packer.sources.storage, storages)
        wanted = set(np.unique(self._program.position[rows] // self._program.chunk_bytes).tolist())
        return [chunk for chunk in self._order if chunk in wanted]


def changed_error(found: Sequence[str]) -> SaveFailedError:
    """The error of a save whose tensors changed while they were copied."""
    more = f" and {len(found) - _NAMED_MAX} more" if len(found) > _NAMED_MAX else ""
    return SaveFailedError(
        f"changed while they were copied, without a fence: {', '.join(f'`{name}`' for name in found[:_NAMED_MAX])}{more}",
        kind="changed-unfenced",
        hints=(
            "call ckpt.fence() before changing saved tensors other than by an optimizer's step",
            "what changes together with an optimizer belongs into ckpt.attach(optimizer, also=[...])",
        ),
    )
