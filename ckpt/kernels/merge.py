"""The arithmetic of merging: weighted sums of any float dtype, statistics of tiles, TIES, random numbers by element.

In: raw elements with the name of their dtype, or columns of addresses. Out: raw elements, sums, counts; the GIL is dropped
meanwhile. Elements are widened to fp64, every operation is rounded on its own, sums have a fixed order, and one rounding to
nearest even ends it: the same bits with every kernel and any number of threads (native/include/ckpt_core.h is the contract,
ckpt/kernels/merge_reference.py the same in NumPy). Never flushes denormal numbers, never looks at a name of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, merge_reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import integer_column, thread_count

SOURCES_MAX = 256  # CKPT_MERGE_SOURCES_MAX in native/include/ckpt_core.h
SUM_BLOCK = 2048  # CKPT_SUM_BLOCK
MAGNITUDE_BITS = 31  # of a float32 below its sign

Float64Array = NDArray[np.float64]


class FloatDtype(IntEnum):
    """As `ckpt_float` in native/include/ckpt_core.h; the names are those of ckpt.format.dtypes."""

    float64 = 1
    float32 = 2
    float16 = 3
    bfloat16 = 4
    float8_e4m3fn = 5
    float8_e5m2 = 6
    float8_e4m3fnuz = 7
    float8_e5m2fnuz = 8

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 8 if self == 1 else 4 if self == 2 else 2 if self <= 4 else 1


class TiesMode(IntEnum):
    """As `ckpt_ties_mode`: what is made of the deltas that agree."""

    mean = 0
    sum = 1
    max = 2


def is_float(dtype: str) -> bool:
    """Whether elements of this dtype can be merged."""
    return dtype in FloatDtype.__members__


@dataclass(frozen=True, kw_only=True, eq=False)
class Elements:
    """Elements of one float dtype, as bytes."""

    data: NDArray[np.uint8]  # 1-d, contiguous
    dtype: str

    def __post_init__(self) -> None:
        if self.data.ndim != 1 or self.data.dtype != np.uint8 or not self.data.flags.c_contiguous:
            raise InvalidInputError(f"elements are contiguous bytes, found {self.data.dtype} {self.data.shape}")
        if not is_float(self.dtype) or len(self.data) % self.kind.itemsize:
            raise InvalidInputError(f"{len(self.data)} bytes are no elements of `{self.dtype}`")

    def __len__(self) -> int:
        return len(self.data) // self.kind.itemsize

    @property
    def kind(self) -> FloatDtype:
        return FloatDtype[self.dtype]

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """The same elements of S sources, and of a base that is subtracted from each."""

    sources: Sequence[Elements]
    base: Elements | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= SOURCES_MAX:
            raise InvalidInputError(f"a tile has 1 to {SOURCES_MAX} sources, found {len(self.sources)}")
        every = [*self.sources, *([self.base] if self.base is not None else [])]
        if len({len(one) for one in every}) > 1:
            raise InvalidInputError(f"a tile's sources differ in length: {[len(one) for one in every]}")

    def __len__(self) -> int:
        return len(self.sources[0])

    def columns(self, threads: int) -> tuple[Any, ...]:
        """As the native functions take it."""
        source = np.array([one.address for one in self.sources], np.uint64)
        dtype = np.array([one.kind for one in self.sources], np.int32)
        base = (self.base.address, int(self.base.kind)) if self.base is not None else (0, 1)
        return source, dtype, *base, len(self), thread_count(threads)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixParts:
    """K parts, each a weighted sum of the same elements of S sources over a divisor. The caller keeps the memory alive."""

    source: NDArray[np.uint64]  # [K, S] address, 0: this source has no share and is not read
    dtype: NDArray[np.int32]  # [K, S] FloatDtype
    weight: Float64Array  # [K, S]
    length: NDArray[np.int64]  # [K] elements
    divisor: Float64Array  # [K, 2] high and low part
    sum: NDArray[np.uint64]  # [K] address of fp64 sums in the making (two per element where `exact`), 0: none
    target: NDArray[np.uint64]  # [K] address, 0: the sum is only kept
    target_dtype: NDArray[np.int32]  # [K] FloatDtype
    exact: NDArray[np.uint8]  # [K] 1: with a compensation term

    @property
    def num_sources(self) -> int:
        return int(self.source.shape[1])


def mix(parts: MixParts, *, go_on: bool = False, threads: int = 1) -> NDArray[np.bool_]:
    """Make the weighted sums; [K] whether a part has an element that is NaN or infinite. Any thread may call it.

    The first product is not added to zero, so -0 stays. Sources are summed in their order.

    Args:
        go_on: `sum` holds the sum of sources before these.

    Raises:
        InvalidInputError: naming the first part that cannot be: no source has a share in it, or there is nowhere to put it.
    """
    bad = np.zeros(len(parts.length), np.uint8)
    columns = _mix_columns(parts)
    loops = choice.loops()
    if loops is None:
        part = merge_reference.mix(**columns, num_sources=parts.num_sources, go_on=go_on, bad=bad)
        status = Status.OK if part < 0 else Status.BAD_ARGUMENT
    else:
        status, part = choice.native().mix(
            loops, **columns, num_sources=parts.num_sources, go_on=go_on, threads=thread_count(threads), bad=bad
        )
    if status != Status.OK:
        raise InvalidInputError(f"cannot mix part {part}: no source has a share in it, or it has no place")
    return bad.astype(bool)


def _mix_columns(parts: MixParts) -> dict[str, NDArray[Any]]:
    num, sources = len(parts.length), parts.num_sources
    if not 1 <= sources <= SOURCES_MAX:
        raise InvalidInputError(f"parts have 1 to {SOURCES_MAX} sources, found {sources}")
    table = (num, sources)
    floats = {"weight": (parts.weight, table), "divisor": (parts.divisor, (num, 2))}
    for name, (array, shape) in floats.items():
        if array.dtype != np.float64 or array.shape != shape:
            raise InvalidInputError(f"`{name}` must be float64 of shape {shape}, found {array.dtype} {array.shape}")
    return {
        "source": integer_column("source", parts.source, np.uint64, table).reshape(-1),
        "dtype": integer_column("dtype", parts.dtype, np.int32, table).reshape(-1),
        "weight": np.ascontiguousarray(parts.weight).reshape(-1),
        "length": integer_column("length", parts.length, np.int64, (num,)),
        "divisor": np.ascontiguousarray(parts.divisor).reshape(-1),
        "sum": integer_column("sum", parts.sum, np.uint64, (num,)),
        "target": integer_column("target", parts.target, np.uint64, (num,)),
        "target_dtype": integer_column("target_dtype", parts.target_dtype, np.int32, (num,)),
        "exact": integer_column("exact", parts.exact, np.uint8, (num,)),
    }


def combine(
    elements: Sequence[Elements], weights: Sequence[float], target: NDArray[np.uint8], dtype: str, *, threads: int = 1
) -> bool:
    """The weighted sum of a few arrays into `target`, cast to `dtype`; whether all of it is finite."""
    bad = mix(
        MixParts(
            source=np.array([[one.address for one in elements]], np.uint64),
            dtype=np.array([[one.kind for one in elements]], np.int32),
            weight=np.array([weights], np.float64),
            length=np.array([len(elements[0])], np.int64),
            divisor=np.array([[1.0, 0.0]]),
            sum=np.zeros(1, np.uint64),
            target=np.array([target.ctypes.data], np.uint64),
            target_dtype=np.array([FloatDtype[dtype]], np.int32),
            exact=np.zeros(1, np.uint8),
        ),
        threads=threads,
    )
    return not bad[0]


def widen(elements: Elements, *, base: Elements | None = None, threads: int = 1) -> Float64Array:
    """The elements as fp64, exactly; less those of `base`, rounded to fp64, where there is one."""
    out = np.empty(len(elements), np.float64)
    if not len(elements):
        return out
    sources, weights = ([elements], [1.0]) if base is None else ([elements, base], [1.0, -1.0])
    combine(sources, weights, out.view(np.uint8), "float64", threads=threads)
    return out


def narrow(values: Float64Array, dtype: str, target: NDArray[np.uint8], *, threads: int = 1) -> bool:
    """Cast fp64 values once, to nearest even, into `target`; whether all that was written is finite."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    if len(target) != flat.size * FloatDtype[dtype].itemsize:
        raise InvalidInputError(f"{flat.size} elements of `{dtype}` do not take {len(target)} bytes")
    if not flat.size:
        return True
    return combine([Elements(data=flat.view(np.uint8), dtype="float64")], [1.0], target, dtype, threads=threads)


