"""Stages that scale the merged change, by a number, by name or by depth.

In: the merged change of one tile, norms over the model. Out: the same, multiplied. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.merge.depth import Curve, Depth
from ckpt.merge.method import Constants, Context, SourceTensor, Summary
from ckpt.merge.stages.combine import merged_of
from ckpt.merge.stages.stage import Stage, Work, stage, summed

LINES_ALPHA = 0.1  # of one source, as published


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidInputError(f"`{name}` must be a number, found {value}")


@stage("scale", "constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Stage):
    """Everything by one number. `scale: 0.5` is short for it.

    Args:
        by: that number.
    """

    by: float

    def __post_init__(self) -> None:
        _finite("by", self.by)

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        return [share * self.by for share in shares]

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = merged_of(work) * self.by


@stage("scale", "names")
@dataclass(frozen=True, kw_only=True)
class Names(Stage):
    """By name.

    Args:
        match: patterns, as in rules; the first that matches decides.
        by: a number for each.
        otherwise: of tensors that match none.
    """

    match: tuple[str, ...]
    by: tuple[float, ...]
    otherwise: float = 1.0

    def __post_init__(self) -> None:
        if len(self.match) != len(self.by):
            raise InvalidInputError(f"{self.title}: {len(self.match)} patterns have {len(self.by)} numbers")
        for pattern in self.match:
            NamePattern(pattern)
        for value in (*self.by, self.otherwise):
            _finite("by", value)

    def factor_of(self, name: str) -> float:
        parsed = TensorName.parse(name)
        for pattern, value in zip(self.match, self.by, strict=True):
            if NamePattern(pattern).match(name, parsed) is not None:
                return value
        return self.otherwise

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        factor = self.factor_of(tensor.name)
        return [share * factor for share in shares]

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = merged_of(work) * self.factor_of(work.tile.name)


@dataclass(frozen=True, kw_only=True)
class _ByDepth(Depth, Stage):
    """By the number of the layer."""

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        self.check_names(context.names)
        self.check_axes(found)

    def curve(self, number: int, count: int) -> float:
        raise NotImplementedError


@stage("scale", "gradient")
@dataclass(frozen=True, kw_only=True)
class Gradient(_ByDepth):
    """Along straight lines between numbers that are spread evenly over the layers, the first one of the first layer.

    Args:
        values: at least one.
        outside: of tensors outside of all layers.
    """

    values: tuple[float, ...]
    outside: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.values:
            raise InvalidInputError(f"{self.title} has no `values`")
        for value in (*self.values, self.outside):
            _finite("values", value)

    def curve(self, number: int, count: int) -> float:
        if len(self.values) == 1 or count == 1:
            return self.values[0]
        at = number / (count - 1) * (len(self.values) - 1)
        low = min(int(at), len(self.values) - 2)
        return self.values[low] + (at - low) * (self.values[low + 1] - self.values[low])

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        factor = self.factor(tensor.name, context.names, self.curve, self.outside)
        return None if factor is None else [share * factor for share in shares]

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = merged_of(work) * self.factors(work.tile, self.curve, self.outside)


@stage("scale", "lines")
@dataclass(frozen=True, kw_only=True)
class Lines(_ByDepth):
    """LiNeS: from `alpha` at the first layer up to `alpha + beta` at the last one, and `alpha` outside of all layers.

    Args:
        alpha: `auto`: of one source 0.1; of N sources 1/N times the ratio of two L1 norms over the model, that of the sum of
            their changes and that of the merged one, so that the first layers keep the size of a mean.
        beta: 1 - alpha of one source; of several it must be given.
    """

    alpha: float | Literal["auto"] = "auto"
    beta: float | None = None
    scope = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "auto":
            _finite("alpha", self.alpha)
        if self.beta is not None:
            _finite("beta", self.beta)

    @property
    def passes(self) -> int:
        return 1 if self.alpha == "auto" else 0

    def check(self, context: Context) -> None:
        if self.beta is None and len(context.sources) > 1:
            raise InvalidInputError(
                f"{self.title} of {len(context.sources)} sources needs `beta`: how much more of the last layer than of the first",
                kind="no-beta",
                hints=("0.3 to 1 are usual; a held-out score decides",),
            )

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        """With `auto` of several sources: where all have one share, the ratio of the norms is one over it."""
        alpha = self._alpha(len(shares))
        if alpha is None:
            if len(set(shares)) > 1 or shares[0] == 0.0 or any(source.weight == 0.0 for source in context.sources):
                return None
            alpha = 1.0 / abs(shares[0]) / len(shares)
        factor = self.factor(tensor.name, context.names, self._curve(alpha), alpha)
        return None if factor is None else [share * factor for share in shares]

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        together = summed(work.tile.deltas)
        totals = [kernels.total(np.abs(one)) for one in (together, merged_of(work))]
        return Summary(sums={"norms": np.array(totals)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        together, merged = summary.sums["norms"].tolist()
        num = sum(source.weight != 0.0 for source in context.sources)
        return {"alpha": together / merged / num if merged > 0 else 1.0 / num}

    def apply(self, work: Work, constants: Constants) -> None:
        alpha = self._alpha(len(work))
        alpha = constants["alpha"] if alpha is None else alpha
        work.merged = merged_of(work) * self.factors(work.tile, self._curve(alpha), alpha)

    def _alpha(self, num_sources: int) -> float | None:
        """None: it follows from norms."""
        if self.alpha != "auto":
            return self.alpha
        return LINES_ALPHA if num_sources == 1 else None

    def _curve(self, alpha: float) -> Curve:
        beta = 1 - alpha if self.beta is None else self.beta
        return lambda number, count: alpha + (beta * (number / (count - 1)) if count > 1 else 0.0)
