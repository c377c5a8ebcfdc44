"""Replicas (DDP) whose structure changes in mid-run: what the ranks run, all of them together."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckpt
from ckpt import failpoints
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.verify import verify
from ckpt.store.open import open_store

WIDTH = 512
OPTIONS = Options(chunk_bytes=1 << 20)


def lora_is_added_and_a_layer_unfrozen(root: str, incremental: bool) -> list[list[int]]:
    """Eight blocking saves. Per save the bytes of the fragments that each writer holds, of this attempt's images."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).requires_grad_(False)
    model[3].requires_grad_(True)
    optimizer = torch.optim.AdamW([model[3].weight], foreach=False)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    out: list[list[int]] = []
    for step in range(1, 9):
        if step == 3:
            down, up = nn.Linear(WIDTH, 300, bias=False), nn.Linear(300, WIDTH, bias=False)
            model.lora = nn.Sequential(down, up)
            optimizer.add_param_group({"params": [down.weight, up.weight]})
        if step == 6:
            model[1].requires_grad_(True)
            optimizer.add_param_group({"params": [model[1].weight]})
        for param in (p for p in model.parameters() if p.requires_grad):
            param.grad = torch.randn_like(param)
        optimizer.step()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        ckpt.save(state, root, step=step, options=OPTIONS, incremental=incremental)
        out.append(_held(root, step))
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        ckpt.load(state, root, step=step, options=OPTIONS)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), step
    return out


def _held(root: str, step: int) -> list[int]:
    store = open_store(root, options=OPTIONS)
    stored = StoredCheckpoint(store, step, OPTIONS)
    if dist.get_rank() == 0:
        assert verify(stored).findings == []
    table = stored.fragments()
    held = np.bincount(table.writer, weights=table.nbytes, minlength=len(stored.images)).astype(int)
    store.close()
    return held[: dist.get_world_size()].tolist()


def die_in_an_incremental_save(root: str, failpoint: str) -> None:
    """Save step 1; die in step 2, which refers to it."""
    frozen, trained = torch.arange(5000.0), torch.zeros(100)
    ckpt.save({"frozen": frozen, "trained": trained}, root, step=1, options=OPTIONS, incremental=True)
    trained += 1
    failpoints.reset()
    os.environ["CKPT_FAILPOINT"] = failpoint
    ckpt.save({"frozen": frozen, "trained": trained}, root, step=2, options=OPTIONS, incremental=True)
