"""A rank of a pipeline that keeps snapshots in memory, each rank on a node of its own: saves, says what, waits to be killed.

`python -m torch.distributed.run --nproc-per-node 3 -m tests.workers.recover_job URL FOLDER`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import ckpt
from ckpt.config import Memory

WIDTH, STEPS = 32, 4
ALONE_S = 90.0  # a rank that nobody kills


def environment(folder: Path, rank: int) -> dict[str, str]:
    """Of what runs on the node of a rank."""
    return {
        "CKPT_NODE": f"node-{rank}",
        "CKPT_AGENT_RUNTIME_FOLDER": str(folder / f"r{rank}"),
        "CKPT_AGENT_MEMORY_FOLDER": str(folder / f"m{rank}"),
        "CKPT_AGENT_RESERVE_BYTES": "0",
        "CKPT_AGENT_BEGIN_TIMEOUT_S": "30",
        "CKPT_PEER_CONNECT_S": "2",
    }


class Stages(torch.nn.Module):
    """The layers of these stages, under the names that they have in the whole model."""

    def __init__(self, stages: list[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({str(n): torch.nn.Linear(WIDTH, WIDTH) for n in stages})


def state_of(stages: list[int]) -> dict[str, object]:
    model = Stages(stages)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01), "rng": ckpt.RNG()}


def tensors(state: dict[str, object]) -> dict[str, np.ndarray]:
    """Parameters and optimizer state by name."""
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, Stages) and isinstance(optimizer, torch.optim.Optimizer)
    out = {}
    for name, parameter in model.named_parameters():
        out[name] = parameter.detach().numpy()
        out |= {f"{name}/{slot}": value.numpy() for slot, value in optimizer.state[parameter].items()}
    return out


def main(url: str, folder: str) -> None:
    rank = int(os.environ["RANK"])
    os.environ |= environment(Path(folder), rank)
    dist.init_process_group("gloo")
    torch.manual_seed(rank)
    state = state_of([rank])
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, Stages) and isinstance(optimizer, torch.optim.Optimizer)
    checkpointer = ckpt.Checkpointer(url, every=1000, memory=Memory(every=2, parity=1, group_size=3))
    for step in range(1, STEPS + 1):
        model.layers[str(rank)](torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pending = checkpointer.step(step, state)
        if pending is not None:
            assert pending.wait().tier == "memory"
    path = Path(folder) / f"{rank}.new.npz"
    np.savez(path, **tensors(state))
    path.rename(Path(folder) / f"{rank}.npz")
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    time.sleep(ALONE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
