"""Saves that go on after the call: a worker thread, and the handle that its caller keeps.

In: tasks that finish a save. Out: `PendingSave`. The worker never calls a collective. Errors are kept for whoever waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from ckpt.engine.save import Saved


class PendingSave:
    """A save that goes on in the background. `wait()` or `done()` from any thread."""

    def __init__(self, step: int, future: Future[Saved]) -> None:
        self.step = step
        self._future = future

    @staticmethod
    def done_with(saved: Saved) -> PendingSave:
        """A save that is over already."""
        future: Future[Saved] = Future()
        future.set_result(saved)
        return PendingSave(saved.step, future)

    def done(self) -> bool:
        """True when the outcome is known."""
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> Saved:
        """Return when the checkpoint is durable; raise what stopped it. TimeoutError after `timeout_s` seconds."""
        return self._future.result(timeout_s)


class Background:
    """One worker thread that finishes saves in order. Owned by the session's user; `close` may be called twice."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Saved], Callable[[], Saved]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], Saved]) -> Future[Saved]:
        """Run `task()` after all earlier ones."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckpt-save", daemon=True)
            self._thread.start()
        future: Future[Saved] = Future()
        self._tasks.put((future, task))
        return future

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what was submitted and stop the thread."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits, nothing is swallowed
                future.set_exception(error)
