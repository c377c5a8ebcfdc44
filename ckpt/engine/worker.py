"""A thread that runs what it is given, one after the other.

In: callables. Out: futures. The thread is a daemon: one that nobody closed does not keep a process alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ckpt.kernels import set_thread_nice

_T = TypeVar("_T")


class Worker:
    """One thread, started when it is first needed. Any thread may submit; `close` may be called twice.

    Args:
        nice: how far the thread stands back behind others, 0 to 19.
    """

    def __init__(self, name: str, nice: int) -> None:
        self._name, self._nice = name, nice
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if it does not run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def submit(self, task: Callable[[], _T]) -> Future[_T]:
        """Run `task()` after all earlier ones."""
        self.start()
        future: Future[_T] = Future()
        self._tasks.put((future, task))
        return future

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what was submitted and stop the thread. False: it is still at it after `timeout_s` seconds, and left alone."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _run(self) -> None:
        set_thread_nice(self._nice)
        while (item := self._tasks.get()) is not None:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits, nothing is swallowed
                future.set_exception(error)
            del item, future, task  # nothing of a step is kept until the next one
