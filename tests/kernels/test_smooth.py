"""exp and tanh of merging are exact to a few units in the last place, and the same wherever an element stands.

Method: Python's math (rounded correctly, or nearly) over drawn and special values; slices of an array against the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ckpt.kernels import smooth

RNG = np.random.default_rng(0)
VALUES = np.concatenate(
    [
        RNG.standard_normal(4000) * 10.0 ** RNG.integers(-12, 3, 4000),
        np.linspace(-40, 40, 2001),
        np.array([0.0, -0.0, 5e-324, 1e-300, math.log(2) / 2, 22.0, 700.0, -700.0]),
    ]
)


@pytest.mark.parametrize(("made", "exact"), [(smooth.exp, math.exp), (smooth.tanh, math.tanh)])
def test_within_a_few_units_in_the_last_place(
    made: Callable[[np.ndarray], np.ndarray], exact: Callable[[float], float]
) -> None:
    values = VALUES[np.abs(VALUES) <= 700]
    expected = np.array([exact(value) for value in values.tolist()])
    np.testing.assert_array_max_ulp(made(values), expected, maxulp=6)


@pytest.mark.parametrize("made", [smooth.exp, smooth.tanh])
def test_an_element_has_its_bits_wherever_it_stands(made: Callable[[np.ndarray], np.ndarray]) -> None:
    whole = made(VALUES)
    parts = np.concatenate([made(VALUES[start : start + 7]) for start in range(0, len(VALUES), 7)])
    assert whole.tobytes() == parts.tobytes()
    assert made(VALUES.reshape(-1, 1)).tobytes() == whole.tobytes()


def test_ends_and_signs() -> None:
    assert smooth.tanh(np.array([1e9, -1e9, np.inf, -np.inf])).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert np.signbit(smooth.tanh(np.array([-0.0, 0.0]))).tolist() == [True, False]
    assert smooth.exp(np.array([1e9])).tolist() == smooth.exp(np.array([708.0])).tolist()
    assert np.isnan(smooth.tanh(np.array([np.nan]))).all()
