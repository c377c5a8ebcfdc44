"""What a checkpoint says of one tensor, and the columns that describe many boxes in memory.

In: nothing. Out: `TensorSpec`, `PieceTable`, `StoredObject`. Pure. The common vocabulary of state, plan, format and engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ckpt.config import TENSOR_NAME_BYTES_MAX
from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import dtype_of
from ckpt.layout.box import BoxTable, Int64Array

ObjectKind = Literal["replicated", "rank", "loader", "optimizer"]
OBJECT_KINDS = frozenset(get_args(ObjectKind))


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A named global array."""

    name: str  # "<state key>/<name>", e.g. "model/layers.3.attention.wq.weight", "optimizer/layers.3...weight/exp_avg"
    role: str  # "param", "buffer", "optim.<slot>", "tensor"
    dtype: str  # a name of ckpt.format.dtypes
    shape: tuple[int, ...]  # global, elements
    aliases: tuple[str, ...] = ()  # other names of the very same tensor (tied weights), stored once under `name`

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        for name in (self.name, *self.aliases):
            if not _is_name(name):
                raise InvalidInputError(
                    f"tensor name {name[:80]!r} is empty, longer than {TENSOR_NAME_BYTES_MAX} bytes, or holds a NUL or a lone"
                    " surrogate",
                    kind="bad-name",
                )

    @property
    def itemsize(self) -> int:
        return dtype_of(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def _is_name(name: str) -> bool:
    try:
        return 0 < len(name.encode()) <= TENSOR_NAME_BYTES_MAX and "\x00" not in name
    except UnicodeEncodeError:
        return False


def global_shapes(specs: Sequence[TensorSpec], num_dims: int) -> Int64Array:
    """[T, D] shapes, padded with 1. A tensor of more dims has no box in a table of `num_dims` dims: its row is cut."""
    dims = np.fromiter((len(spec.shape) for spec in specs), np.int64, len(specs))
    flat = np.fromiter(itertools.chain.from_iterable(spec.shape for spec in specs), np.int64, int(dims.sum()))
    starts = np.cumsum(dims) - dims
    out = np.ones((len(specs), num_dims), np.int64)
    for dim in range(num_dims):
        rows = np.flatnonzero(dims > dim)
        out[rows, dim] = flat[starts[rows] + dim]
    return out


@dataclass(frozen=True, kw_only=True)
class PieceTable:
    """Boxes of this rank with their places in this process's memory.

    Row i: box i lies at byte `address[i]`, element (i0, i1, ...) of the box at `address + sum(i_d * strides[i, d])`, and all
    of its bytes lie in `[address[i], limit[i])`. Strides are bytes, never negative; those of padded dims are 0.
    """

    boxes: BoxTable
    address: NDArray[np.uint64]  # [N] host memory
    limit: NDArray[np.uint64]  # [N] exclusive end of the memory that may be touched
    strides: Int64Array  # [N, D] bytes

    def __post_init__(self) -> None:
        assert len(self.boxes) == len(self.address) == len(self.limit) == len(self.strides)
        assert self.strides.shape == self.boxes.offsets.shape


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One non-tensor part of a rank's state: a typed tree (ckpt.format.objects), encoded.

    kind: `replicated`: the same on every rank, or refused on a changed world when it is not;
    `rank`: belongs to this rank (RNG); `loader`: belongs to a data-parallel rank; `optimizer`: param groups by name.
    """

    name: str  # the state key, e.g. "scheduler"
    kind: ObjectKind
    payload: bytes  # UTF-8 JSON
    dp_rank: int = -1  # of a loader; -1: not known
    dp_size: int = -1


@dataclass(frozen=True, kw_only=True)
class LocalState:
    """What one rank holds of a run's state: the input of a save, and, with writable memory, the target of a load."""

    specs: list[TensorSpec]  # sorted by name; all that this rank knows, also those of which it holds no element
    pieces: PieceTable  # `boxes.tensor` indexes `specs`
    objects: list[StoredObject]  # sorted by name; empty for a load target
    keep_alive: tuple[object, ...] = ()  # owners of the memory that `pieces` points into; see `ckpt.state.memory`
    describe: Callable[[], dict[str, Any] | None] = lambda: (
        None
    )  # how the tensors lie, for the saved layout (JSON values)
    storage_of_piece: NDArray[np.uint64] | None = None  # [N] where the block of memory begins that piece i is a part of
    # All tensors of the user's state, this rank's part of each, and where its storage begins; empty where that is not known.
    seen: Callable[[], tuple[Sequence[Any], Sequence[Any], Sequence[int]]] = lambda: ((), (), ())
    on_device: NDArray[np.bool_] | None = None  # [N] `address` is a device's, not the host's; None: all on the host

    @staticmethod
    def empty() -> LocalState:
        """Of a rank that holds nothing."""
        none = np.empty(0, np.uint64)
        boxes = BoxTable.build(())
        pieces = PieceTable(boxes=boxes, address=none, limit=none, strides=np.zeros((0, boxes.num_dims), np.int64))
        return LocalState(specs=[], pieces=pieces, objects=[])
