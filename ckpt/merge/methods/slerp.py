"""Spherical interpolation of two sources, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Elementwise, Float64Array, Needs, Order, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile

NEARLY_PARALLEL = 0.9995  # above this cosine a straight line is as good, and numerically better
NORM_MIN = 1e-8


@merge_method("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp(Elementwise):
    """From the older of two sources to the newer, along the arc between them: each tensor is one vector.

    Args:
        t: 0 is the older one, 1 the newer.
        order: which is the older.
    """

    t: float = 0.5
    order: Order = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise InvalidInputError(f"`t` must be 0 to 1, found {self.t}")

    @property
    def needs(self) -> Needs:
        return Needs(passes=1, scope="tensor", num_sources_min=2, num_sources_max=2, ordered=True, weights=False)

    def check(self, context: Context) -> None:
        context.in_order(self.order)

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        return Summary(sums={"gram": kernels.gram(tile.raw(), threads=tile.threads)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        older, newer = context.in_order(self.order)
        weights = slerp_weights(summary.sums["gram"].tolist(), older, newer, self.t)
        return {"older": older, "newer": newer, "weights": weights}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        first, second = constants["weights"]
        out: Float64Array = first * tile.array(constants["older"]) + second * tile.array(constants["newer"])
        return out


def slerp_weights(gram: Any, older: int, newer: int, t: float) -> tuple[float, float]:
    """What the two vectors are multiplied by, from their dot products."""
    norms = math.sqrt(gram[older][older]), math.sqrt(gram[newer][newer])
    if min(norms) < NORM_MIN:
        return 1 - t, t
    cosine = max(-1.0, min(1.0, gram[older][newer] / (norms[0] * norms[1])))
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
