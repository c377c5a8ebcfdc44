"""The model of the layout matrix: every shape of parameter that a parallel layout treats in a way of its own.

Tied embedding and output, norms, a fused QKV with unequal parts and a bias, a fused gate and up, row-parallel weights,
experts stacked in one tensor and experts with a tensor each, buffers of two dtypes. Nothing is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from tests.workers.oracle import param_values

VOCABULARY = 37  # divides by nothing
WIDTH = 16
QKV_PARTS = (16, 8, 8)  # rows of Q, K and V: grouped queries
HIDDEN = 24
NUM_EXPERTS = 6
EXPERT_WIDTH = 10
NUM_LAYERS = 2  # on more stages than that, some have no layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, sum(QKV_PARTS))
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)


class Moe(nn.Module):
    def __init__(self, owned: Iterable[int]) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, NUM_EXPERTS, bias=False)
        self.stack = nn.Parameter(torch.empty(NUM_EXPERTS, EXPERT_WIDTH, WIDTH))
        self.experts = nn.ModuleDict({str(e): nn.Linear(WIDTH, EXPERT_WIDTH, bias=False) for e in owned})


class Layer(nn.Module):
    def __init__(self, owned: Iterable[int]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.mlp = Mlp()
        self.moe = Moe(owned)


class Net(nn.Module):
    """All of it, or the part of a pipeline stage: `layers` of it, the embedding on both ends (they are tied)."""

    def __init__(
        self,
        layers: Iterable[int] = range(NUM_LAYERS),
        *,
        first: bool = True,
        last: bool = True,
        owned: Iterable[int] = range(NUM_EXPERTS),
    ) -> None:
        super().__init__()
        owned = list(owned)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH) if first or last else None
        self.layers = nn.ModuleDict({str(i): Layer(owned) for i in layers})
        self.norm = nn.RMSNorm(WIDTH) if last else None
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False) if last else None
        self.register_buffer("scale", torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.tie()
        for name, param in self.named_parameters():
            param.requires_grad_(not is_frozen(name))

    def tie(self) -> None:
        """Make output and embedding share their weight."""
        if self.output is not None and self.embedding is not None:
            self.output.weight = self.embedding.weight


@contextmanager
def scaled(factor: int) -> Iterator[None]:
    """A model that many times as wide (so its tensors are `factor` squared times as large) while this is open."""
    names = ("VOCABULARY", "WIDTH", "HIDDEN", "EXPERT_WIDTH")
    before = {name: globals()[name] for name in (*names, "QKV_PARTS")}
    globals().update({name: before[name] * factor for name in names})
    globals()["QKV_PARTS"] = tuple(part * factor for part in before["QKV_PARTS"])
    _SHAPES.clear()
    try:
        yield
    finally:
        globals().update(before)
        _SHAPES.clear()


BUFFERS = {
    "scale": torch.tensor([-0.0, float("nan"), 1.5, float("-inf"), 1e-40], dtype=torch.bfloat16),
    "count": torch.tensor(2**53 + 1, dtype=torch.int64),
}


def fill(model: nn.Module, values: bool = True) -> None:
    """The oracle's values; -1 everywhere when not `values`. Plain models only."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.from_numpy(param_values(name, tuple(param.shape))) if values else torch.tensor(-1.0))
        for name, buffer in model.named_buffers():
            buffer.copy_(BUFFERS[name] if values else torch.zeros_like(buffer))


def is_frozen(name: str) -> bool:
    """Parameters that are in no optimizer."""
    return name == "layers.0.attention_norm.weight"


def is_fresh(name: str) -> bool:
    """Parameters that are in an optimizer and have had no gradient yet, so no state."""
    return name in ("norm.weight", "layers.1.moe.router.weight")


def is_plain_decay(name: str) -> bool:
    """The first parameter group; the other has norms and biases."""
    return not name.endswith(("norm.weight", "bias"))


def global_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, ties once."""
    with torch.device("meta"):  # draws no random numbers
        return {name: tuple(param.shape) for name, param in Net().named_parameters()}


def whole(name: str) -> np.ndarray:
    """The oracle's value of a parameter."""
    return param_values(name, _shapes()[name])


_SHAPES: dict[str, tuple[int, ...]] = {}


def _shapes() -> dict[str, tuple[int, ...]]:
    if not _SHAPES:
        _SHAPES.update(global_shapes())
    return _SHAPES
