"""Elements out of those of the base and what is stored of a chunk; how far off they are.

In: elements. Out: elements, sums. Pure. What is not told from the base keeps its bits; the rest is added in fp64 and cast once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.delta.record import Stated
from ckpt.errors import CheckpointError
from ckpt.format.dtypes import dtype_of
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements

Bytes = NDArray[np.uint8]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def changed(base: Elements, where: NDArray[np.bool_], by: NDArray[np.float64], dtype: str, *, name: str) -> Bytes:
    """The base's elements as `dtype`, plus `by` where `where` is true.

    Args:
        by: one number for each true element.
        name: of the tensor, for messages.
    """
    values = kernels.widen(base)
    values[where] += by
    out = np.empty(len(values) * dtype_of(dtype).itemsize, np.uint8)
    if not kernels.narrow(values, dtype, out):
        raise not_finite(name, f"does not fit into {dtype} when it is restored")
    return out


def not_finite(name: str, what: str) -> CheckpointError:
    """An element that no number can stand for."""
    return CheckpointError(
        f"`{name}` {what}: an element is NaN or infinite",
        kind="not-finite",
        hints=("`--method exact` stores any bits",),
    )


@dataclass(kw_only=True)
class Measure:
    """The error of one tensor, chunk by chunk in their order."""

    digest: Any = field(default_factory=hashlib.sha256)
    max_abs: float = 0.0
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # of the error, the tensor, the change

    def take(self, restored: Bytes, found: NDArray[np.float64]) -> None:
        """One more chunk. `found`: of `errors`."""
        self.digest.update(restored.data)
        self.max_abs = max(self.max_abs, float(found[3]))
        self.squares += found[:3]

    @property
    def stated(self) -> Stated:
        l2, norm, change = np.sqrt(self.squares).tolist()
        return Stated(max_abs=self.max_abs, l2=l2, norm=norm, change=change)


def errors(was: Elements, restored: Elements, base: Elements) -> NDArray[np.float64]:
    """Sums of squares of the error, of the elements, and of their change; the greatest error."""
    off = kernels.moments(kernels.Tile(sources=[was], base=restored))[0]
    own = kernels.moments(kernels.Tile(sources=[was]))[0]
    change = kernels.moments(kernels.Tile(sources=[was], base=base))[0]
    return np.array([off[2], own[2], change[2], off[3]])


def in_order(pool: Executor, work: Callable[[_In], _Out], items: Iterable[_In], *, ahead: int) -> Iterator[_Out]:
    """Results of `work`, in the order of the items, with so many under way beside the one that is waited for."""
    going: list[Future[_Out]] = []
    try:
        for item in items:
            going.append(pool.submit(work, item))
            if len(going) > ahead:
                yield going.pop(0).result()
        while going:
            yield going.pop(0).result()
    finally:
        for one in going:
            one.cancel()
