"""A few buffers that one transfer fills in turn, and its reader empties.

In: chunks, in order. Out: the same chunks, each at its own time. The transfer waits while the reader has not given back; the
reader waits for the next chunk until its deadline, or has the error of the transfer. What was taken is verified as a chunk, and
of use only when the transfer as a whole turns out to be. One filler, one reader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import PeerError

_BEAT_S = 0.5  # a transfer that waits for its reader says so often that it lives


class Ring:
    """Room for `depth` chunks."""

    def __init__(self, *, chunk_bytes: int, depth: int = 2) -> None:
        self.chunk_bytes = chunk_bytes
        self._buffers = [np.empty(chunk_bytes, np.uint8) for _ in range(depth)]
        self._sizes = [0] * depth
        self._changed = threading.Condition()
        self._landed = self._given_back = 0  # chunks so far
        self._error: BaseException | None = None

    # the transfer's side

    def room(self, nbytes: int, beat: Callable[[], None]) -> NDArray[np.uint8]:
        """Where the next chunk goes. Waits for the reader, and calls `beat` meanwhile. `peer-stopped` when it has left."""
        with self._changed:
            while self._error is None and self._landed - self._given_back == len(self._buffers):
                beat()
                self._changed.wait(_BEAT_S)
            if self._error is not None:
                raise PeerError("a transfer was given up", kind="peer-stopped")
            number = self._landed % len(self._buffers)
            self._sizes[number] = nbytes
            return self._buffers[number][:nbytes]

    def landed(self) -> None:
        """The chunk is there, and verified."""
        with self._changed:
            self._landed += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """There will be no more chunks. Either side; the first error counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    # the reader's side

    def take(self, *, ends_at: float) -> NDArray[np.uint8]:
        """The next chunk, to be given back. Raises what stopped the transfer; `peer-late` at `ends_at` (`time.monotonic`)."""
        with self._changed:
            while self._landed == self._given_back:
                left_s = ends_at - time.monotonic()
                if self._error is not None:
                    raise self._error
                if left_s <= 0:
                    raise PeerError("a chunk did not come in time", kind="peer-late")
                self._changed.wait(left_s)
            number = self._given_back % len(self._buffers)
            return self._buffers[number][: self._sizes[number]]

    def give_back(self) -> None:
        """The chunk taken last may be written over."""
        with self._changed:
            self._given_back += 1
            self._changed.notify_all()
