"""What ranks tell each other before the first save of a structure: one 32-byte record per fragment.

In: specs and boxes of one rank. Out: a typed array of records that any rank can compare without knowing the shapes of
the others. Pure. Nothing is pickled; names travel as 64-bit hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec, global_shapes
from ckpt.layout.box import BoxTable, Int64Array

# `first` and `last` are the row-major element numbers of the two extreme corners: with the shape they give the box back.
RECORD = np.dtype([("name", "<u8"), ("first", "<i8"), ("last", "<i8"), ("size", "<u8")])
assert RECORD.itemsize == 32

_SPEC_BITS = 16  # of `size`: a hash of dtype and shape, so that ranks that disagree are told at once
_WHOLE_BIT = 1 << 15  # of those: this tensor is written by its lowest holder only, never spread over replicas
_UNIT = np.uint64(0x9E3779B97F4A7C15)


def name_hash(name: str) -> int:
    """64-bit hash of a tensor name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def spec_hash(spec: TensorSpec) -> int:
    """16-bit hash of what two ranks must agree on for a tensor of the same name."""
    text = f"{spec.dtype}{spec.shape}{spec.role}"
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=2).digest(), "little") & (_WHOLE_BIT - 1)
    # Buffers (running statistics) may differ between replicas: all of them come from one rank, never a mixture.
    return value | (_WHOLE_BIT if spec.role == "buffer" else 0)


def spec_hashes(specs: Sequence[TensorSpec]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """[T] name hashes and [T] spec hashes; InvalidInputError if two names of this rank collide."""
    names = np.array([name_hash(spec.name) for spec in specs], np.uint64)
    if len(np.unique(names)) != len(names):
        raise InvalidInputError("two tensor names have the same 64-bit hash; rename one of them", kind="name-collision")
    return names, np.array([spec_hash(spec) for spec in specs], np.uint64)


def element_strides(specs: Sequence[TensorSpec], num_dims: int) -> Int64Array:
    """[T, D] row-major strides of the global tensors, in elements."""
    shapes = global_shapes(specs, num_dims)
    strides = np.ones_like(shapes)
    for dim in range(num_dims - 2, -1, -1):
        strides[:, dim] = strides[:, dim + 1] * shapes[:, dim + 1]
    return strides


def make_records(specs: Sequence[TensorSpec], boxes: BoxTable) -> NDArray[np.void]:
    """[N] records of the boxes; a box without elements is an InvalidInputError (leave it out)."""
    names, hashes = spec_hashes(specs)
    first, last = corners(specs, boxes)
    volumes = boxes.volumes()
    if (volumes == 0).any():
        raise InvalidInputError("a box without elements has no record")
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    out = np.empty(len(boxes), RECORD)
    out["name"] = names[boxes.tensor]
    out["first"], out["last"] = first, last
    nbytes = (volumes * itemsizes[boxes.tensor]).astype(np.uint64)
    out["size"] = (nbytes << np.uint64(_SPEC_BITS)) | hashes[boxes.tensor]
    return out


def corners(specs: Sequence[TensorSpec], boxes: BoxTable) -> tuple[Int64Array, Int64Array]:
    """[N] element numbers of the first and of the last corner of each box."""
    strides = element_strides(specs, boxes.num_dims)
    first, span = np.zeros(len(boxes), np.int64), np.zeros(len(boxes), np.int64)
    for dim in range(boxes.num_dims):  # a sum over a short axis is several times slower
        stride = strides[:, dim][boxes.tensor]
        first += boxes.offsets[:, dim] * stride
        span += (boxes.lengths[:, dim] - 1) * stride
    return first, first + span


def record_nbytes(records: NDArray[np.void]) -> Int64Array:
    """[N] bytes of each fragment."""
    out: Int64Array = (records["size"] >> np.uint64(_SPEC_BITS)).astype(np.int64)
    return out


def record_spec(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N] spec hashes."""
    out: NDArray[np.uint64] = records["size"] & np.uint64((1 << _SPEC_BITS) - 1)
    return out


def record_whole(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """[N] whether the fragment is written by its lowest holder only."""
    out: NDArray[np.bool_] = (records["size"] & np.uint64(_WHOLE_BIT)) != 0
    return out


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective 64-bit mixing function (the finaliser of SplitMix64), element by element."""
    out = values + _UNIT
    out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = out ^ (out >> np.uint64(31))
    return result


def box_keys(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N] one 64-bit key per (tensor, box); equal boxes have equal keys."""
    first, last = records["first"].astype(np.uint64), records["last"].astype(np.uint64)
    return mix(mix(records["name"] ^ mix(first)) + last)
