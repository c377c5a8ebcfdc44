"""Do the tasks of a merge on the nodes of a Ray cluster (`pip install 'ckpt[ray]'`).

In: a job. Out: its tasks, done. One task of the merge is one Ray task, so Ray decides where it runs and starts it anew when a
node is lost; a task that was done half leaves nothing behind. Sources and result must be reachable from every node under the same
URLs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt.engine.read import Progress
from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.merge import remote
from ckpt.merge.job import Job, Stage
from ckpt.merge.work import TaskList, Worker


class OnRay:
    """A `Runner`. Used by one thread.

    Args:
        num: tasks at a time; what they may take of memory is decided by it.
        address: of the cluster, as `ray.init` takes it; the one that is there, or a new one on this machine, when None.
    """

    def __init__(
        self,
        job: Job,
        num: int,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        *,
        address: str | None = None,
    ) -> None:
        self._ray = _ray()
        self._said, self._num, self._progress = remote.described(job, storage_options), num, progress
        self._read_nbytes = 0
        self._began = not self._ray.is_initialized()
        if self._began:
            self._ray.init(address=address, include_dashboard=False, log_to_driver=False)
        self._do = self._ray.remote(num_cpus=1, max_retries=3)(do)

    @property
    def read_nbytes(self) -> int:
        return self._read_nbytes

    def run(self, stage: Stage, tasks: Sequence[int]) -> None:
        left = list(tasks)
        out: list[Any] = []
        while left or out:
            while left and len(out) < self._num:
                out.append(self._do.remote(self._said, stage.number, left.pop(0)))
            done, out = self._ray.wait(out, num_returns=1)
            self._read_nbytes += self._got(done[0])

    def close(self) -> None:
        if self._began:
            self._began = False
            self._ray.shutdown()

    def _got(self, done: Any) -> int:
        """What a task has read; its own error when it failed."""
        try:
            nbytes = int(self._ray.get(done))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise (error.cause if isinstance(error.cause, CheckpointError) else cause) from None
        except self._ray.exceptions.RayError as error:
            raise CheckpointError(
                f"Ray could not do a task of the merge: {type(error).__name__}: {str(error).splitlines()[0]}",
                kind="worker-died",
                hints=("`ckpt merge --resume` goes on with what is not done",),
            ) from error
        if self._progress is not None:
            self._progress(nbytes)
        return nbytes


def do(said: Mapping[str, Any], stage: int, task: int) -> int:
    """One task, on whatever node; bytes read."""
    with remote.opened(said) as job:
        worker = Worker(job)
        try:
            worker.do(stage, TaskList([task]), lambda number: None)
        finally:
            worker.close()
        return worker.read_nbytes


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InvalidInputError(
            "a merge on Ray needs the package `ray`, which is not installed",
            kind="no-ray",
            hints=("pip install 'ckpt[ray]'", "or `--workers N` on this machine, or `torchrun ... -m ckpt merge ...`"),
        ) from None
