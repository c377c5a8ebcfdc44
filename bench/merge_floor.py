"""What this engine takes to read the same files and write as many bytes, without merging: floors for bench.merge.

Run: `python -m bench.merge_floor stream|calls RUN INTO`. `stream`: the pipeline of a merge (the same spans, reads, checks, writes
and commit) with the arithmetic left out; what it writes are bytes of nothing. `calls`: `ckpt.load` of every step into the same
tensors, one after the other, then `ckpt.save` of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ckpt
from ckpt.config import Options
from ckpt.merge import api
from ckpt.merge.compute import Computer
from ckpt.merge.job import Job
from ckpt.merge.reading import Filled
from ckpt.merge.run import Here, begin, carry_out
from ckpt.store.open import open_store


class _Nothing(Computer):
    """Gives as many bytes as a result has, at once."""

    def result(self, filled: Filled) -> NDArray[np.uint8]:
        if len(self._room) < filled.span.nbytes:
            self._room = np.zeros(filled.span.nbytes, np.uint8)
        return self._room[: filled.span.nbytes]


class _Streams(Here):
    """A runner without arithmetic."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        worker = self._worker
        worker._computer.close()
        worker._computer = _Nothing(job.plan, job.limits, worker._constants, job.options.copy_threads)


def stream(run: str, into: str) -> None:
    """Read every step of a run and write one."""
    recipe = {"recipe": 1, "sources": [{"run": run, "steps": "0.."}], "method": "uniform"}
    options = Options()
    store = open_store(into, options=options)
    with api.plan_merge(recipe) as plan:
        carry_out(begin(plan, store, options), lambda job, progress: _Streams(job))
    store.close()


def calls(run: str, into: str) -> None:
    """The same with the calls of a training loop."""
    import torch

    with ckpt.open(run) as newest:
        tensors = {name.removeprefix("model/"): torch.zeros(newest[name].shape) for name in newest}
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in Path(run).glob("step-*"))
    for step in steps:
        ckpt.load({"model": tensors}, run, step=step)
    ckpt.save({"model": tensors}, into, step=steps[-1])


if __name__ == "__main__":
    {"stream": stream, "calls": calls}[sys.argv[1]](*sys.argv[2:])
