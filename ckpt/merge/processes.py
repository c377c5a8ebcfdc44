"""Do the tasks of a merge in worker processes of this machine.

In: a job. Out: its tasks, done. A worker is `python -m ckpt.merge`: it reads its job from the store, gets the numbers of tasks
on its standard input, one of them ahead, and says on its standard output which are done; JSON, a line each. A worker whose
parent is gone ends itself. The first failure ends all.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ckpt
from ckpt.agent.wire import rebuilt
from ckpt.engine.read import Progress
from ckpt.errors import CheckpointError
from ckpt.merge import remote
from ckpt.merge.job import Job, Stage

AHEAD = 2  # tasks that a worker knows of at a time: the one that it does, and the next
_TAIL_BYTES = 4000  # of what a worker wrote on its standard error, in a message
_END_S = 30.0  # that a worker may take to end when it is told to

Says = tuple[int, dict[str, Any] | None]  # number of a worker, and what it said; None: it ended


class Processes:
    """A `Runner`. Used by one thread."""

    def __init__(
        self, job: Job, num: int, storage_options: Mapping[str, Any] | None = None, progress: Progress | None = None
    ) -> None:
        self._progress = progress
        self._said: queue.SimpleQueue[Says] = queue.SimpleQueue()
        self._read: dict[int, int] = {}
        first = remote.described(job, storage_options)
        self._workers = [Child(number, first, self._said) for number in range(num)]

    @property
    def read_nbytes(self) -> int:
        return sum(self._read.values())

    def run(self, stage: Stage, tasks: Sequence[int]) -> None:
        left = list(tasks)
        out: dict[int, list[int]] = {worker.number: [] for worker in self._workers}
        for worker in self._workers:
            worker.say({"stage": stage.number})
        for _ in range(AHEAD):
            for worker in self._workers:
                self._give(worker, left, out)
        while any(out.values()):
            number, said = self._said.get()
            if said is None:
                raise self._workers[number].died()
            if "error" in said:
                raise rebuilt(said["error"])
            if "nbytes" in said and self._progress is not None:
                self._progress(int(said["nbytes"]))
            self._read[number] = int(said.get("read", self._read.get(number, 0)))
            if "done" in said:
                out[number].remove(int(said["done"]))
                self._give(self._workers[number], left, out)

    def close(self) -> None:
        for worker in self._workers:
            worker.end()

    def _give(self, worker: Child, left: list[int], out: dict[int, list[int]]) -> None:
        """The next task; when there is none, that the stage is over."""
        if left:
            out[worker.number].append(left[0])
            worker.say({"task": left.pop(0)})
        else:
            worker.say({"over": True})


class Child:
    """One process of `python -m ckpt.merge`."""

    def __init__(self, number: int, first: Mapping[str, Any], said: queue.SimpleQueue[Says]) -> None:
        self.number = number
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckpt.merge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
        self._tail = b""
        self._threads = [
            threading.Thread(target=self._listen, args=(said,), name="ckpt-merge-worker", daemon=True),
            threading.Thread(target=self._keep_tail, name="ckpt-merge-stderr", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.say(first)

    def say(self, what: Mapping[str, Any]) -> None:
        """A line to the worker; one that is gone is noticed by who listens."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError, OSError):
            self._child.stdin.write(json.dumps(what).encode() + b"\n")
            self._child.stdin.flush()

    def died(self) -> CheckpointError:
        code = self._child.wait()
        self._threads[1].join(1.0)
        text = self._tail.decode(errors="replace").strip()
        return CheckpointError(
            f"worker {self.number} of the merge ended with status {code}" + (f"; it said:\n{text}" if text else ""),
            kind="worker-died",
            hints=("`ckpt merge --resume` goes on with what is not done",),
        )

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    def end(self, timeout_s: float = _END_S) -> None:
        """Let it finish, or kill it. May be called twice."""
        self.say({"end": True})
        with contextlib.suppress(BrokenPipeError, OSError):
            if self._child.stdin is not None:
                self._child.stdin.close()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._child.stdout, self._child.stderr):
            if stream is not None:
                stream.close()

    def _listen(self, said: queue.SimpleQueue[Says]) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with contextlib.suppress(ValueError):
                said.put((self.number, json.loads(line)))
        said.put((self.number, None))

    def _keep_tail(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self._tail = (self._tail + line)[-_TAIL_BYTES:]


def _environment() -> dict[str, str]:
    """This process's, with this package on the path. One thread for NumPy where nothing else is said: workers share the cores."""
    here = os.fspath(Path(ckpt.__file__).resolve().parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }
