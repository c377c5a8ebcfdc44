"""Linear algebra of whole matrices whose bits do not depend on how many threads there are.

In: fp64 matrices. Out: fp64 matrices, and the ranks that they really have. NumPy's LAPACK and BLAS round otherwise with more
threads (measured: factors of a 300x256 matrix differ between one thread and two), so all of it runs on one; many matrices at a
time are a matter of worker processes. On another kind of processor, or with another build of NumPy, the last bits may differ.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Float64Array = NDArray[np.float64]

_lock = threading.Lock()
_depth = 0
_limit: contextlib.ExitStack | None = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS and LAPACK use one thread meanwhile. Any thread may, also inside of another one's: the last one out ends it."""
    global _depth, _limit
    with _lock:
        if _depth == 0:
            _limit = contextlib.ExitStack()
            _limit.enter_context(ThreadpoolController().limit(limits=1, user_api="blas"))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _limit is not None:
                _limit.close()
                _limit = None


def svd(matrix: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Thin factors `u * s @ v`, without the singular values that are nothing but rounding: those have no directions.

    In each column of `u` the element of greatest magnitude (the first of them) is positive, which fixes the signs.
    """
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = rank_of(s, matrix.shape)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    if rank:
        top = np.argmax(np.abs(u), axis=0)
        sign = np.where(u[top, np.arange(rank)] < 0, -1.0, 1.0)
        u, v = u * sign, v * sign[:, None]
    return u, s, v


def svd_nbytes(shape: tuple[int, int]) -> int:
    """About what `svd` takes beside its matrix: copies, factors twice, LAPACK's own room (measured: a bit less)."""
    rows, columns = shape
    rank = min(shape)
    return 8 * (3 * rows * columns + 2 * rank * (rows + columns) + 5 * rank * rank)


def rank_of(singular_values: Float64Array, shape: tuple[int, ...]) -> int:
    """How many singular values (falling) are more than rounding."""
    if not len(singular_values) or singular_values[0] == 0.0:
        return 0
    least = singular_values[0] * max(shape) * float(np.finfo(np.float64).eps)
    return int(np.count_nonzero(singular_values > least))


def polar(matrix: Float64Array) -> Float64Array:
    """The nearest matrix with orthonormal columns (or rows); where its columns are not independent, the nearest one that maps
    what they span onto itself and the rest to nothing."""
    u, _, v = svd(matrix)
    return np.asarray(u @ v)
