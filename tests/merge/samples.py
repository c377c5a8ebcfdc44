"""Small runs to merge, made by `ckpt.save`, and what comes out of a merge as plain arrays and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.merge.run import Merged

Arrays = dict[str, NDArray[Any]]

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (37, 16),
    "layers.0.q.weight": (16, 16),
    "layers.0.norm.weight": (16,),
    "layers.1.q.weight": (16, 24),
    "layers.1.stack": (3, 5, 7),
    "scalar": (),
    "empty": (0, 4),
}


def random_arrays(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape) * scale, np.float32) for name, shape in shapes.items()}


def tensors_of(arrays: Mapping[str, NDArray[Any]], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in found.items()}


def save(
    url: Path,
    step: int,
    arrays: Mapping[str, NDArray[Any]],
    *,
    dtype: torch.dtype | None = None,
    metrics: Mapping[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """A checkpoint with these arrays under the state key `model`; the tensors that were saved."""
    tensors = tensors_of(arrays, dtype)
    ckpt.save({"model": tensors, **(more or {})}, url, step=step, metrics=metrics)
    return tensors


def save_run(
    url: Path, num: int, *, dtype: torch.dtype | None = None, first: int = 10
) -> list[dict[str, torch.Tensor]]:
    """`num` checkpoints at steps 10, 20, ..., whose loss falls, and their tensors."""
    return [
        save(url, first * (i + 1), random_arrays(i), dtype=dtype, metrics={"loss": 2.0 - 0.1 * i}) for i in range(num)
    ]


def doubles(tensors: Mapping[str, torch.Tensor], name: str) -> NDArray[np.float64]:
    return tensors[name].double().numpy()


def merged(sources: Any, into: Path, method: Any = "uniform", **more: Any) -> tuple[dict[str, torch.Tensor], Merged]:
    """Merge, and read all of the result."""
    done = ckpt.merge(sources, into, method=method, **more)
    return opened(into), done


def opened(url: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, without the state key `model`."""
    with ckpt.open(url, step=step) as checkpoint:
        return {name.removeprefix("model/"): checkpoint[name][...] for name in checkpoint}


def images(url: Path) -> list[str]:
    """A hash of every image of a run: what must be the same, bit for bit."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(url.rglob("*.safetensors"))]


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def cast(values: NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """fp64 values rounded once to a dtype, without help of ckpt. (From float64 to bfloat16 torch rounds twice.)"""
    exact = torch.from_numpy(np.array(values, np.float64))
    return _nearest_bfloat16(exact) if dtype == torch.bfloat16 else exact.to(dtype)


def _nearest_bfloat16(exact: torch.Tensor) -> torch.Tensor:
    """By comparing with both neighbours in fp64."""
    middle = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32)  # truncated
    step = (middle.view(torch.int32) + 0x10000).view(torch.float32)  # the next one away from zero
    candidates = torch.stack([middle, step]).double()
    distance = (candidates - exact).abs()
    even = (middle.view(torch.int32) >> 16) % 2 == 0
    first = (distance[0] < distance[1]) | ((distance[0] == distance[1]) & even)
    return torch.where(first, middle, step).to(torch.bfloat16)


def same(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> None:
    """Assert equality bit for bit."""
    for name in names or sorted(expected):
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        assert bits(found[name]) == bits(expected[name]), name
