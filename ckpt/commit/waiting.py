"""Wait for something to appear in a store, never without an end.

In: a clock and a deadline. Out: pauses that grow. Never looks at a store itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from ckpt.config import Options


class Clock(Protocol):
    """Time that only goes forward; tests pass a simulated one."""

    def monotonic_s(self) -> float:
        """Seconds since some moment."""

    def sleep(self, pause_s: float) -> None:
        """Let `pause_s` seconds pass."""


class SystemClock:
    """The clock of this machine."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def sleep(self, pause_s: float) -> None:
        time.sleep(pause_s)


SYSTEM_CLOCK = SystemClock()


def looks(timeout_s: float, *, options: Options, clock: Clock) -> Iterator[float]:
    """Yield the seconds waited so far: at once, then after growing pauses, and a last time at the deadline.

    Pauses grow by half from `poll_start_s` to `poll_max_s`: a committer sees a prompt rank within milliseconds, and a
    slow one does not cost the store more than a few requests a second.
    """
    start_s = clock.monotonic_s()
    pause_s = options.poll_start_s
    while True:
        waited_s = clock.monotonic_s() - start_s
        yield waited_s
        if waited_s >= timeout_s:
            return
        clock.sleep(min(pause_s, max(timeout_s - waited_s, 0.0) + 1e-4))
        pause_s = min(pause_s * 1.5, options.poll_max_s)
