"""Processes that form a gloo group, run one function each, and hand rank 0's answer back.

In: a module-level function. Out: what it returned on rank 0. Every wait has a deadline; ranks left over are ended.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.machine import set_threads


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of the processes of a benchmark."""

    rank: int
    size: int
    folder: Path  # scratch, shared by the ranks

    def together(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def slowest(self, value: float) -> float:
        """The largest value of all ranks. All ranks call."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum over all ranks. All ranks call."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=how)
        return float(tensor[0])


Body = Callable[..., Any]


def run_ranks(body: Body, size: int, folder: Path, timeout_s: float = 3600.0, /, **arguments: Any) -> Any:
    """`body(Rank, **arguments)` on `size` ranks; returns rank 0's answer (JSON values).

    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError after `timeout_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.time_ns()}"
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments_of = (body, size, folder, meeting, answer, arguments)
    ranks = [context.Process(target=_start, args=(r, *arguments_of), daemon=True) for r in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode not in (None, 0) for process in ranks):
                raise RuntimeError(_first_failure(folder, size))
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks did not finish within {timeout_s:.0f} s")
            time.sleep(0.02)
        if any(process.exitcode for process in ranks):
            raise RuntimeError(_first_failure(folder, size))
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        meeting.unlink(missing_ok=True)
    return json.loads(answer.read_text())


def _first_failure(folder: Path, size: int) -> str:
    files = [folder / f"failure-{rank}.txt" for rank in range(size)]
    found = sorted((f.stat().st_mtime, f.read_text()) for f in files if f.exists())
    return found[0][1] if found else "a rank died without a word"


def _start(rank: int, body: Body, size: int, folder: Path, meeting: Path, answer: Path, arguments: Any) -> None:
    failure = folder / f"failure-{rank}.txt"
    failure.unlink(missing_ok=True)
    set_threads()
    try:
        timeout = datetime.timedelta(seconds=600)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
        found = body(Rank(rank=rank, size=size, folder=folder), **arguments)
        if rank == 0:
            answer.write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - goes to the process that started the ranks
        failure.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
