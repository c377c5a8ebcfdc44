"""A small training job that saves into agents, is killed at a step, and comes back.

What the ranks run; all functions on all ranks together. The loss and the state of a step are the same bit for bit on any number
of ranks (`replicated`): the batch is always the same micro-batches, dealt out, and summed in the order of their numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt.config import Memory, Options
from ckpt.errors import CheckpointError

WIDTH = 48
MICRO_BATCHES = 12  # dealt out to 1, 2, 3 or 4 ranks alike
SAVED_S = 60.0  # the longest that a save may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one start of the job does."""

    url: str
    folder: str  # for what the ranks tell: digests, losses
    nodes: tuple[dict[str, str], ...]  # per rank: its environment
    stop: int  # the last step
    every: int = 1000  # a checkpoint in the store
    memory_every: int = 2
    parity: int = 1
    group_size: int = 4
    layout: str = "replicated"  # or fsdp
    hang: bool = False  # at the last step, until killed
    wait: bool = True  # for each save, so that what is there at a step is known
    options: Options = dataclasses.field(default_factory=Options)


def train(job: Job) -> dict[str, Any]:
    """Restore, train to `stop`, and say what was restored, its digest, and the losses."""
    rank = dist.get_rank()
    os.environ.update(job.nodes[rank])
    torch.manual_seed(7)
    model = _model(job.layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    memory = Memory(every=job.memory_every, parity=job.parity, group_size=job.group_size)
    checkpointer = ckpt.Checkpointer(job.url, every=job.every, memory=memory, options=job.options)
    start = checkpointer.restore(state)
    out: dict[str, Any] = {
        "restored": None if checkpointer.restored is None else dataclasses.asdict(checkpointer.restored),
        "digest": digest(model, optimizer),
        "losses": {},
    }
    if start is None:
        out["digest"] = None
    for step in range((start or 0) + 1, job.stop + 1):
        out["losses"][step] = _step(model, optimizer, step, job.layout)
        of_step = digest(model, optimizer)
        if rank == 0:
            _write(Path(job.folder) / f"state-{step}.json", {"digest": of_step, "loss": out["losses"][step]})
        pending = checkpointer.step(step, state)
        if (
            pending is not None and job.wait and not pending.skipped
        ):  # the protection of what was restored may be under way
            try:
                pending.wait(SAVED_S)
            except CheckpointError:
                if job.hang:
                    break  # its agent, or one of the group, was killed
                raise
        _write(Path(job.folder) / f"rank-{rank}-of-{dist.get_world_size()}.json", {"step": step})
    while job.hang:
        time.sleep(1.0)
    checkpointer.close()
    return out


def undisturbed(stop: int) -> dict[int, float]:
    """The losses of a run that nothing happens to, on one rank and without checkpoints."""
    torch.manual_seed(7)
    model = _net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return {step: _step(model, optimizer, step, "replicated") for step in range(1, stop + 1)}


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of parameters and moments, whole, whatever the layout."""
    sums = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sums.update(name.encode())
        slots = optimizer.state.get(parameter, {})
        for tensor in (parameter, *(slots[key] for key in sorted(slots))):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            sums.update(whole.detach().contiguous().numpy().tobytes())
    return sums.hexdigest()


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


def _model(layout: str) -> nn.Module:
    model = _net()
    if layout == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def _batch(step: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(4, WIDTH, generator=generator)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, layout: str) -> float:
    optimizer.zero_grad()
    if layout == "fsdp":  # the whole batch on every rank
        data = torch.cat([_batch(step, number) for number in range(MICRO_BATCHES)])
        loss = (model(data) - data.flip(1)).square().mean()
        loss.backward()
        total = loss.item()
    else:
        total = _fill_gradients(model, step)
    optimizer.step()
    return total


def _fill_gradients(model: nn.Module, step: int) -> float:
    """Gradients of the batch, summed in the order of the micro-batches; its loss."""
    is_job = dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if is_job else (1, 0)
    rows = []
    for number in range(rank, MICRO_BATCHES, world):
        data = _batch(step, number)
        loss = (model(data) - data.flip(1)).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([loss.detach().reshape(1), *(grad.reshape(-1) for grad in grads)]))
    mine = torch.stack(rows)
    parts = [mine]
    if is_job:
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine)
    total = torch.zeros_like(mine[0])
    for number in range(MICRO_BATCHES):
        total += parts[number % world][number // world]
    total /= MICRO_BATCHES
    at = 1
    for parameter in model.parameters():
        parameter.grad = total[at : at + parameter.numel()].reshape(parameter.shape).clone()
        at += parameter.numel()
    return float(total[0])


def _write(path: Path, document: dict[str, Any]) -> None:
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(document))
    os.replace(new, path)
