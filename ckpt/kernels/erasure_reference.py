"""Erasure coding in plain NumPy: what the native coders are tested against, and what `CKPT_CODER=reference` runs.

In: checked arrays (ckpt.kernels.erasure). Out: the same matrices, bytes, checksums and refusals as the native core. Written to
be read, not to be fast. Never calls the native core.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels.choice import Status
from ckpt.kernels.reference import crc32c

_POLYNOMIAL = 0x11D


def _powers() -> Iterator[int]:
    value = 1
    for _ in range(255):
        yield value
        value <<= 1
        if value > 255:
            value ^= _POLYNOMIAL


def _product_table() -> NDArray[np.uint8]:
    """[256, 256] all products."""
    powers = np.array(list(_powers()), np.uint8)
    logarithm = np.zeros(256, np.int64)
    logarithm[powers] = np.arange(255)
    products: NDArray[np.uint8] = powers[(logarithm[:, None] + logarithm[None, :]) % 255]
    products[0, :] = products[:, 0] = 0
    return products


PRODUCTS = _product_table()
_INVERSES = [0, *(int(np.flatnonzero(PRODUCTS[a] == 1)[0]) for a in range(1, 256))]


def matrix(xor: bool, k: int, m: int, out: NDArray[np.uint8]) -> None:
    """[k + m, k]: the identity above the rows of the parity."""
    out[:k] = np.eye(k, dtype=np.uint8)
    for i in range(k, k + m):
        out[i] = [1 if xor else _INVERSES[i ^ j] for j in range(k)]


def multiply(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The product of two matrices."""
    out: NDArray[np.uint8] = np.bitwise_xor.reduce(PRODUCTS[a[:, :, None], b[None, :, :]], axis=1)
    return out


def inverse(square: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """By Gauss-Jordan; None for a singular matrix."""
    side = len(square)
    both = np.concatenate([square, np.eye(side, dtype=np.uint8)], axis=1)
    for c in range(side):
        pivots = np.flatnonzero(both[c:, c])
        if not pivots.size:
            return None
        both[[c, c + pivots[0]]] = both[[c + pivots[0], c]]
        both[c] = PRODUCTS[both[c], _INVERSES[int(both[c, c])]]
        for i in range(side):
            if i != c:
                both[i] ^= PRODUCTS[both[c], both[i, c]]
    return both[:, side:]


def rows(
    generator: NDArray[np.uint8], have: NDArray[np.int32], wanted: NDArray[np.int32], out: NDArray[np.uint8]
) -> int:
    """Status; `out` [wanted, k] gives the wanted pieces from those there."""
    back = inverse(generator[have])
    if back is None:
        return Status.SINGULAR
    out[:] = multiply(generator[wanted], back)
    return Status.OK


def count_singular(generator: NDArray[np.uint8], k: int, m: int) -> tuple[int, int]:
    """(status, choices of k pieces that do not determine the data)."""
    if not np.array_equal(generator[:k], np.eye(k, dtype=np.uint8)):
        return Status.BAD_ARGUMENT, -1
    parity = generator[k:].tolist()
    singular = 0
    for lost in range(1, min(k, m) + 1):
        for kept in combinations(range(m), lost):
            for columns in combinations(range(k), lost):
                singular += _is_singular([[parity[i][j] for j in columns] for i in kept])
    return Status.OK, singular


_PRODUCT_ROWS = PRODUCTS.tolist()


def _is_singular(square: list[list[int]]) -> bool:
    """By elimination on lists, which for a few rows is faster than NumPy."""
    while square:
        pivot = next((row for row in square if row[0]), None)
        if pivot is None:
            return True
        square.remove(pivot)
        factor = _INVERSES[pivot[0]]
        rest = [_PRODUCT_ROWS[factor][x] for x in pivot[1:]]
        square = [[x ^ _PRODUCT_ROWS[row[0]][y] for x, y in zip(row[1:], rest, strict=True)] for row in square]
    return False


def code_blocks(
    sources: list[NDArray[np.uint8]],
    targets: list[NDArray[np.uint8]],
    coefficients: NDArray[np.uint8],
    block_bytes: int,
    add: bool,
    source_crcs: NDArray[np.uint32],
    target_crcs: NDArray[np.uint32],
) -> tuple[int, int, int]:
    """(status, source at fault, target at fault); both -1 when it is done."""
    for r, target in enumerate(targets):
        if any(np.may_share_memory(target, other) for other in [*sources, *targets[:r]]):
            return Status.TARGET_OVERLAPS, -1, r
    for r, target in enumerate(targets):
        if not add:
            target[:] = 0
        for s, source in enumerate(sources):
            target[: source.size] ^= PRODUCTS[coefficients[r, s]][source]
    source_crcs[:] = [crc32c(source) for source in sources][: source_crcs.size]
    target_crcs[:] = [crc32c(target) for target in targets][: target_crcs.size]
    return Status.OK, -1, -1
