"""Code a chunk of elements as bytes: planes of differences, ternary signs, masks.

In: elements, or what is left of them. Out: bytes, and back, exactly. Pure. A chunk is coded without looking at another one. Bytes
that cannot be are DamagedError; docs/reference/delta.md describes them all.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ckpt.errors import DamagedError

Bytes = NDArray[np.uint8]

_ZSTD_LEVEL = 3  # higher ones gain little on differences of floats, and cost several times as much
_PLANE = struct.Struct("<BI")  # how a plane is stored, bytes
_RAW, _ZSTD = 0, 1
_TERNARY = struct.Struct("<BBII")  # how positions are stored, bits of a remainder, survivors, bytes of the positions
_BITMAP, _GOLOMB = 0, 1
_REMAINDER_BITS_MAX = 24


@cache
def _codec() -> Any:
    return pa.Codec("zstd", compression_level=_ZSTD_LEVEL)


def _damaged(what: str) -> DamagedError:
    return DamagedError(f"a chunk of a delta is damaged: {what}")


# exact: differences by planes


def pack_planes(data: Bytes, base: Bytes | None, itemsize: int) -> bytes:
    """Elements of any kind, bit for bit.

    The words of both are subtracted as integers (a small change of a float is a small difference of its bits, whatever its sign
    and its exponent), small negative differences are made small numbers, and each byte of the words is a plane of its own: the
    upper ones are nearly all zero. Without a base the words themselves are cut into planes.
    """
    words = data.view(_word(itemsize))
    if base is not None:
        signed = (words - base.view(words.dtype)).view(_signed(words.dtype))
        words = ((signed << 1) ^ (signed >> (8 * words.dtype.itemsize - 1))).view(words.dtype)
    planes = words.view(np.uint8).reshape(-1, words.dtype.itemsize)
    return b"".join(_pack_plane(np.ascontiguousarray(planes[:, i])) for i in range(planes.shape[1]))


def unpack_planes(data: bytes, base: Bytes | None, itemsize: int, nbytes: int) -> Bytes:
    """The elements that `pack_planes` had."""
    kind = _word(itemsize)
    num = nbytes // kind.itemsize
    planes = np.empty((num, kind.itemsize), np.uint8)
    at = 0
    for i in range(kind.itemsize):
        at = _unpack_plane(data, at, planes[:, i])
    if at != len(data):
        raise _damaged("bytes follow its last plane")
    words = planes.reshape(-1).view(kind)
    if base is not None:
        one = kind.type(1)
        words = ((words >> one) ^ (~(words & one) + one)) + base.view(kind)
    return words.view(np.uint8)


def _word(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"<u{min(itemsize, 8)}")


def _signed(kind: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<i{kind.itemsize}")


def _pack_plane(plane: Bytes) -> bytes:
    packed: bytes = _codec().compress(plane, asbytes=True)
    if len(packed) < len(plane):
        return _PLANE.pack(_ZSTD, len(packed)) + packed
    return _PLANE.pack(_RAW, len(plane)) + plane.tobytes()


def _unpack_plane(data: bytes, at: int, target: Bytes) -> int:
    """Fill a plane; where the next one begins."""
    how, length, start = *_head(_PLANE, data, at), at + _PLANE.size
    body = data[start : start + length]
    if len(body) != length or how not in (_RAW, _ZSTD) or (how == _RAW and length != len(target)):
        raise _damaged("a plane is cut off")
    try:
        plain = body if how == _RAW else _codec().decompress(body, decompressed_size=len(target), asbytes=True)
    except (OSError, ValueError) as error:
        raise _damaged(str(error)) from None
    if len(plain) != len(target):
        raise _damaged("a plane has another length")
    target[:] = np.frombuffer(plain, np.uint8)
    return start + length


def _head(form: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if at + form.size > len(data):
        raise _damaged("it is cut off")
    return form.unpack_from(data, at)


# bits


def pack_bits(mask: NDArray[np.bool_]) -> bytes:
    """One bit per element, the first one in the lowest bit of the first byte."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_bits(data: bytes, num: int) -> NDArray[np.bool_]:
    """The elements that `pack_bits` had."""
    if len(data) != -(-num // 8):
        raise _damaged(f"{len(data)} bytes are no {num} bits")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=num, bitorder="little").view(np.bool_)


