"""A toy that is searched: small checkpoints of which one weighted sum is the target, and a score that says how near one is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckpt
from tests.merge.samples import Arrays, random_arrays, save

SHAPES = {"embed.weight": (6, 5), "layers.0.w": (7, 4), "layers.1.w": (4, 7), "layers.1.norm": (7,), "head": (3, 5)}
OPTIMUM = (0.6, -0.2, 0.6)
EVALUATOR = Path(__file__).with_name("evaluate.py")


def save_sources(url: Path, num: int = 3, *, dtype: torch.dtype | None = None) -> list[Arrays]:
    """Checkpoints at steps 10, 20, ..., and their arrays."""
    found = [random_arrays(100 + i, SHAPES) for i in range(num)]
    for i, arrays in enumerate(found):
        save(url, 10 * (i + 1), arrays, dtype=dtype, more={"count": torch.tensor(i)})
    return found


def mixed(sources: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """The weighted sum."""
    return {name: np.sum([w * s[name] for w, s in zip(weights, sources, strict=True)], axis=0) for name in sources[0]}


def distance(state: dict[str, torch.Tensor], target: Arrays, names: Sequence[str] | None = None) -> float:
    """Mean square of the difference: a quadratic of the weights."""
    some = names or sorted(target)
    return float(np.mean([np.mean((state[name].double().numpy() - target[name]) ** 2) for name in some]))


class Near:
    """An evaluator in memory: minus the distance to a target."""

    def __init__(self, target: Arrays) -> None:
        self.target = target
        self.calls = 0

    def __call__(self, candidate: ckpt.search.Candidate) -> float:
        self.calls += 1
        return -distance(candidate.state_dict(), self.target)


class ByExample(Near):
    """The same with one example per tensor, each a share between 0 and 1."""

    def __call__(self, candidate: ckpt.search.Candidate) -> dict[str, Any]:
        self.calls += 1
        state = candidate.state_dict()
        each = [float(np.exp(-distance(state, self.target, [name]))) for name in sorted(self.target)]
        return {"score": float(np.mean(each)), "per_example": each}


def points(state: Path) -> list[list[Any]]:
    """The rows of every evaluation that was recorded, in their order."""
    return [json.loads(file.read_text())["rows"] for file in sorted(state.rglob("evaluations/*.json"))]
