"""`python -m ckpt.merge`: a worker process of a merge, started by processes.py. People use `ckpt merge`.

In: lines of JSON on standard input: first the job, then `{"stage": N}`, `{"task": N}`, `{"over": true}`, `{"end": true}`. Out:
lines of JSON on standard output: tasks done, bytes read, or one error. Ends at once when its parent is gone.
"""

from __future__ import annotations

import importlib
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
    from ckpt.config import Options
    from ckpt.merge.job import Job, read_unfinished
    from ckpt.merge.plan import make_plan
    from ckpt.merge.run import recipe_again
    from ckpt.merge.sources import open_sources
    from ckpt.merge.work import Worker
    from ckpt.store.open import open_store

    first = lines.get()
    for module in first["imports"]:
        importlib.import_module(module)
    options, storage = Options(**first["options"]), first["storage_options"] or None
    store = open_store(first["url"], options=options, storage_options=storage)
    found = read_unfinished(store, first["step"], first["attempt"])
    recipe = recipe_again(found.recipe)
    opened = open_sources(
        recipe.sources, recipe.base, options, lambda url: open_store(url, options=options, storage_options=storage)
    )
    plan = make_plan(opened, recipe, image_bytes=found.image_bytes)
    job = Job(plan, store, found.attempt, found.limits, options)
    job.check(found)
    worker = Worker(job, lambda nbytes: _say({"nbytes": nbytes}))
    try:
        while "end" not in (said := lines.get()):
            if "stage" in said:
                worker.do(said["stage"], _Given(lines), lambda task: _say({"done": task, "read": worker.read_nbytes}))
    finally:
        worker.close()
        opened.close()
        store.close()


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
