"""A TCP link between a client and an agent that cuts, stops, slows or flips what the agent sends.

In: the agent's port. Out: a port of its own. One owner: the test; threads are daemons and end when the link is closed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class FaultyLink:
    """Forwards both ways; faults count bytes from the agent to the client since `arm`."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.seen = bytearray()  # both ways, for tests that look for what must not be there
        self.arm()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(
        self,
        *,
        cut_at: int | None = None,
        flip_at: int | None = None,
        stop_at: int | None = None,
        bytes_per_s: int | None = None,
    ) -> None:
        """From now on: close both ends after `cut_at` bytes; invert a bit of byte `flip_at`; go silent after `stop_at`."""
        with self._lock:
            self.passed = 0
            self._cut_at, self._flip_at, self._stop_at, self._bytes_per_s = cut_at, flip_at, stop_at, bytes_per_s

    def close(self) -> None:
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections."""
        with self._lock:
            ends, self._sockets = self._sockets, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target, 5)
                except OSError:
                    near.close()
                    continue
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.settimeout(None)
                with self._lock:
                    self._sockets += [near, far]
                threading.Thread(target=self._forward, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(far, near, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, from_agent: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(256 if self._bytes_per_s and from_agent else 65536):
                if len(self.seen) < 1 << 20:
                    self.seen += data
                target.sendall(self._spoil(data) if from_agent else data)
                if from_agent and self._cut_at is not None and self.passed >= self._cut_at:
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spoil(self, data: bytes) -> bytes:
        if self._bytes_per_s:
            time.sleep(len(data) / self._bytes_per_s)
        with self._lock:
            start, stop = self.passed, self.passed + len(data)
            self.passed = stop
            cut, silent = self._cut_at, self._stop_at
            if self._flip_at is not None and start <= self._flip_at < stop:
                at = self._flip_at - start
                data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        kept = min(stop if limit is None else limit for limit in (cut, silent))
        return data[: max(0, kept - start)]
