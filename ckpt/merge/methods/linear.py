"""Weighted sums whose weights do not depend on a schedule: the mean, weights of the user, interpolation.

In: records of sources. Out: coefficients. Formulas: docs/explanation/merging.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.merge.method import Coefficients, Context, Linear, Needs
from ckpt.merge.registry import merge_method


@merge_method("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Linear):
    """The mean of all sources (soup, SWA, SMA), each counted by its `weight` where it has one."""

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        return Coefficients.normalized([source.weight for source in context.sources])


@merge_method("weights")
@dataclass(frozen=True, kw_only=True)
class Weights(Linear):
    """The sum of all sources, each times its weight.

    Args:
        weights: in the order in which the sources are named (those of a range: by step); those of the sources when not given.
        normalize: divide by their sum.
        divisor: divide by this instead.
    """

    weights: tuple[float, ...] | None = None
    normalize: bool = True
    divisor: float | None = None

    def __post_init__(self) -> None:
        if self.divisor is not None and not self.divisor > 0:
            raise InvalidInputError(f"`divisor` must be positive, found {self.divisor}")

    def check(self, context: Context) -> None:
        self.coefficients_of(context)

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        return self.coefficients_of(context)

    def coefficients_of(self, context: Context) -> Coefficients:
        """The same for every tensor."""
        num = len(context.sources)
        if self.weights is not None and len(self.weights) != num:
            raise InvalidInputError(f"{len(self.weights)} weights are given for {num} sources", kind="wrong-number")
        found = [source.weight if self.weights is None else self.weights[source.place] for source in context.sources]
        if self.normalize and self.divisor is None:
            return Coefficients.normalized(found)
        if not any(found):
            raise InvalidInputError("all weights are 0", kind="zero-weights")
        return Coefficients(weights=tuple(found), divisor=self.divisor or 1.0)


@merge_method("interpolate")
@dataclass(frozen=True, kw_only=True)
class Interpolate(Linear):
    """From the base to one source, or from the older of two sources to the newer: (1 - alpha) * from + alpha * to (WiSE-FT).

    Args:
        alpha: 0 is the one end, 1 the other; beyond them it extrapolates.
    """

    alpha: float = 0.5

    @property
    def needs(self) -> Needs:
        return Needs(num_sources_min=1, num_sources_max=2, ordered=True)

    def check(self, context: Context) -> None:
        wanted = 1 if context.base is not None else 2
        if len(context.sources) != wanted:
            raise InvalidInputError(
                f"method `interpolate` goes from the base to one source, or from one of two sources to the other; found "
                f"{len(context.sources)} sources {'and' if context.base is not None else 'without'} a base",
                kind="wrong-number",
            )

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        if context.base is not None:
            return Coefficients(weights=(self.alpha,), base=1 - self.alpha)
        older, newer = context.in_order()
        weights = [0.0, 0.0]
        weights[older], weights[newer] = 1 - self.alpha, self.alpha
        return Coefficients(weights=tuple(weights))
