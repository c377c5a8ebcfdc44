"""The values that every tensor of the test model must have, from its name and element index alone. NumPy only.

A parameter's element is a float32 in [1, 2) whose 23 bits are a bijection of the element's index, other ones for each name. An
optimizer slot's element is a function of the bits of its parameter's element: it can be made and checked on any piece.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_ONE = 0x3F800000
_MASK = 0x7FFFFF
_ODD = 2654435761
SLOTS = ("exp_avg", "exp_avg_sq")


def param_values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What the whole parameter holds."""
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    bits = _ONE | ((index * _ODD + zlib.crc32(name.encode())) & _MASK)
    return bits.astype(np.uint32).view(np.float32).reshape(shape)


def slot_values(slot: str, param: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a slot holds where its parameter holds `param`."""
    mixed = ((param.view(np.uint32).astype(np.uint64) & _MASK) ^ zlib.crc32(slot.encode())) * 0x9E3779B1
    return (_ONE | (mixed & _MASK)).astype(np.uint32).view(np.float32).reshape(param.shape)


def same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Equal bit for bit, and of one shape."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()
