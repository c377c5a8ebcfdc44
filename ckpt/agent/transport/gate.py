"""How many streams are served at a time, to each peer and to all.

In: names of peers. Out: admission, or a `PeerError` of kind `peer-busy` that may be tried again. Never waits. Thread safe.
"""

from __future__ import annotations

import threading
from collections import Counter

from ckpt.errors import PeerError


class Gate:
    """Counts what is going on. Every `enter` that returned is followed by one `leave`."""

    def __init__(self, *, per_peer_max: int, max_of_all: int) -> None:
        self._per_peer_max = per_peer_max
        self._max_of_all = max_of_all
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()

    def enter(self, peer: str) -> None:
        """Count one more for `peer`."""
        with self._lock:
            if self._inside[peer] >= self._per_peer_max:
                raise PeerError(f"{peer} already has {self._per_peer_max} streams from here", kind="peer-busy")
            if self._inside.total() >= self._max_of_all:
                raise PeerError(f"this agent already serves {self._max_of_all} streams", kind="peer-busy")
            self._inside[peer] += 1

    def leave(self, peer: str) -> None:
        """Count one less for `peer`."""
        with self._lock:
            self._inside[peer] -= 1
            if self._inside[peer] <= 0:
                del self._inside[peer]

    def inside(self) -> int:
        """How many there are, of all peers."""
        with self._lock:
            return self._inside.total()
