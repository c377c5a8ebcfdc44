"""What an agent did, as JSON lines in two files that take turns.

In: events with fields. Out: lines with time (UTC) and event first. Any thread. A full disk stops no agent: what cannot be written
is dropped and counted.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from pathlib import Path
from typing import Any

from ckpt.config import AGENT_LOG_PART_BYTES, EVENT_LINE_BYTES_MAX

_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class AgentLog:
    """The log of one agent. The part before the last has `.1` at its end; older ones are gone."""

    def __init__(self, path: Path, *, part_bytes: int = AGENT_LOG_PART_BYTES) -> None:
        self._path, self._part_bytes = path, part_bytes
        self._lock = threading.Lock()
        self.num_dropped = 0

    def tell(self, event: str, **fields: Any) -> None:
        """Write one event."""
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, "pid": os.getpid(), **fields}, default=str) + "\n"
        if len(line) > EVENT_LINE_BYTES_MAX:
            line = json.dumps({"time": time, "event": event, "pid": os.getpid(), "left_out": sorted(fields)}) + "\n"
        with self._lock:
            try:
                self._write(line.encode())
            except OSError:
                self.num_dropped += 1

    def _write(self, line: bytes) -> None:
        fd = os.open(self._path, _OPEN, 0o600)
        try:
            if os.fstat(fd).st_size + len(line) > self._part_bytes:
                os.replace(self._path, f"{self._path}.1")
                os.close(fd)
                fd = os.open(self._path, _OPEN, 0o600)
            os.write(fd, line)
        finally:
            os.close(fd)


def tail(path: Path, num_lines: int, *, bytes_max: int = EVENT_LINE_BYTES_MAX) -> list[str]:
    """The last lines of a file; none when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - bytes_max))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError:
        return []
