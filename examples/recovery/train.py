"""The job of the demo: one rank per node under torchrun, snapshots in memory, checkpoints in a store.

In: the environment of torchrun, a run, a folder for its log. Out: JSON lines: what was restored, every step with its loss. The
batch of a step is the same micro-batches on any number of ranks, summed in the order of their numbers: so losses are equal in
every bit, however often the job came back, on however many nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt.config import Memory

WIDTH = 256
MICRO_BATCHES = 12
JOIN_S = 60.0  # ranks of one start may come so far apart
EXCHANGE_S = 10.0  # a node whose link is cut is noticed after that


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer, the same everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, group: Any = None) -> float:
    """One step on the batch of `step`, dealt out to the ranks of `group`; its loss."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    mine = torch.stack([_gradients(model, step, number) for number in range(rank, MICRO_BATCHES, world)])
    parts = [mine]
    if group is not None:
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine, group=group)
    total = torch.zeros_like(mine[0])
    for number in range(MICRO_BATCHES):
        total += parts[number % world][number // world]
    total /= MICRO_BATCHES
    at = 1
    for parameter in model.parameters():
        parameter.grad = total[at : at + parameter.numel()].reshape(parameter.shape).clone()
        at += parameter.numel()
    optimizer.step()
    return float(total[0])


def undisturbed(steps: int) -> dict[int, float]:
    """The losses of a run that nothing happens to: one process, no checkpoints."""
    # As the ranks; and two threads that share a busy processor wait for each other for a minute.
    torch.set_num_threads(1)
    model, optimizer = build()
    return {step: train_step(model, optimizer, step) for step in range(1, steps + 1)}


def _gradients(model: nn.Module, step: int, number: int) -> torch.Tensor:
    """Loss and gradients of one micro-batch, flat."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    data = torch.randn(8, WIDTH, generator=generator)
    loss = (model(data) - data.flip(1)).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach().reshape(1), *(gradient.reshape(-1) for gradient in gradients)])


class Log:
    """JSON lines of this node, each whole at once."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def tell(self, event: str, **fields: Any) -> None:
        """One line."""
        os.write(self._fd, json.dumps({"time": time.time(), "event": event, **fields}).encode() + b"\n")


def main() -> None:
    """One rank, from its start to its end or the next failure."""
    given = _parse()
    log = Log(given.events)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=JOIN_S))
    group = dist.new_group(timeout=timedelta(seconds=EXCHANGE_S))
    rank, world = dist.get_rank(), dist.get_world_size()
    log.tell("started", rank=rank, world=world, pid=os.getpid())
    model, optimizer = build()
    state = {"model": model, "optimizer": optimizer}
    memory = Memory(
        every=given.memory_every,
        parity=given.parity,
        group_size=4,
        address=os.environ.get("NODE_ADDRESS"),
    )
    with ckpt.Checkpointer(given.checkpoints, every=given.every, memory=memory) as checkpointer:
        first = checkpointer.restore(state) or 0
        restored = None if checkpointer.restored is None else dataclasses.asdict(checkpointer.restored)
        log.tell("restored", rank=rank, world=world, restored=restored)
        waiting: list[ckpt.PendingSave] = []
        for step in range(first + 1, given.steps + 1):
            loss = train_step(model, optimizer, step, group)
            log.tell("step", rank=rank, step=step, loss=loss)
            pending = checkpointer.step(step, state)
            waiting = [one for one in [*waiting, pending] if one is not None]
            for one in [one for one in waiting if one.done()]:
                waiting.remove(one)
                if one.failure() is None:
                    log.tell("kept", rank=rank, step=one.step, tier=one.wait().tier)
            time.sleep(given.pause)
    log.tell("ended", rank=rank)
    dist.destroy_process_group()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--memory-every", type=int, default=2)
    parser.add_argument("--parity", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of work that a step stands for")
    return parser.parse_args()


if __name__ == "__main__":
    main()
