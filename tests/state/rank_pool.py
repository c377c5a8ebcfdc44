"""Real gloo ranks for tests: spawned once, then given one scenario after the other.

Goal: no test waits without a deadline, and no process outlives the pool. Method: one pipe per rank; a scenario is a
function of rank_scenarios by name; its traceback comes back.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

START_TIMEOUT_S = 120.0
_PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "ckpt.state"]
SCENARIO_TIMEOUT_S = 60.0


class RankPool:
    """`world` processes that run scenarios together. One owner; `close` ends them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)  # torch is imported once, not once per rank
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(there, rank, world, store), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._answers(START_TIMEOUT_S)

    def run(self, scenario: str, **options: Any) -> None:
        """Run a scenario on all ranks; AssertionError with the tracebacks of those where it failed."""
        for pipe in self._pipes:
            pipe.send((scenario, options))
        self._answers(SCENARIO_TIMEOUT_S)

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
            process.close()
        self._folder.cleanup()

    def _answers(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        open_pipes = dict(zip(self._pipes, range(self.world), strict=True))
        failed: list[str] = []
        while open_pipes:
            ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(open_pipes.values())} gave no answer in {timeout_s} s; {failed}"
            for pipe in ready:
                rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    text = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    text = "it died"
                if text:
                    failed.append(f"rank {rank}: {text}")
        assert not failed, "\n".join(failed)


def _serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    scenarios = importlib.import_module("tests.state.rank_scenarios")
    pipe.send("")
    while True:
        try:
            name, options = pipe.recv()
        except EOFError:
            break
        try:
            getattr(scenarios, name)(**options)
            pipe.send("")
        except Exception:  # the test that waits gets it
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()
