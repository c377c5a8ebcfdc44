"""A method as a package of another author would have it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def first_one(arrays: list[NDArray[np.float64]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first source."""
    return arrays[0]
