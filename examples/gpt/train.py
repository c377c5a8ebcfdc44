"""Train the GPT of this folder under torchrun, saving and resuming with ckpt.

In: the command line. Out: a checkpoint run, and a file of one JSON line per step. The lines of the loop that are about
checkpoints are marked `# ckpt`. From the root of the repository, for example:

    torchrun --standalone --nproc-per-node 4 -m examples.gpt.train --layout tp_fsdp --checkpoints runs/gpt

The same command, with any layout and number of ranks, goes on where the run's newest complete checkpoint stands.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from examples.gpt.data import TextLoader, read_corpus
from examples.gpt.model import ModelConfig
from examples.gpt.parallel import LAYOUTS, Replica, build

COLLECTIVE_TIMEOUT_S = 60.0  # a rank that waits longer for the others gives up
GRADIENT_NORM_MAX = 1.0


class Checkpoints(Protocol):
    """What the loop needs: `ckpt.Checkpointer`, or nothing at all."""

    def restore(self, state: dict[str, Any]) -> int | None: ...
    def step(self, step: int, state: dict[str, Any], *, metrics: dict[str, float]) -> object: ...
    def close(self) -> None: ...


class NoCheckpoints:
    """Trains without saving, for comparison."""

    def restore(self, state: dict[str, Any]) -> int | None:
        return None

    def step(self, step: int, state: dict[str, Any], *, metrics: dict[str, float]) -> None:
        return None

    def close(self) -> None:
        return None


def train(options: argparse.Namespace) -> None:
    """Train from where the run stands up to `options.stop`. Every rank calls it."""
    config = ModelConfig(num_layers=options.layers, tied=options.tied)
    replica = build(
        options.layout, config, seed=options.seed, batch_shape=(options.global_batch, config.context_tokens)
    )
    optimizer = AdamW(replica.model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.warm_up, options.steps))
    loader = TextLoader(
        read_corpus(),
        context_tokens=config.context_tokens,
        global_batch=options.global_batch,
        seed=options.seed,
        dp_rank=replica.dp_rank,
        dp_size=replica.dp_size,
    )
    state: dict[str, Any] = {
        "model": replica.model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
    }
    checkpointer = open_checkpoints(options, state)  # ckpt
    first = checkpointer.restore(state) or 0  # ckpt
    try:
        for step in range(first + 1, options.stop + 1):
            start_s = time.monotonic()
            loss = train_step(replica, optimizer, scheduler, loader)
            log_step(options, step, loss, seconds=time.monotonic() - start_s)
            checkpointer.step(step, state, metrics={"loss": loss})  # ckpt
    finally:
        checkpointer.close()  # ckpt: waits until the last save is durable


def train_step(replica: Replica, optimizer: AdamW, scheduler: LambdaLR, loader: TextLoader) -> float:
    """One step over one global batch; returns the mean loss over all of its tokens, the same on every rank."""
    inputs, targets = next(loader)
    optimizer.zero_grad()
    loss = replica.forward_backward(inputs, targets)
    replica.clip_gradients(GRADIENT_NORM_MAX)
    optimizer.step()
    scheduler.step()
    return loss.item()


def learning_rate_factor(step: int, warm_up: int, steps: int) -> float:
    """Linear from 0 over `warm_up` steps, then along a cosine down to a tenth at `steps`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def open_checkpoints(options: argparse.Namespace, state: dict[str, Any]) -> Checkpoints:
    """`ckpt.Checkpointer` on the run, with this process's random streams added to the state; or none."""
    if options.checkpoints is None:
        return NoCheckpoints()
    import ckpt  # here, so that the example also trains where ckpt is not built

    state["rng"] = ckpt.RNG()
    return ckpt.Checkpointer(options.checkpoints, every=options.every, keep_last=options.keep_last)


def log_step(options: argparse.Namespace, step: int, loss: float, *, seconds: float) -> None:
    """Append one JSON line to the loss log; on rank 0 only."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0 or options.loss_log is None:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    line = {
        "step": step,
        "loss": loss,
        "layout": options.layout,
        "world": world,
        "step_s": round(seconds, 4),
        "time_s": time.time(),
    }
    with options.loss_log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="examples.gpt.train", description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="single")
    parser.add_argument(
        "--steps", type=int, default=60, help="length of the whole run, which the learning rate follows"
    )
    parser.add_argument("--stop", type=int, help="stop after this step; default: at the end of the run")
    parser.add_argument("--checkpoints", help="the run that they go to, a path or a URL; default: none are made")
    parser.add_argument("--every", type=int, default=10, help="save after every so many steps")
    parser.add_argument("--keep-last", type=int, help="keep only so many checkpoints; default: all")
    parser.add_argument("--loss-log", type=Path, help="append one JSON line per step to this file")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tied", action="store_true", help="output layer and embedding share one weight")
    parser.add_argument("--global-batch", type=int, default=8, help="sequences per step, over all ranks")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=10, help="steps")
    options = parser.parse_args(arguments)
    options.stop = options.steps if options.stop is None else options.stop
    return options


def main() -> None:
    """Set up the process and its group, train, take the group down."""
    options = parse_options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        train(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
