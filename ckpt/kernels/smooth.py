"""exp and tanh that have the same bits on every processor: made of products, sums and divisions, which IEEE 754 defines.

In: fp64 arrays. Out: fp64 arrays, within a few units in the last place. NumPy's own differ by processor and library in the last
bits. Never looks at the place of an element in its array.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

_LN2_HIGH = 0.6931471803691238  # 33 bits: its product with a whole number below 2^20 is exact
_LN2_LOW = 1.9082149292705877e-10
_TERMS = 14
_LARGE = 708.0  # beyond it exp is clamped: what needs it saturates long before
_TANH_LARGE = 22.0  # beyond it tanh is 1


def exp(values: Float64Array) -> Float64Array:
    """e^x, x clamped to +-708."""
    k, part = _reduced(np.clip(values, -_LARGE, _LARGE))
    part += 1.0
    out: Float64Array = np.ldexp(part, k)
    return out


def tanh(values: Float64Array) -> Float64Array:
    """The hyperbolic tangent, as exact near zero as anywhere."""
    size = np.minimum(np.abs(values), _TANH_LARGE)
    size *= 2.0
    k, part = _reduced(size)
    power = np.ldexp(1.0, k)
    part *= power  # e^(2x) - 1 = 2^k (e^r - 1) + (2^k - 1): near zero, where k is 0, nothing is lost
    power -= 1.0
    part += power
    out: Float64Array = np.copysign(part / (part + 2.0), values)
    return out


def _reduced(x: Float64Array) -> tuple[NDArray[np.int32], Float64Array]:
    """(k, e^r - 1) with x = k ln 2 + r, |r| at most half of ln 2: its series."""
    k = np.rint(x / math.log(2.0))
    r = x - k * _LN2_HIGH
    r -= k * _LN2_LOW
    total = np.full(r.shape, 1.0 / math.factorial(_TERMS))
    for term in range(_TERMS - 1, 0, -1):
        total *= r
        total += 1.0 / math.factorial(term)
    total *= r
    with np.errstate(invalid="ignore"):  # of NaN, whose series is NaN whatever its k
        return k.astype(np.int32), total
