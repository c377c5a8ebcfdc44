"""The kernels of merging in plain NumPy: what the native ones are tested against, and what `CKPT_LOOPS=reference` runs.

In: as ckpt.kernels.merge. Out: the same bits. Written to be read, not to be fast: dtypes of up to 16 bits go through a table
of all their numbers. Never calls the native core.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ckpt.kernels.merge import FloatDtype, TiesRule, Tile

_SUM_BLOCK = 2048
_LANES = 8
# number -> (bits, mantissa bits, bias, code of the first that is no finite number, whether the code of -0 is NaN)
_SMALL = {
    3: (16, 10, 15, 0x7C00, False),
    4: (16, 7, 127, 0x7F80, False),
    5: (8, 3, 7, 0x7F, False),
    6: (8, 2, 15, 0x7C, False),
    7: (8, 3, 8, 0x80, True),
    8: (8, 2, 16, 0x80, True),
}
_WITH_INFINITY = (3, 4, 6)
_ITEMSIZE = {1: 8, 2: 4, 3: 2, 4: 2}
_NAN_CODE = {3: 0x7E00, 4: 0x7FC0, 5: 0x7F, 6: 0x7E}

Float64Array = NDArray[np.float64]


@cache
def _sizes(dtype: int) -> Float64Array:
    """Every finite number from 0 up of a small dtype, by its code; the next power of two beyond stands at the end."""
    _, mantissa, bias, top, _ = _SMALL[dtype]
    code = np.arange(top + 1)
    exponent, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
    out: Float64Array = np.where(
        exponent > 0, np.ldexp(1 + fraction, exponent - bias), np.ldexp(fraction, np.ones_like(exponent) - bias)
    )
    return out


def widen(data: NDArray[np.uint8], dtype: int) -> Float64Array:
    """Raw elements as fp64."""
    if dtype <= 2:
        with np.errstate(invalid="ignore"):
            return data.view(np.float64 if dtype == 1 else np.float32).astype(np.float64)
    bits, _, _, top, unsigned_zero = _SMALL[dtype]
    code = data.view(np.uint16 if bits == 16 else np.uint8).astype(np.int64)
    size, sign = code & ((1 << (bits - 1)) - 1), code >> (bits - 1)
    out = _sizes(dtype)[np.minimum(size, top)]
    if unsigned_zero:
        return np.where(code == 1 << (bits - 1), np.nan, np.where(sign, -out, out))
    special = np.inf if dtype in _WITH_INFINITY else np.nan
    out = np.where(size == top, special, np.where(size > top, np.nan, out))
    return np.where(sign, -out, out)


def narrow(values: Float64Array, dtype: int) -> NDArray[np.uint8]:
    """fp64 values as raw elements, each rounded once to nearest, ties to the even code."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype <= 2:
            return values.astype(np.float64 if dtype == 1 else np.float32).view(np.uint8)
        bits, _, _, top, unsigned_zero = _SMALL[dtype]
        size, sizes = np.abs(values), _sizes(dtype)
        middle = (sizes[:-1] + sizes[1:]) / 2
        code: Any = np.searchsorted(middle, size, "left")  # at a middle: the lower one
        tie = (code < len(middle)) & (middle[np.minimum(code, len(middle) - 1)] == size) & (code % 2 == 1)
        code = np.where(tie, code + 1, code)
    nan = np.isnan(values)
    negative = np.signbit(values)
    if unsigned_zero:
        code = np.where(nan | (code >= top), 0x80, np.where(negative & (code > 0), code | 0x80, code))
    else:
        code = np.where(nan, _NAN_CODE[dtype], np.minimum(code, top)) | np.where(negative, 1 << (bits - 1), 0)
    out: NDArray[np.uint8] = code.astype(np.uint16 if bits == 16 else np.uint8).view(np.uint8)
    return out


def finite(data: NDArray[np.uint8], dtype: int) -> NDArray[np.bool_]:
    """[N] whether each element is neither NaN nor infinite."""
    return np.isfinite(widen(data, dtype))