def all_finite(elements: Elements) -> bool:
    """Whether no element is NaN or infinite."""
    loops = choice.loops()
    if loops is None:
        return merge_reference.all_finite(elements.data, elements.kind)
    status, out = choice.native().all_finite(loops, elements.address, elements.kind, len(elements))
    assert status == Status.OK, Status(status)
    return bool(out)


def histogram(
    tile: Tile, bins: NDArray[np.uint64], *, shift: int, bits: int, prefix: Sequence[int], threads: int = 1
) -> None:
    """Count some bits of each magnitude into `bins` [S, 2**bits], which is added to.

    A magnitude is |x - base| rounded to float32, as its 31 bits: they rise with it. Bits `shift` to `shift + bits` are counted of
    the elements whose bits above are `prefix[s]`, of all where that is -1.
    """
    if bins.shape != (len(tile.sources), 1 << bits) or bins.dtype != np.uint64 or not bins.flags.c_contiguous:
        raise InvalidInputError(f"`bins` must be uint64 [{len(tile.sources)}, {1 << bits}], found {bins.shape}")
    above = integer_column("prefix", prefix, np.int64, (len(tile.sources),))
    if not (0 <= shift and 1 <= bits <= 24 and shift + bits <= MAGNITUDE_BITS):
        raise InvalidInputError(f"bits {shift} to {shift + bits} are not in a magnitude of {MAGNITUDE_BITS} bits")
    loops = choice.loops()
    if loops is None:
        merge_reference.histogram(tile, bins, shift, bits, above)
        return
    status = choice.native().histogram(loops, *tile.columns(threads), shift, bits, above, bins.reshape(-1))
    assert status == Status.OK, Status(status)


