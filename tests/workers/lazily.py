"""Saves that are copied while real ranks train: what the ranks run; all functions on all ranks together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckpt
from ckpt.errors import SaveFailedError

OPTIONS = ckpt.Options(chunk_bytes=4096, commit_timeout_s=60.0, poll_start_s=0.001, poll_max_s=0.02)
WIDTH = 40


@contextmanager
def failpoint(text: str, rank: int | None = None) -> Iterator[None]:
    """A failpoint on all ranks, or on one."""
    os.environ["CKPT_FAILPOINT"] = text
    if rank is not None:
        os.environ["CKPT_FAILPOINT_RANK"] = str(rank)
    try:
        yield
    finally:
        os.environ.pop("CKPT_FAILPOINT")
        os.environ.pop("CKPT_FAILPOINT_RANK", None)


def training(kind: str) -> tuple[dict[str, Any], Any]:
    """A model on all ranks, its optimizer, and a function that trains one step."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Linear(3 * WIDTH, WIDTH))
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
    elif kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, foreach=kind == "fsdp2")

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        net(torch.randn(8, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"model": net, "optimizer": optimizer}, step


def local_values(state: dict[str, Any]) -> list[torch.Tensor]:
    """Clones of all that this rank holds."""
    tensors = list(state["model"].parameters())
    tensors += [t for slots in state["optimizer"].state.values() for t in slots.values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def saves_at_every_step_are_exact(root: str, kind: str) -> int:
    """Each step is loaded back into the ranks and compared bit by bit with what they held at the call."""
    state, train = training(kind)
    seen = []
    with failpoint("stage.before-chunk:delay=0.005"), ckpt.Checkpointer(root, every=1, options=OPTIONS) as checkpointer:
        for number in range(5):
            train(number)
            seen.append(local_values(state))
            checkpointer.step(number, state)
    dist.barrier()
    for number, expected in enumerate(seen):
        ckpt.load(state, root, step=number, options=OPTIONS)
        for found, value in zip(local_values(state), expected, strict=True):
            assert torch.equal(found, value), (kind, number)
    return len(seen)


def ranks_skip_the_same_steps(root: str) -> list[int]:
    """Only rank 1 is slow to write; the steps that are left out are the same everywhere, and the others are complete."""
    state = {"x": torch.arange(4000.0)}
    options = ckpt.Options(**{**vars(OPTIONS), "when_busy": "skip"})
    skipped = []
    with failpoint("save.before-image:delay=0.3", 1), ckpt.Checkpointer(root, every=1, options=options) as checkpointer:
        for number in range(6):
            pending = checkpointer.step(number, state)
            if pending is not None and pending.skipped:
                skipped.append(number)
    dist.barrier()
    for number in range(6):
        assert os.path.exists(f"{root}/step-{number:012d}/manifest.json") == (number not in skipped), (number, skipped)
    return skipped


def a_failure_is_acted_upon_alike(root: str) -> list[str]:
    """Rank 1 fails in the background of one save, in the call of another; saves after that are complete again."""
    state: dict[str, Any] = {"x": torch.arange(4000.0)}
    told, pending = [], None
    with ckpt.Checkpointer(root, every=1, options=OPTIONS) as checkpointer:
        for number in range(12):
            if number == 2:
                assert pending is not None
                pending.wait(60.0)  # the failpoint is for this save alone
                os.environ["CKPT_FAILPOINT"], os.environ["CKPT_FAILPOINT_RANK"] = "save.in-image:error", "1"
                failing = checkpointer.step(number, state)
                assert failing is not None
                try:
                    failing.wait(60.0)
                except ckpt.CheckpointError:
                    pass
                del os.environ["CKPT_FAILPOINT"], os.environ["CKPT_FAILPOINT_RANK"]
                continue
            odd = number == 6 and dist.get_rank() == 1
            try:
                pending = checkpointer.step(number, {"x": lambda: None} if odd else state)
            except SaveFailedError as error:
                told.append(error.message.split(":")[0])
            except ckpt.InvalidInputError as error:
                told.append(type(error).__name__)
    dist.barrier()
    done = [n for n in range(12) if os.path.exists(f"{root}/step-{n:012d}/manifest.json")]
    assert done == [n for n in range(12) if n not in (2, 6)], done
    np.testing.assert_array_equal(ckpt.open(root, step=11)["x"][...], np.arange(4000.0, dtype=np.float32))
    return told
