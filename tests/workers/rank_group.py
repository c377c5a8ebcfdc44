"""Real processes for tests of many ranks: forked from a server that has imported torch once, each wait with a deadline.

A `RankGroup` is `world` processes that form a gloo group and run functions of a module by name, one after the other. The
rendezvous store is in the test process, as torchrun has it in its agent: it outlives any rank that is killed. Only
processes that a group started are ever ended, by their own objects.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "ckpt",
    "ckpt.store.s3",
    "tests.workers.crashing",
    "tests.workers.layouts",
    "tests.workers.refusals",
]
START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0


class RankGroup:
    """`world` processes with ranks. One owner; `close` ends them, however they are."""

    def __init__(
        self,
        world: int,
        *,
        environment: Mapping[str, str] | None = None,
        collective_timeout_s: float = 60.0,
        wait_until_up: bool = True,
    ) -> None:
        import torch.distributed as dist

        self.world = world
        self.is_whole = True  # False once a call failed: the ranks may be out of step
        # Not kept by the ranks: a rank that dies takes nothing with it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            here, there = context.Pipe()
            variables = {**(environment or {}), "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            process = context.Process(
                target=_serve,
                args=(there, rank, world, self._store.port, variables, collective_timeout_s),
                daemon=True,
                name=f"rank-{rank}",
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)
        if wait_until_up:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        """Return when all ranks are in the group."""
        for rank, answer in enumerate(self._answers(START_TIMEOUT_S)):
            assert answer == {"value": None}, f"rank {rank} did not start: {answer}"

    def start(self, function: str, *args: Any) -> None:
        """Have all ranks call `module:function` with these arguments."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def outcomes(self, timeout_s: float) -> list[dict[str, Any]]:
        """Per rank what became of the call: {"value": ...}, {"error": traceback}, or {"died": exit code}.

        AssertionError for a rank that has neither answered nor died after `timeout_s`.
        """
        return self._answers(timeout_s)

    def call(self, function: str, *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call on all ranks and return what each returned; AssertionError with the tracebacks when one raised."""
        self.start(function, *args)
        self.is_whole = False
        answers = self.outcomes(timeout_s)
        failed = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if "value" not in answer]
        assert not failed, "\n".join(failed).replace("\\n", "\n")
        self.is_whole = True
        return [answer["value"] for answer in answers]

    def close(self) -> None:
        """End all processes. May be called twice."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(_END_TIMEOUT_S)
            process.close()
        self._pipes, self.processes = [], []

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes)}
        answers: list[dict[str, Any]] = [{} for _ in self._pipes]
        while waiting:
            ready = wait([self._pipes[rank] for rank in waiting.values()], max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} gave no answer in {timeout_s:.0f} s; the others: {answers}"
            for pipe in ready:
                rank = waiting.pop(id(pipe))
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(_END_TIMEOUT_S)
                    answers[rank] = {"died": self.processes[rank].exitcode}
        return answers


def _serve(pipe: Connection, rank: int, world: int, port: int, variables: dict[str, str], timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(variables)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    pipe.send({"value": None})
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        module, _, name = function.partition(":")
        try:
            answer = {"value": getattr(importlib.import_module(module), name)(*args)}
        except BaseException:  # the test that waits gets it
            answer = {"error": traceback.format_exc()}
        try:
            pipe.send(answer)
        except BrokenPipeError:
            break
    os._exit(0)  # whatever hangs in a group of this process, nothing here is worth waiting for
