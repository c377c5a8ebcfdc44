"""An independent way to cut tensors, the oracle of the layout tests: on arrays of element numbers, with torch.chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ckpt.layout.placement import Placed, Placement

NOTHING = -1  # marks padding


def numbered(shape: Sequence[int]) -> torch.Tensor:
    """A tensor that holds its own row-major element numbers."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def piece(tensor: torch.Tensor, num: int, index: int, dim: int) -> torch.Tensor:
    """What torch.chunk gives to rank `index` of `num`: an empty piece where there are fewer chunks."""
    chunks = torch.chunk(tensor, num, dim=dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def padded(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The tensor with dim `dim` filled up to `size` with NOTHING."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, torch.full(shape, NOTHING)], dim=dim)


def filled(placement: Placement, shape: Sequence[int]) -> np.ndarray:
    """The local tensor that a placement describes, filled with element numbers, NOTHING where it holds none."""
    world = numbered(shape).numpy()
    out = np.full(placement.local_shape, NOTHING)
    for placed in placement.placed:
        _fill(out, world, placed, flat=placement.flat is not None)
    return out


def _fill(out: np.ndarray, world: np.ndarray, placed: Placed, *, flat: bool) -> None:
    data = world[placed.box.slices()]
    if flat:
        (start,) = placed.local_offsets
        where: tuple[slice, ...] = (slice(start, start + data.size),)
        data = data.reshape(-1)
    else:
        where = tuple(slice(o, o + n) for o, n in zip(placed.local_offsets, data.shape, strict=True))
    assert (out[where] == NOTHING).all(), "two boxes lie on the same place"
    assert out[where].shape == data.shape, "a box lies outside of the local tensor"
    out[where] = data


def held(placement: Placement, shape: Sequence[int]) -> list[int]:
    """The element numbers that a placement holds, sorted."""
    world = numbered(shape).numpy()
    numbers = [world[placed.box.slices()].reshape(-1) for placed in placement.placed]
    return sorted(np.concatenate(numbers).tolist()) if numbers else []
