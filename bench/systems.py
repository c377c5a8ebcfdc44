"""The systems that are compared: how each one saves and loads a state of DTensors.

In: a state and a folder. Out: nothing; the state is saved when a call returns, durable where the system syncs. All ranks
call alike. What each call does is written as a user of that system would write it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import ckpt
from bench.workloads import State, local_of

Phases = dict[str, float]


class System(Protocol):
    """One way to save and load."""

    name: str

    def save(self, state: State, folder: Path, step: int) -> Phases: ...

    def load(self, state: State, folder: Path, step: int) -> Phases: ...


class Ours:
    """ckpt: one run for all steps, so that later saves reuse the plan, as in training."""

    name = "ckpt"

    def save(self, state: State, folder: Path, step: int) -> Phases:
        return ckpt.save({"model": state}, folder / "run", step=step).seconds

    def load(self, state: State, folder: Path, step: int) -> Phases:
        return ckpt.load({"model": state}, folder / "run", step=step).seconds

    def async_save(self, state: State, folder: Path, step: int) -> Callable[[], Phases]:
        pending = ckpt.async_save({"model": state}, folder / "run", step=step)
        return lambda: pending.wait().seconds


class OursFenced(Ours):
    """ckpt as a training loop uses it: an optimizer holds the tensors, so that they are copied while training goes on.

    A forward and a backward pass come after the call (here a pause), then a step of the optimizer, which waits at the fence.
    """

    PASS_S = 0.1

    def __init__(self, pass_s: float = PASS_S) -> None:
        self.pass_s = pass_s
        if pass_s != self.PASS_S:
            self.name = f"ckpt, {pass_s:g} s to the step"
        self._optimizer: torch.optim.Optimizer | None = None
        self.stall_s = 0.0  # of the last save: in the call, and at the fence

    def async_save(self, state: State, folder: Path, step: int) -> Callable[[], Phases]:
        if self._optimizer is None:
            self._optimizer = torch.optim.SGD(state.values())  # there are no gradients: a step changes nothing
            ckpt.attach(self._optimizer)
        pending = ckpt.async_save({"model": state}, folder / "run", step=step)
        time.sleep(self.pass_s)
        self._optimizer.step()
        self.stall_s = pending.stall_s
        return lambda: pending.wait().seconds


class OursNewRun(Ours):
    """ckpt into a new run every time: nothing planned before, as the first save of a job."""

    name = "ckpt, new run"

    def save(self, state: State, folder: Path, step: int) -> Phases:
        return ckpt.save({"model": state}, folder / f"new-run-{step}", step=step).seconds


class Dcp:
    """torch.distributed.checkpoint with its defaults (it syncs its files)."""

    name = "dcp"

    def save(self, state: State, folder: Path, step: int) -> Phases:
        dcp.save(dict(state), checkpoint_id=folder / f"dcp-{step}")
        return {}

    def load(self, state: State, folder: Path, step: int) -> Phases:
        dcp.load(dict(state), checkpoint_id=folder / f"dcp-{step}")
        return {}

    def load_alone(self, state: State, folder: Path, step: int) -> Phases:
        """One rank loads whole tensors by itself."""
        dcp.load(dict(state), checkpoint_id=folder / f"dcp-{step}", no_dist=True)
        return {}


class DcpAsync:
    """dcp.async_save in thread mode with a gloo group of its own (in the group of the training it can deadlock).

    `keep` hands the same stager to every call, so that its buffers are reused.
    """

    def __init__(self, *, keep: bool) -> None:
        self.name = "dcp, stager kept" if keep else "dcp"
        self._group = dist.new_group(backend="gloo")
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options) if keep else None

    def async_save(self, state: State, folder: Path, step: int) -> Callable[[], Phases]:
        future: Any = dcp.async_save(
            dict(state),
            checkpoint_id=folder / f"dcp-async-{step}",
            process_group=self._group,
            async_stager=self._stager,
        )

        def wait() -> Phases:
            future.result()
            return {}

        return wait

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class Safetensors:
    """A floor: every rank writes its own parts with safetensors and syncs. It cannot reshard and has no commit."""

    name = "safetensors+fsync"

    def save(self, state: State, folder: Path, step: int) -> Phases:
        target = folder / f"safetensors-{step}"
        target.mkdir(parents=True, exist_ok=True)
        file = target / f"{dist.get_rank()}.safetensors"
        save_file({name: local_of(tensor) for name, tensor in state.items()}, file)
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return {}

    def load(self, state: State, folder: Path, step: int) -> Phases:
        found = load_file(folder / f"safetensors-{step}" / f"{dist.get_rank()}.safetensors")
        with torch.no_grad():
            for name, tensor in state.items():
                local_of(tensor).copy_(found[name])
        return {}
