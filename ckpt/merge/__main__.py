"""`python -m ckpt.merge`: a worker process of a merge, started by processes.py, or one that keeps an average up, started by
beside.py. People use `ckpt merge` and `ckpt watch`.

In: lines of JSON on standard input: first the job, then `{"stage": N}`, `{"task": N}`, `{"over": true}`, `{"end": true}`. Out:
lines of JSON on standard output: tasks done, bytes read, or one error. Ends at once when its parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

_lock = threading.Lock()


def main() -> int:
    """Read the job, then do tasks until told to end."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), name="ckpt-merge-stdin", daemon=True).start()
    from ckpt.agent.wire import described
    from ckpt.errors import CheckpointError

    try:
        _work(lines)
    except CheckpointError as error:
        _say({"error": described(error)})
        return error.exit_code
    return 0


def _listen(lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    ended = False
    for line in sys.stdin.buffer:
        said = json.loads(line)
        ended = ended or "end" in said
        lines.put(said)
    if not ended:
        os._exit(1)  # the parent is gone: what is not done has no record


def _say(what: dict[str, Any]) -> None:
    with _lock:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def _work(lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    from ckpt.merge import remote
    from ckpt.merge.work import Worker

    first = lines.get()
    if "online" in first:
        _keep_up(first, lines)
        return
    with remote.opened(first) as job:
        worker = Worker(job, lambda nbytes: _say({"nbytes": nbytes}))
        try:
            while "end" not in (said := lines.get()):
                if "stage" in said:
                    worker.do(
                        said["stage"], _Given(lines), lambda task: _say({"done": task, "read": worker.read_nbytes})
                    )
        finally:
            worker.close()


def _keep_up(first: dict[str, Any], lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Bring an average up to date whenever something landed; what was told meanwhile counts once."""
    import functools

    from ckpt.agent.wire import described
    from ckpt.config import OnlineAverage, Options
    from ckpt.errors import CheckpointError
    from ckpt.merge.online import Updater
    from ckpt.store.open import open_store

    os.nice(first["nice"])
    options, storage = Options(**first["options"]), first["storage_options"] or None
    rule = OnlineAverage(**{**first["online"], "rules": tuple(first["online"]["rules"])})
    updater = Updater(
        first["url"], rule, options, functools.partial(open_store, options=options, storage_options=storage)
    )
    said: dict[str, Any] = {}
    try:
        while "end" not in said:
            said = lines.get()
            while "end" not in said and not lines.empty():
                said = lines.get()
            try:
                updater.catch_up(lambda told: _say({"told": vars(told)}))
                _say({"up_to_date": True})
            except CheckpointError as error:
                _say({"failed": described(error)})
    finally:
        updater.close()


class _Given:
    """The tasks of one stage, as they come."""

    def __init__(self, lines: queue.SimpleQueue[dict[str, Any]]) -> None:
        self._lines, self._over = lines, False

    def take(self, *, wait: bool) -> int | None:
        while not self._over:
            try:
                said = self._lines.get(block=wait)
            except queue.Empty:
                return None
            if "task" in said:
                return int(said["task"])
            self._over = "over" in said
            if "end" in said:
                self._lines.put(said)
                self._over = True
        return None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # nothing is left to do; threads that wait for a store that does not answer would keep the process
