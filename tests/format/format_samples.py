"""States that hold every dtype and every odd shape, and byte-wise comparison.

Goal: one place that knows what "all dtypes" means for the format's tests. Method: bit patterns, never arithmetic, so that NaN
payloads, signed zeros and denormals are what they say they are on every machine.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from ckpt.format.dtypes import DTYPES
from ckpt.state.dtypes import torch_dtype

# Little-endian bit patterns that arithmetic or printing would lose: -0, quiet and signalling NaNs with payloads, -NaN, inf,
# the smallest and the largest denormal.
_FLOAT_BITS = {
    2: [0x8000, 0x7E01, 0x7C01, 0xFE55, 0x7C00, 0x0001, 0x03FF, 0x7F81, 0xFFC1],
    4: [0x80000000, 0x7FC00001, 0x7F800001, 0xFFC12345, 0x7F800000, 0x00000001, 0x007FFFFF],
    8: [1 << 63, 0x7FF8000000000001, 0x7FF0000000000001, 0xFFF8DEADBEEF0001, 0x7FF0000000000000, 1, (1 << 52) - 1],
}
assert sys.byteorder == "little"


def bits(dtype: str, num: int, seed: int = 0) -> bytes:
    """`num` elements of a dtype as bytes: the awkward patterns first, then noise (0 and 1 for bool)."""
    noise = np.random.default_rng([seed, num]).integers(0, 256, num * DTYPES[dtype].itemsize, np.uint8)
    if dtype == "bool":
        return (noise & 1).tobytes()
    width = {"complex32": 2, "complex64": 4, "complex128": 8}.get(dtype, DTYPES[dtype].itemsize)
    special = b"".join(value.to_bytes(width, "little") for value in _FLOAT_BITS.get(width, range(256)))
    return (special + noise.tobytes())[: len(noise)] if len(noise) > len(special) else noise.tobytes()


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A contiguous tensor of awkward values."""
    num = int(np.prod(shape, dtype=np.int64))
    if num == 0:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return (
        torch.frombuffer(bytearray(bits(dtype, num, seed)), dtype=torch.uint8).view(torch_dtype(dtype)).reshape(shape)
    )


def raw(value: torch.Tensor) -> bytes:
    """The elements in row-major order as bytes."""
    return bytes(value.detach().contiguous().clone().untyped_storage()) if value.numel() else b""


def all_dtypes(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype in four shapes: a matrix, 0-d, without elements, a vector of one."""
    out = {}
    for dtype in DTYPES:
        for kind, shape in {"matrix": (7, 5), "scalar": (), "empty": (3, 0, 2), "one": (1,)}.items():
            out[f"{dtype}.{kind}"] = tensor(dtype, shape, seed)
    return out


def objects() -> dict[str, Any]:
    """Plain state with values of many types, without tensors."""
    return {"lr": 1e-3, "nan": float("nan"), "big": 1 << 100, "pair": (1, [2.5, None]), "raw": b"\x00\xff", "on": True}
