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
_SMALL = 0.3


def exp(values: Float64Array) -> Float64Array:
    """e^x, x clamped to +-708."""
    x = np.clip(values, -_LARGE, _LARGE)
    k = np.rint(x / math.log(2.0))
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    out: Float64Array = np.ldexp(1.0 + _expm1_near_zero(r), k.astype(np.int32))
    return out


def tanh(values: Float64Array) -> Float64Array:
    """The hyperbolic tangent, as exact near zero as anywhere."""
    size = np.minimum(np.abs(values), _TANH_LARGE)
    twice = 2.0 * size
    near = _expm1_near_zero(np.minimum(twice, _SMALL))
    far = exp(np.maximum(twice, _SMALL)) - 1.0
    t = np.where(twice < _SMALL, near, far)
    out: Float64Array = np.copysign(t / (t + 2.0), values)
    return out


def _expm1_near_zero(r: Float64Array) -> Float64Array:
    """e^r - 1 for |r| below 0.36, by its series."""
    total = np.full(r.shape, 1.0 / math.factorial(_TERMS))
    for term in range(_TERMS - 1, 0, -1):
        total = total * r + 1.0 / math.factorial(term)
    out: Float64Array = total * r
    return out
