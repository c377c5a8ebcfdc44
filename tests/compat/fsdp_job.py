"""One rank of a small training job that saves twice; run by test_independent_reader.py as `fsdp_job.py RANK WORLD FOLDER`.

Goal: a checkpoint of real ranks. Method: FSDP2 over gloo with uneven shards, a bfloat16 part, a tied weight, a buffer, AdamW, a
scheduler and random state. Rank 0 leaves the whole parameters, gathered by torch, in `expected.safetensors`.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)  # seven rows: uneven over two ranks
        self.inner = nn.Linear(6, 6)
        self.lonely = nn.Parameter(torch.randn(1, 6))  # one row: the second rank holds none
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(tokens)) + self.lonely)


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": ckpt.RNG()}
    state["half"] = {"x": torch.arange(10, dtype=torch.bfloat16)}
    for step in (1, 2):
        model(torch.arange(4) + rank).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ckpt.save(state, folder / "run", step=step, metrics={"loss": 1.0 / step}, metadata={"job": "test"})
    whole = {name: value.full_tensor().detach().clone() for name, value in model.named_parameters()}
    if rank == 0:
        save_file(whole, folder / "expected.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
