"""What the ranks of test_passing.py run: loads in which ranks read for each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckpt
from ckpt.config import MIB, Options
from ckpt.engine.passing import Passing
from ckpt.errors import CheckpointError

ROWS, COLUMNS = 4099, 1536  # 24 MiB: three units; no number of rows that ranks share evenly
OPTIONS = Options(
    exchange="always", read_buffer_bytes_max=40 * MIB, exchange_round_bytes=8 * MIB, exchange_timeout_s=30.0
)


def whole(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def state(placement: Any, *, fill: bool) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = [whole(i) if fill else torch.full((ROWS, COLUMNS), -1.0) for i in range(2)]
    return {str(i): distribute_tensor(tensor, mesh, [placement]) for i, tensor in enumerate(full)}


def load_all_ways(folder: str, way: str) -> dict[str, Any]:
    """Load onto three layouts; what differs from what was saved, the bytes read of the last one, and memory left behind."""
    original = Passing._make_shared
    if way == "group" or (way == "mixed" and dist.get_rank() == 0):
        Passing._make_shared = lambda self: None  # type: ignore[method-assign]
    try:
        ckpt.save({"model": state(Shard(0), fill=True)}, folder, step=1, options=OPTIONS)
        wrong, read, before = [], 0, _shared_memory()
        for placement in (Shard(0), Shard(1), Replicate()):
            target = state(placement, fill=False)
            read = ckpt.load({"model": target}, folder, options=OPTIONS).read_nbytes
            for name, expected in state(placement, fill=True).items():
                if not torch.equal(target[name].to_local(), expected.to_local()):
                    wrong.append(f"{name} on {placement}")
        left = sorted(_shared_memory() - before)
    finally:
        Passing._make_shared = original  # type: ignore[method-assign]
    return {"wrong": wrong, "read": read, "stored": 2 * ROWS * COLUMNS * 4, "left": left}


def load_damaged(folder: str) -> str:
    """The class of the error of a load when rank 1's image is damaged."""
    ckpt.save({"model": state(Shard(0), fill=True)}, folder, step=1, options=OPTIONS)
    if dist.get_rank() == 0:
        image = next(Path(folder).rglob("00001-of-*.safetensors"))
        with image.open("r+b") as file:
            file.seek(image.stat().st_size // 2)
            file.write(b"\xa5" * 64)
    dist.barrier()
    try:
        ckpt.load({"model": state(Shard(1), fill=False)}, folder, options=OPTIONS)
    except CheckpointError as error:
        return type(error).__name__
    return ""


def _shared_memory() -> set[str]:
    """Mappings and descriptors of this process that passing made."""
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "ckpt-passing" in line}
    opened = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "ckpt-passing" in os.readlink(f"/proc/self/fd/{name}"):
                opened.add(name)
        except OSError:
            continue
    return mapped | opened
