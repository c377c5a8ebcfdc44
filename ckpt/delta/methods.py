"""The ways in which a fine-tune can be stored as a difference, with their parameters.

In: nothing. Out: frozen records, checked. Pure.

    exact     every bit comes back: integer differences, by planes of bytes, compressed
    compeft   the signs of the greatest changes and one number per tensor (ComPEFT, Yadav et al. 2023)
    tall      one bit per element and fine-tune, over one sum of all changes (TALL masks, Wang et al. 2024)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ckpt.delta.record import Coding
from ckpt.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all."""

    name: ClassVar[str]
    coding: ClassVar[Coding]  # of a tensor that is there as floats in the fine-tune and in the base
    several: ClassVar[bool] = False  # whether several fine-tunes are stored together

    @property
    def is_lossy(self) -> bool:
        return self.coding != "planes"

    @property
    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Exact(Method):
    """Every bit."""

    name = "exact"
    coding = "planes"


@dataclass(frozen=True, kw_only=True)
class Compeft(Method):
    """Signs of the greatest changes."""

    name = "compeft"
    coding = "ternary"
    density: float = 0.2  # share of the elements that are kept; all of equal magnitude are
    scale: float | Literal["fit"] = "fit"  # of the standard deviation of the changes; fit: what makes the error least
    scope: Literal["tensor", "model"] = "tensor"  # what the share and the deviation are of

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidInputError(f"`density` must be above 0 and at most 1, found {self.density}", kind="usage")
        if self.scale != "fit" and not (isinstance(self.scale, float) and math.isfinite(self.scale) and self.scale > 0):
            raise InvalidInputError(f"`scale` must be `fit` or a number above 0, found {self.scale}", kind="usage")
        if self.scope not in ("tensor", "model"):
            raise InvalidInputError(f"`scope` must be tensor or model, found {self.scope}", kind="usage")


@dataclass(frozen=True, kw_only=True)
class Tall(Method):
    """Masks over a shared sum."""

    name = "tall"
    coding = "mask"
    several = True
    threshold: float = 1.0  # an element takes part where |change| > threshold * |sum - change|; 1 makes the error least

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InvalidInputError(f"`threshold` must be 0 or more, found {self.threshold}", kind="usage")


METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Exact, Compeft, Tall)}


def method_of(name: str, given: dict[str, Any]) -> Method:
    """A method with the parameters that are given (None: not). InvalidInputError for one that it has not."""
    if name not in METHODS:
        raise InvalidInputError(
            f"unknown method `{name}` of a delta", kind="unknown-method", hints=(f"known: {', '.join(METHODS)}",)
        )
    said = {key: value for key, value in given.items() if value is not None}
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    odd = sorted(set(said) - set(known))
    if odd:
        has = f"it has {', '.join(f'`{one}`' for one in known)}" if known else "it has none"
        raise InvalidInputError(f"method `{name}` has no parameter `{odd[0]}`", kind="usage", hints=(has,))
    return METHODS[name](**said)
