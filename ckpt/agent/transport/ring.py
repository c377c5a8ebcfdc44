"""The few chunks of one transfer that have arrived and wait for their reader, in the memory in which they came.

In: chunks, in order. Out: the same chunks, each at its own time. The transfer waits while the reader has not given back; the
reader waits for the next chunk until its deadline, or has the error of the transfer. What was taken is verified as a chunk, and
of use only when the transfer as a whole turns out to be. One filler, one reader. Copies nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import PeerError

_BEAT_S = 0.5  # a transfer that waits for its reader says so often that it lives


class Ring:
    """Room for `depth` chunks, with the one that the reader works on."""

    def __init__(self, *, chunk_bytes: int, depth: int = 2) -> None:
        self.chunk_bytes = chunk_bytes
        self._depth = depth
        self._chunks: deque[NDArray[np.uint8]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    # the transfer's side

    def wait_for_room(self, beat: Callable[[], None]) -> None:
        """Until another chunk may come. Calls `beat` meanwhile. `peer-stopped` when the reader has left."""
        with self._changed:
            while self._error is None and len(self._chunks) >= self._depth:
                beat()
                self._changed.wait(_BEAT_S)
            if self._error is not None:
                raise PeerError("a transfer was given up", kind="peer-stopped")

    def land(self, chunk: NDArray[np.uint8]) -> None:
        """A chunk is there, and verified. Nobody writes to its memory any more."""
        with self._changed:
            self._chunks.append(chunk)
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
            while not self._chunks:
                left_s = ends_at - time.monotonic()
                if self._error is not None:
                    raise self._error
                if left_s <= 0:
                    raise PeerError("a chunk did not come in time", kind="peer-late")
                self._changed.wait(left_s)
            return self._chunks[0]

    def give_back(self) -> None:
        """The chunk taken last is no longer needed."""
        with self._changed:
            self._chunks.popleft()
            self._changed.notify_all()
