"""Check the arrays that go to the native core.

In: what the caller passed. Out: C-contiguous arrays of the exact dtype. Never copies a buffer of bytes, never casts a
float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError

Buffer = Any  # bytes, bytearray, memoryview, mmap, NumPy array: anything with the buffer protocol


def integer_column(name: str, array: object, dtype: type[np.integer[Any]], shape: Sequence[int]) -> NDArray[Any]:
    """`array` as C-contiguous `dtype` of exactly `shape`. Integers of another width are cast when their values fit."""
    given = np.asarray(array)
    if given.shape != tuple(shape):
        raise InvalidInputError(f"`{name}` must have shape {tuple(shape)}, found {given.shape}")
    if given.dtype == dtype:
        return np.ascontiguousarray(given)
    if given.dtype.kind not in "iu" and given.size:
        raise InvalidInputError(f"`{name}` must hold integers, found dtype {given.dtype}")
    limits = np.iinfo(dtype)
    if given.size and (int(given.min()) < limits.min or int(given.max()) > limits.max):
        raise InvalidInputError(f"`{name}` has values outside {limits.dtype}: {given.min()} to {given.max()}")
    return np.ascontiguousarray(given.astype(dtype))


def bytes_view(name: str, data: Buffer) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous buffer as a 1-d array over the same memory."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise InvalidInputError(f"`{name}` must be contiguous, found strides {data.strides} for shape {data.shape}")
        return data.reshape(-1).view(np.uint8)
    try:
        view = memoryview(data)
    except TypeError:
        raise InvalidInputError(f"`{name}` must be a buffer of bytes, found {type(data).__name__}") from None
    if not view.c_contiguous:
        raise InvalidInputError(f"`{name}` must be contiguous, found a memoryview with strides {view.strides}")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def thread_count(threads: int) -> int:
    """`threads` when it is at least 1."""
    if threads < 1:
        raise InvalidInputError(f"`threads` must be at least 1, found {threads}")
    return min(threads, 1 << 16)
