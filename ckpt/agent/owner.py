"""Which process something belongs to, told so that a reused pid is not taken for it.

In: pids, /proc. Out: frozen records. A process is its pid, its start time and the boot that both are of. Never sends a signal.
"""

from __future__ import annotations

import functools
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

_ENDED = "ZX"  # states of /proc/PID/stat of a process whose memory is gone


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One process of one boot."""

    pid: int
    start_ticks: int  # since the boot, field 22 of /proc/PID/stat
    boot_id: uuid.UUID

    @staticmethod
    def of(pid: int) -> Owner | None:
        """The process that has this pid now; None when there is none, or it has ended and was not waited for."""
        fields = _stat(pid)
        # The first thread can have ended while others still hold memory and files: then the process has not.
        if fields is None or (fields[0] in _ENDED and int(fields[17]) <= 1):
            return None
        return Owner(pid=pid, start_ticks=int(fields[19]), boot_id=boot_id())

    @staticmethod
    def current() -> Owner:
        """This process."""
        owner = Owner.of(os.getpid())
        assert owner is not None
        return owner

    @property
    def is_alive(self) -> bool:
        """Whether it runs. A process of another pid namespace does not seem to: files it holds are locked as well."""
        return Owner.of(self.pid) == self


@functools.cache
def boot_id() -> uuid.UUID:
    """Of this boot of the machine."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())


def since_boot_ns() -> int:
    """Nanoseconds since the boot, suspended time included: the clock of one `boot_id`, which nobody sets."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third, the state, on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
