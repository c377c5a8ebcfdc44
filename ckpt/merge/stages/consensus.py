"""Stages that compare the sources with each other: by sign, or by whose change the sum of all would hide.

In: the changes of one tile, and sums over the scope. Out: masks. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Float64Array, Scope, Summary
from ckpt.merge.stages.stage import Stage, Work, stage, summed


@stage("consensus", "none")
@dataclass(frozen=True, kw_only=True)
class NoConsensus(Stage):
    """Every source by itself."""

    def apply(self, work: Work, constants: Constants) -> None:
        return


@stage("consensus", "sign")
@dataclass(frozen=True, kw_only=True)
class Sign(Stage):
    """What has the elected sign, and is not zero (TIES).

    Args:
        by: the sign of the weighted sum of all changes, or that of the number of sources (each has one vote).
        zero: the sign where they cancel: that of the majority of all elements of the scope, positive, or `drop`: the base stays.
        scope: of the majority.
    """

    by: Literal["sum", "count"] = "sum"
    zero: Literal["majority", "positive", "drop"] = "majority"
    scope: Scope = "model"

    @property
    def passes(self) -> int:
        return 1 if self.zero == "majority" else 0

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        if self.by == "sum":
            signs = kernels.ties_signs(work.voters(), work.vote(), threads=work.tile.threads)
        else:
            votes = self._count(work)
            signs = int((votes > 0).sum()) - int((votes < 0).sum())
        return Summary(sums={"signs": np.array([signs])})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        return {"zero": int(np.sign(summary.sums["signs"][0])) or 1}

    def apply(self, work: Work, constants: Constants) -> None:
        at_zero = {"majority": constants.get("zero", 1), "positive": 1, "drop": 0}[self.zero]
        if self.by == "sum":
            work.elect(at_zero)
        else:
            work.keep_sign(self._count(work), at_zero)

    def _count(self, work: Work) -> Float64Array:
        with np.errstate(invalid="ignore"):
            return summed([np.sign(one) for one in work.weighted()])


@stage("consensus", "tall")
@dataclass(frozen=True, kw_only=True)
class Tall(Stage):
    """Elements that enough sources need: |change| > threshold * |change of all together - change| (TALL masks; with `least: 2`
    Consensus). The change of a source is the one that it came with; that of all together is what `combine` made of them where
    this stage comes after it, else the weighted sum.

    Args:
        threshold: how much a source's own change must stand out.
        thresholds: of each source, in the order in which they are named, instead.
        least: so many sources; 0 keeps everything.
    """

    threshold: float = 0.4
    thresholds: tuple[float, ...] | None = None
    least: int = 2

    def __post_init__(self) -> None:
        wrong = [one for one in (self.threshold, *(self.thresholds or ())) if not one >= 0]
        if wrong or self.least < 0:
            raise InvalidInputError(f"{self.title}: `threshold` and `least` must be at least 0")

    def check(self, context: Context) -> None:
        num = len(context.sources)
        if self.thresholds is not None and len(self.thresholds) != num:
            raise InvalidInputError(
                f"{len(self.thresholds)} thresholds are given for {num} sources", kind="wrong-number"
            )
        if self.least > num:
            raise InvalidInputError(
                f"{self.title} wants {self.least} of {num} sources: nothing would be left", kind="wrong-number"
            )

    def apply(self, work: Work, constants: Constants) -> None:
        together = summed(work.weighted()) if work.merged is None else work.merged
        needed = np.zeros(together.shape, np.int32)
        for number, source in enumerate(work.tile.sources):
            own = work.tile.delta(number)
            threshold = self.threshold if self.thresholds is None else self.thresholds[source.place]
            needed += np.abs(own) > threshold * np.abs(together - own)
        mask = needed >= self.least
        if work.merged is not None:
            work.merged = np.where(mask, work.merged, 0.0)
            return
        for source_number in range(len(work)):
            work.keep(source_number, mask)
