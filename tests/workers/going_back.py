"""Ranks that meet damage which only one of them can see, and must all go back alike: what the ranks run.

Each rank has tensors of its own, so that no other one reads its image. The memory tier's snapshots are checkpoints in a folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckpt
from ckpt.config import Options
from ckpt.engine.restore import restore
from ckpt.engine.run import Run
from ckpt.errors import CheckpointError, StoreError
from tests.engine.test_choose_tier import Memory

OPTIONS = Options(commit_timeout_s=20.0, outcome_grace_s=3.0, exchange_timeout_s=30.0, events=False)


def state(value: float) -> dict[str, Any]:
    """Of this rank, and what all ranks have."""
    return {
        f"own-{dist.get_rank()}": torch.full((50_000,), value + dist.get_rank()),
        "shared": torch.full((30_000,), value),
        "note": {"value": value},
    }


def save(root: str, *steps: int) -> None:
    for step in steps:
        ckpt.save(state(float(step)), root, step=step, options=OPTIONS)


def come_back(store: str, memory: str, held: tuple[int, ...], denied: int = -1) -> dict[str, Any]:
    """What one rank restored, and whether it is what was saved at that step; or the error.

    Args:
        denied: rank that may read no image.
    """
    run, target, tier = Run(store, options=OPTIONS), state(0.0), Memory(Path(memory), *held)
    if dist.get_rank() == denied:
        run.store = Denied(run.store)  # type: ignore[assignment]
    try:
        done = restore(run, tier, target, None, strict=True, rename=None)
    except CheckpointError as error:
        return {"error": type(error).__name__, "kind": error.kind, "chosen": tier.choices}
    finally:
        run.close()
    assert done is not None
    return {
        "step": (done.tier, done.step),
        "passed_over": done.passed_over,
        "chosen": tier.choices,
        "is_right": is_equal(target, state(float(done.step))),
    }


def is_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


class Denied:
    """A store that lets nobody read images."""

    local_files = False

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str, *span: int) -> Any:
        if key.endswith(".safetensors"):
            raise StoreError(f"`{key}` may not be read", kind="denied")
        return self._store.read(key, *span)

    read_into = read


def train(root: str, *steps: int) -> dict[str, Any]:
    """Restore, then these steps, each saved; what was restored, and what became of each save."""
    logging.getLogger("ckpt").setLevel(logging.ERROR)
    target, told = state(0.0), {}
    with ckpt.Checkpointer(root, every=2, options=OPTIONS) as checkpointer:
        start = checkpointer.restore(target)
        for step in steps:
            pending = checkpointer.step(step, state(float(step)))
            told[step] = None if pending is None else "skipped" if pending.skipped else pending.wait(30.0).step
    return {"start": start, "told": told}
