"""TIES: trim small changes, elect a sign, merge what agrees with it (Yadav et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import TiesMode, TiesRule
from ckpt.merge import thresholds
from ckpt.merge.method import Constants, Context, Elementwise, Float64Array, Needs, Scope, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile


@merge_method("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(Elementwise):
    """The base plus `scale` times the changes that most agree on.

    Args:
        keep: share of the elements of a source's changes that is kept, those of the greatest magnitude; all of equal magnitude.
        scope: what this share is of: the whole model (as published), a layer, or each tensor (as mergekit has it).
        aggregate: what is made of changes with the elected sign: their weighted mean, their sum, or the greatest.
        zero_sign: the sign where changes cancel: that of the majority of all elements (as published), positive (as mergekit), or
            `drop`: the base stays.
        scale: of the merged change.
    """

    keep: float = 0.2
    scope: Scope = "model"
    aggregate: Literal["mean", "sum", "max"] = "mean"
    zero_sign: Literal["majority", "positive", "drop"] = "majority"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InvalidInputError(f"`keep` must be above 0 and at most 1, found {self.keep}")

    @property
    def needs(self) -> Needs:
        return Needs(base=True, passes=3 if self.zero_sign == "majority" else 2, scope=self.scope)

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        if number == 2:
            signs = kernels.ties_signs(tile.raw(less_base=True), self._rule(tile, constants), threads=tile.threads)
            return Summary(sums={"signs": np.array([signs])})
        return thresholds.counted(tile.raw(less_base=True), number, constants, threads=tile.threads)

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        if number == 2:
            return {**constants, "zero_sign": int(np.sign(summary.sums["signs"][0])) or 1}
        found = thresholds.resolved(number, summary, constants, lambda count: [thresholds.rank_of(self.keep, count)])
        if number == 0:
            return found
        return {"threshold": found["bits"][0], "zero_sign": 1 if self.zero_sign == "positive" else 0}

    def write(self, tile: Tile, constants: Constants, target: NDArray[np.uint8], dtype: str) -> bool:
        rule = self._rule(tile, constants)
        return kernels.ties(tile.raw(less_base=True), rule, target, dtype, threads=tile.threads)

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        out = np.empty(tile.box.lengths)
        self.write(tile, constants, out.reshape(-1).view(np.uint8), "float64")
        return out

    def _rule(self, tile: Tile, constants: Constants) -> TiesRule:
        return TiesRule(
            threshold=constants["threshold"],
            weight=tile.weights,
            scale=self.scale,
            mode=TiesMode[self.aggregate],
            zero_sign=constants["zero_sign"],
        )