def all_finite(data: NDArray[np.uint8], dtype: int) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(finite(data, dtype).all())


def mix(
    *,
    source: NDArray[np.uint64],
    dtype: NDArray[np.int32],
    weight: Float64Array,
    length: NDArray[np.int64],
    divisor: Float64Array,
    sum: NDArray[np.uint64],  # noqa: A002 - the contract's name
    target: NDArray[np.uint64],
    target_dtype: NDArray[np.int32],
    exact: NDArray[np.uint8],
    num_sources: int,
    go_on: bool,
    bad: NDArray[np.uint8],
) -> int:
    """The first part at fault, -1 when there is none; nothing is written unless every part passes."""
    shares = [[i for i in range(k * num_sources, (k + 1) * num_sources) if source[i]] for k in range(len(length))]
    for k, rows in enumerate(shares):
        if not (rows or go_on) or not (target[k] or sum[k]) or (go_on and not sum[k]):
            return k
    for k, rows in enumerate(shares):
        count = int(length[k])
        kept = _memory(int(sum[k]), count * (16 if exact[k] else 8)).view(np.float64) if sum[k] else None
        terms = [(weight[i], widen(_memory(int(source[i]), count * _size(dtype[i])), int(dtype[i]))) for i in rows]
        before = kept.copy() if go_on and kept is not None else None
        high, low = _summed_exactly(terms, before) if exact[k] else (_summed(terms, before), None)
        if kept is not None:
            kept[:] = high if low is None else np.stack([high, low], axis=1).reshape(-1)
        if not target[k]:
            continue
        result = _divided(high, low, float(divisor[2 * k]), float(divisor[2 * k + 1]))
        out = narrow(result, int(target_dtype[k]))
        _memory(int(target[k]), len(out))[:] = out
        bad[k] = not finite(out, int(target_dtype[k])).all()
    return -1


def _size(dtype: Any) -> int:
    return _ITEMSIZE.get(int(dtype), 1)


