"""How a training loop saves with each system, as its user would write it.

In: a job and a folder. Out: seconds of stall per save. All ranks call alike. One saver is used for one loop.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import ckpt
from bench.jobs import Job


class Saver:
    """Saves nothing: the loop that the others are compared with."""

    name = "nothing"

    def start(self, job: Job, folder: Path, every: int) -> None:
        """Get ready; not timed."""

    def after(self, step: int, due: bool) -> None:
        """Called after every step of the loop, timed. `due`: it is time to save."""

    def finish(self) -> list[float]:
        """Wait until all saves are durable; the seconds that each one has held up training."""
        return []

    def close(self) -> None:
        """Let go of everything; not timed."""


class DcpSaver(Saver):
    """torch.distributed.checkpoint with its defaults."""

    name = "dcp.save"

    def start(self, job: Job, folder: Path, every: int) -> None:
        self._state, self._folder = dict(job.tensors), folder
        self._stalls: list[float] = []

    def after(self, step: int, due: bool) -> None:
        if due:
            start = time.perf_counter()
            self._save(step)
            self._stalls.append(time.perf_counter() - start)

    def _save(self, step: int) -> None:
        dcp.save(dict(self._state), checkpoint_id=self._folder / f"dcp-{step}")

    def finish(self) -> list[float]:
        return self._stalls


class DcpAsyncSaver(DcpSaver):
    """dcp.async_save in a thread, with a gloo group of its own; each save waits for the one before, as DCP asks for.

    `keep` hands the same stager to every call, so that its buffers are used again. Made once and used for all loops.
    """

    def __init__(self, *, keep: bool) -> None:
        self.name = "dcp.async_save, stager kept" if keep else "dcp.async_save"
        self._group = dist.new_group(backend="gloo")
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options) if keep else None
        self._future: Any = None

    def _save(self, step: int) -> None:
        if self._future is not None:
            self._future.result()
        self._future = dcp.async_save(
            dict(self._state),
            checkpoint_id=self._folder / f"dcp-{step}",
            process_group=self._group,
            async_stager=self._stager,
        )

    def finish(self) -> list[float]:
        if self._future is not None:
            self._future.result()
            self._future = None
        return self._stalls

    def end(self) -> None:
        """After the last loop."""
        if self._stager is not None:
            self._stager.close()


class OurSaver(Saver):
    """`ckpt.Checkpointer`, made and restored before the loop."""

    def __init__(self, *, background: bool) -> None:
        self.name = "ckpt" if background else "ckpt, blocking"
        self._background = background

    def start(self, job: Job, folder: Path, every: int) -> None:
        self._job, self._pending = job, list[Any]()
        self._checkpointer = ckpt.Checkpointer(folder / "run", every=every, background=self._background)
        ckpt.attach(job.optimizer)
        self._checkpointer.restore(job.state)
        self._in_call: list[float] = []

    def after(self, step: int, due: bool) -> None:
        start = time.perf_counter()
        pending = self._checkpointer.step(step, self._job.state)
        if pending is not None:
            self._in_call.append(time.perf_counter() - start)
            self._pending.append(pending)

    def finish(self) -> list[float]:
        for pending in self._pending:
            pending.wait()
        return [max(call, pending.stall_s) for call, pending in zip(self._in_call, self._pending, strict=True)]

    def close(self) -> None:
        self._checkpointer.close()
