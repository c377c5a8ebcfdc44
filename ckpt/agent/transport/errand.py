"""Run one call to a peer on a thread of its own, so that whoever waits for it can always leave.

In: a function, a time for progress, a deadline. Out: its value, or an `Overdue` that says which of the two ran out. gRPC keeps
its deadlines almost always; this keeps ours always. Never writes to the caller's memory after `run` has returned.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")
_LINGER_S = 0.2  # a cancelled call mostly ends at once; then no thread is left behind


class Overdue(Exception):
    """The call was given up: `stalled`, `late` or `stopped`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Errand(Generic[Value]):
    """One call. `run` and `stop` belong to the caller's side, `beat`, `on_cancel` and `writing` to the work's."""

    def __init__(self, work: Callable[[Errand[Value]], Value], *, name: str) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._go, name=name, daemon=True)
        self._changed = threading.Condition()
        self._beat_at = 0.0
        self._cancel: Callable[[], object] | None = None
        self._over: str | None = None
        self._done = False
        self._value: Value
        self._error: BaseException | None = None

    def run(self, *, progress_s: float, ends_at: float) -> Value:
        """The value of the work. Raises what it raised, or Overdue when no beat came for `progress_s`, or at `ends_at`."""
        self._beat_at = time.monotonic()
        if self._over is not None:
            raise Overdue(self._over)
        self._thread.start()
        try:
            with self._changed:
                while not (self._done or self._over):
                    self._wait(progress_s, ends_at)
        finally:
            self.stop("stopped")  # an interrupt of the caller ends the call as well; after the end it does nothing
        if self._over is not None:
            self._thread.join(_LINGER_S)
            raise Overdue(self._over)
        if self._error is not None:
            raise self._error
        return self._value

    def _wait(self, progress_s: float, ends_at: float) -> None:
        now, quiet_until = time.monotonic(), self._beat_at + progress_s
        if now >= min(quiet_until, ends_at):
            self._give_up("late" if ends_at <= quiet_until else "stalled")
        else:
            self._changed.wait(min(quiet_until, ends_at) - now)

    def stop(self, why: str) -> None:
        """Give the call up, if it is still under way. Any thread may call it."""
        with self._changed:
            if not (self._done or self._over):
                self._give_up(why)

    def _give_up(self, why: str) -> None:
        self._over = why
        self._changed.notify_all()
        if self._cancel is not None:
            self._cancel()

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        """What ends the call from outside, once there is something to end. Must not wait."""
        with self._changed:
            self._cancel = cancel
            if self._over is not None:
                cancel()

    def beat(self) -> None:
        """There is progress."""
        self._beat_at = time.monotonic()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around every write to the caller's memory: Overdue once the caller has left; until the end, it stays."""
        with self._changed:
            if self._over is not None:
                raise Overdue(self._over)
            yield

    def _go(self) -> None:
        try:
            self._value = self._work(self)
        except BaseException as error:
            self._error = error
        with self._changed:
            self._done = True
            self._changed.notify_all()