def _memory(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _summed(terms: list[tuple[float, Float64Array]], before: Float64Array | None) -> Float64Array:
    out = before
    with np.errstate(all="ignore"):
        for weight, values in terms:
            out = weight * values if out is None else out + weight * values
    assert out is not None
    return out


def _summed_exactly(
    terms: list[tuple[float, Float64Array]], before: Float64Array | None
) -> tuple[Float64Array, Float64Array]:
    high, low = (before[0::2].copy(), before[1::2].copy()) if before is not None else (None, None)
    with np.errstate(all="ignore"):
        for weight, values in terms:
            product, error = _two_product(np.full_like(values, weight), values)
            if high is None or low is None:
                high, low = product, error
                continue
            total = high + product
            part = total - high
            lost = (high - (total - part)) + (product - part)
            high, low = total, low + (lost + error)
    assert high is not None and low is not None
    return high, low


def _two_product(a: Float64Array, b: Float64Array) -> tuple[Float64Array, Float64Array]:
    split = 134217729.0
    product, ca, cb = a * b, split * a, split * b
    ah, bh = ca - (ca - a), cb - (cb - b)
    al, bl = a - ah, b - bh
    error = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    return product, np.where(np.isfinite(error), error, 0.0)


def _divided(high: Float64Array, low: Float64Array | None, divisor: float, rest: float) -> Float64Array:
    with np.errstate(all="ignore"):
        if low is None:
            return high / divisor if divisor != 1.0 else high
        if divisor == 1.0 and rest == 0.0:
            out = np.where(low == 0.0, high, high + low)
        else:
            quotient = high / divisor
            product, error = _two_product(quotient, np.full_like(quotient, divisor))
            left = (((high - product) - error) + low) - quotient * rest
            out = np.where((left == 0.0) | ~np.isfinite(left), quotient, quotient + left / divisor)
        return np.where(np.isfinite(high), out, high / divisor)


def _deltas(tile: Tile) -> list[Float64Array]:
    values = [widen(one.data, one.kind) for one in tile.sources]
    if tile.base is None:
        return values
    base = widen(tile.base.data, tile.base.kind)
    with np.errstate(invalid="ignore"):
        return [one - base for one in values]


def magnitudes(values: Float64Array) -> NDArray[np.uint32]:
    """[N] the bits of |value| rounded to float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def histogram(tile: Tile, bins: NDArray[np.uint64], shift: int, bits: int, prefix: NDArray[np.int64]) -> None:
    """As in ckpt.kernels.merge."""
    for s, values in enumerate(_deltas(tile)):
        size = magnitudes(values).astype(np.int64)
        chosen = size if prefix[s] < 0 else size[size >> (shift + bits) == prefix[s]]
        bins[s] += np.bincount((chosen >> shift) & ((1 << bits) - 1), minlength=1 << bits).astype(np.uint64)


def _ordered_total(values: Float64Array) -> float:
    """Eight sums per block, folded, and the blocks one after the other."""
    out = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(values), _SUM_BLOCK):
            block = values[start : start + _SUM_BLOCK]
            whole = len(block) // _LANES * _LANES
            lanes = np.zeros(_LANES)
            for row in block[:whole].reshape(-1, _LANES):
                lanes = lanes + row
            for lane, value in enumerate(block[whole:]):
                lanes[lane] += value
            out += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    return float(out)


def gram(tile: Tile) -> Float64Array:
    """As in ckpt.kernels.merge."""
    values = _deltas(tile)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([[_ordered_total(x * y) for y in values] for x in values]).reshape(len(values), len(values))


def moments(tile: Tile) -> Float64Array:
    """As in ckpt.kernels.merge."""
    rows = []
    for x in _deltas(tile):
        with np.errstate(over="ignore", invalid="ignore"):
            greatest = np.abs(x)[~np.isnan(x)].max(initial=0.0)
            rows.append([_ordered_total(x), _ordered_total(np.abs(x)), _ordered_total(x * x), greatest])
    return np.array(rows, np.float64).reshape(len(rows), 4)


def ties(tile: Tile, rule: TiesRule, target: NDArray[np.uint8] | None, dtype: FloatDtype) -> tuple[int, bool]:
    """(sum of signs, without a target; whether all that was written is finite)."""
    assert tile.base is not None
    base = widen(tile.base.data, tile.base.kind)
    weights = rule.weight.tolist()
    with np.errstate(all="ignore"):
        kept = [
            np.where(magnitudes(delta) >= least, weight * delta, 0.0)
            for delta, least, weight in zip(_deltas(tile), rule.threshold, weights, strict=True)
        ]
        elected = _summed([(1.0, one) for one in kept], None)
        if target is None:
            return int((elected > 0).sum()) - int((elected < 0).sum()), True
        elected = np.where(elected == 0.0, float(rule.zero_sign), elected)
        merged, share = np.zeros_like(base), np.zeros_like(base)
        for one, weight in zip(kept, weights, strict=True):
            same = ((one > 0) & (elected > 0)) | ((one < 0) & (elected < 0))
            value = np.where(same, one, 0.0)
            merged = np.where(np.abs(value) > np.abs(merged), value, merged) if rule.mode == 2 else merged + value
            share = share + np.where(same, weight, 0.0)
        one = np.where((share != 0.0), merged / share, merged) if rule.mode == 0 else merged
        out = narrow(np.where(one == 0.0, base, base + rule.scale * one), int(dtype))
    target[:] = out
    return 0, bool(finite(out, int(dtype)).all())


def uniform(key: int, first: int, out: Float64Array) -> None:
    """As in ckpt.kernels.merge."""
    number = np.arange(len(out), dtype=np.uint64) + np.uint64(first)
    counter, lane = number // np.uint64(4), (number % np.uint64(4)).astype(np.int64)
    low = np.uint64(0xFFFFFFFF)
    x = [counter & low, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [
            (b >> np.uint64(32)) ^ x[1] ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1),
            a & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    out[:] = np.stack(x)[lane, np.arange(len(out))] * 2.0**-32
