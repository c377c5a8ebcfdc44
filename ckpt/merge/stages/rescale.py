"""Stages that make up for the elements that take no part any more.

In: the changes of one tile, sums over the scope. Out: the changes, multiplied. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Scope, Summary
from ckpt.merge.stages.stage import Stage, Work, of_arrays, stage


@stage("rescale", "none")
@dataclass(frozen=True, kw_only=True)
class NoRescale(Stage):
    """Nothing."""

    def apply(self, work: Work, constants: Constants) -> None:
        return


@stage("rescale", "inverse_keep")
@dataclass(frozen=True, kw_only=True)
class InverseKeep(Stage):
    """Division by the share, or the chance, that elements were to be kept with (DARE)."""

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            work.values[source] = work.values[source] / work.share[source]
            work.share[source] = 1.0


@dataclass(frozen=True, kw_only=True)
class _ByNorm(Stage):
    """As great a norm of each source's change as there was before anything was left out.

    Args:
        scope: what the norm is of.
    """

    scope: Scope = "tensor"
    column = 1  # of moments: the sum of |x|, or of x * x

    @property
    def passes(self) -> int:
        return 1

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        before = kernels.moments(work.tile.raw(less_base=True), threads=work.tile.threads)[:, self.column]
        after = kernels.moments(of_arrays(work.values), threads=work.tile.threads)[:, self.column]
        return Summary(sums={"before": before, "after": after})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        pairs = zip(summary.sums["before"].tolist(), summary.sums["after"].tolist(), strict=True)
        return {"factors": [self._factor(before, after) if after > 0 else 1.0 for before, after in pairs]}

    def _factor(self, before: float, after: float) -> float:
        return before / after

    def apply(self, work: Work, constants: Constants) -> None:
        for source, factor in enumerate(constants["factors"]):
            work.values[source] = work.values[source] * factor
            work.share[source] = 1.0


@stage("rescale", "l1")
@dataclass(frozen=True, kw_only=True)
class L1(_ByNorm):
    """The sum of magnitudes."""


@stage("rescale", "l2")
@dataclass(frozen=True, kw_only=True)
class L2(_ByNorm):
    """The Euclidean norm."""

    column = 2

    def _factor(self, before: float, after: float) -> float:
        return math.sqrt(before / after)


@stage("rescale", "constant")
@dataclass(frozen=True, kw_only=True)
class Times(Stage):
    """Multiplication by a number.

    Args:
        by: that number.
    """

    by: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.by):
            raise InvalidInputError(f"`by` must be a number, found {self.by}")

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            work.values[source] = work.values[source] * self.by