def gram(tile: Tile, *, threads: int = 1) -> Float64Array:
    """[S, S] sums of products of the sources' elements (less the base's), in the order of the contract."""
    return _sums(tile, False, threads)


def moments(tile: Tile, *, threads: int = 1) -> Float64Array:
    """[S, 4] per source: the sum of x, of |x|, of x * x (in the order of the contract), and the greatest |x|."""
    return _sums(tile, True, threads)


def total(values: Float64Array) -> float:
    """The sum of fp64 values in the order of the contract: the same on every machine, unlike NumPy's."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    if not flat.size:
        return 0.0
    return float(moments(Tile(sources=[Elements(data=flat.view(np.uint8), dtype="float64")]))[0, 0])


def _sums(tile: Tile, of_moments: bool, threads: int) -> Float64Array:
    num = len(tile.sources)
    columns = 4 if of_moments else num
    loops = choice.loops()
    if loops is None:
        return merge_reference.moments(tile) if of_moments else merge_reference.gram(tile)
    out = np.zeros(num * columns)
    scratch = np.empty(-(-len(tile) // SUM_BLOCK) * num * columns)
    status = choice.native().tile_sums(loops, of_moments, *tile.columns(threads), scratch, out)
    assert status == Status.OK, Status(status)
    return out.reshape(num, columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class TiesRule:
    """How TIES merges one tile."""

    threshold: NDArray[np.uint32]  # [S] bits of the least magnitude that counts
    weight: Float64Array  # [S]
    scale: float
    mode: TiesMode
    zero_sign: int  # the sign where deltas cancel: 1, -1, or 0: the base stays


def ties(tile: Tile, rule: TiesRule, target: NDArray[np.uint8], dtype: str, *, threads: int = 1) -> bool:
    """Trim, elect signs, merge what agrees, and add it to the base; whether all that was written is finite."""
    if len(target) != len(tile) * FloatDtype[dtype].itemsize:
        raise InvalidInputError(f"{len(tile)} elements of `{dtype}` do not take {len(target)} bytes")
    return _ties(tile, rule, target, dtype, threads)[1]


def ties_signs(tile: Tile, rule: TiesRule, *, threads: int = 1) -> int:
    """The sum of the signs that the trimmed deltas have together, over all elements; writes nothing."""
    return _ties(tile, rule, None, "float32", threads)[0]


def _ties(tile: Tile, rule: TiesRule, target: NDArray[np.uint8] | None, dtype: str, threads: int) -> tuple[int, bool]:
    if tile.base is None:
        raise InvalidInputError("TIES needs a base")
    threshold = integer_column("threshold", rule.threshold, np.uint32, (len(tile.sources),))
    loops = choice.loops()
    if loops is None:
        return merge_reference.ties(tile, rule, target, FloatDtype[dtype])
    status, signs, bad = choice.native().ties(
        loops,
        *tile.columns(threads),
        threshold,
        np.ascontiguousarray(rule.weight, np.float64),
        rule.scale,
        rule.mode,
        rule.zero_sign,
        0 if target is None or not len(target) else target.ctypes.data,
        FloatDtype[dtype],
    )
    assert status == Status.OK, Status(status)
    return int(signs), not bad


def uniform(key: int, first: int, count: int) -> Float64Array:
    """Numbers in [0, 1) with 32 bits for the elements `first` to `first + count`: Philox 4x32-10, counter-based.

    The number of an element depends on `key` and its own number alone, so it is the same however a tensor is cut.
    """
    out = np.empty(count)
    loops = choice.loops()
    if loops is None:
        merge_reference.uniform(key, first, out)
        return out
    status = choice.native().uniform(loops, key, first, out)
    assert status == Status.OK, Status(status)
    return out