# ternary: -1, 0, 1


def pack_signs(signs: NDArray[np.int8]) -> bytes:
    """Numbers that are -1, 0 or 1: where they are not 0, in the shorter of two forms, then one bit each for the sign.

    The forms: a bit per element; or the distances to the one before, in Golomb's code with a power of two: the quotients in unary
    one after the other, then the remainders, so that both are decoded without a loop.
    """
    places = np.flatnonzero(signs)
    of_signs = pack_bits(signs[places] > 0)
    gaps = np.diff(places, prepend=-1) - 1
    bits = _remainder_bits(gaps)
    if _golomb_nbytes(gaps, bits) < -(-len(signs) // 8):
        body, how = _pack_gaps(gaps, bits), _GOLOMB
    else:
        body, how, bits = pack_bits(signs != 0), _BITMAP, 0
    return _TERNARY.pack(how, bits, len(places), len(body)) + body + of_signs


def unpack_signs(data: bytes, num: int) -> NDArray[np.int8]:
    """The numbers that `pack_signs` had."""
    how, bits, count, length = _head(_TERNARY, data, 0)
    body, rest = data[_TERNARY.size : _TERNARY.size + length], data[_TERNARY.size + length :]
    if len(body) != length or count > num or how not in (_BITMAP, _GOLOMB) or bits > _REMAINDER_BITS_MAX:
        raise _damaged("its signs are cut off")
    places = np.flatnonzero(unpack_bits(body, num)) if how == _BITMAP else _unpack_gaps(body, bits, count)
    if len(places) != count or (count and places[-1] >= num):
        raise _damaged("its signs lie beside its elements")
    out = np.zeros(num, np.int8)
    out[places] = np.where(unpack_bits(rest, count), 1, -1)
    return out


def _remainder_bits(gaps: NDArray[np.int64]) -> int:
    """The power of two that makes the code shortest, among those around the mean distance."""
    if not len(gaps):
        return 0
    near = int(np.log2(gaps.mean() + 1))
    around = range(max(near - 2, 0), min(near + 2, _REMAINDER_BITS_MAX) + 1)
    return min(around, key=lambda bits: _golomb_nbytes(gaps, bits))


def _golomb_nbytes(gaps: NDArray[np.int64], bits: int) -> int:
    unary = int((gaps >> bits).sum()) + len(gaps)
    return -(-unary // 8) + -(-len(gaps) * bits // 8)


def _pack_gaps(gaps: NDArray[np.int64], bits: int) -> bytes:
    quotients = gaps >> bits
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    unary[ends] = True
    remainders = (gaps[:, None] >> np.arange(bits)) & 1
    return pack_bits(unary) + pack_bits(remainders.reshape(-1).astype(np.bool_))


def _unpack_gaps(body: bytes, bits: int, count: int) -> NDArray[np.int64]:
    """Places of the survivors."""
    of_remainders = -(-count * bits // 8)
    if of_remainders > len(body):
        raise _damaged("its distances are cut off")
    unary = np.unpackbits(np.frombuffer(body[: len(body) - of_remainders], np.uint8), bitorder="little")
    ends = np.flatnonzero(unary)
    if len(ends) != count:
        raise _damaged(f"it has {len(ends)} distances, expected {count}")
    quotients = np.diff(ends, prepend=-1) - 1
    flat = unpack_bits(body[len(body) - of_remainders :], count * bits).reshape(count, bits)
    remainders = (flat.astype(np.int64) << np.arange(bits)).sum(axis=1, dtype=np.int64)
    places: NDArray[np.int64] = np.cumsum((quotients << bits) + remainders + 1) - 1
    return places
