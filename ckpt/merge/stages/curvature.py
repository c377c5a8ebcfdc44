"""The stage that weighs each element by its curvature, for which the second moment of its gradients stands (Fisher, OTA).

In: the changes of one tile, optimizer slots, norms. Out: the merged change. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Float64Array, Scope, SourceTensor, Summary
from ckpt.merge.stages.combine import check_sum_of_weights
from ckpt.merge.stages.moments import Moments, root_power
from ckpt.merge.stages.stage import Stage, Work, of_arrays, stage

# Adam's second moments are 1e-16 to 1e-20 in large models, and 1e-8 to 1e-10 as roots. What is added to a weight must be far
# below them, or all weights are nearly alike: 1e-8, which is usual elsewhere, turns the method into a plain mean.
EPS = 1e-26


@stage("combine", "curvature")
@dataclass(frozen=True, kw_only=True)
class Curvature(Moments, Stage):
    """The mean of all sources that take part, element by element, each with the weight w * v^power + eps: v is the second moment
    of its own optimizer, w the weight of the source. Where v is zero in all of them that is the mean.

    Tensors of which a source has no second moment (buffers; others only with `missing: mean`): the weighted mean.

    Args:
        power: a multiple of 1/8: 0.5 (OTA), 1 (Fisher).
        eps: added to every weight.
        normalize: first divide a source's v^power by its `mean` or by its `l2` norm over
        scope: this.
    """

    needs_base: ClassVar[bool] = False

    power: float = 0.5
    eps: float = EPS
    normalize: Literal["none", "mean", "l2"] = "none"
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 4 or self.power * 8 != round(self.power * 8):
            raise InvalidInputError(
                f"`power` must be a multiple of 1/8 from 0 to 4, found {self.power}: roots of other orders have other bits on "
                "other processors"
            )
        if not self.eps > 0:
            raise InvalidInputError(f"`eps` must be above 0, found {self.eps}")

    @property
    def passes(self) -> int:
        return 0 if self.normalize == "none" else 1

    def check(self, context: Context) -> None:
        negative = [source.label for source in context.sources if source.weight < 0]
        if negative:
            raise InvalidInputError(
                f"{self.title} divides by a sum of weights, which none below 0 may be in: {', '.join(negative[:20])}",
                kind="negative-weights",
            )
        check_sum_of_weights(context)

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        self.refuse_missing(found)

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        powers = self._powers(work)
        if powers is None:
            return Summary()
        found = kernels.moments(of_arrays(powers), threads=work.tile.threads)
        column = 2 if self.normalize == "l2" else 0
        return Summary(sums={"total": found[:, column], "count": np.array([powers[0].size])})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        if not summary.sums:
            return {}
        totals, count = summary.sums["total"].tolist(), int(summary.sums["count"][0])
        norms = [math.sqrt(one) if self.normalize == "l2" else one / count for one in totals]
        return {"norms": [norm if norm > 0 else 1.0 for norm in norms]}

    def apply(self, work: Work, constants: Constants) -> None:
        powers = self._powers(work)
        norms = constants.get("norms", [1.0] * len(work))
        merged, share = np.zeros(work.tile.box.lengths), np.zeros(work.tile.box.lengths)
        for source, (values, kept, weight) in enumerate(zip(work.values, work.kept, work.weights, strict=True)):
            if powers is None:
                one: Float64Array = np.full(values.shape, weight)
            else:
                one = weight * (powers[source] / norms[source]) + self.eps
            if kept is not None:
                one = np.where(kept, one, 0.0)
            merged = merged + one * values
            share = share + one
        out = np.zeros_like(merged)
        np.divide(merged, share, out=out, where=share != 0.0)
        work.merged = out

    def _powers(self, work: Work) -> list[Float64Array] | None:
        found = self.moments(work.tile)
        return None if found is None else [root_power(v, self.power) for v in found]
