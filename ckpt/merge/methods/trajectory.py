"""Weighted sums along a training run: exponential averages, schedules that stand for a decay of the learning rate, windows, and
weights by a metric.

In: records of sources. Out: coefficients. Formulas, defaults and sources of each: docs/explanation/merging.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.merge.method import Coefficients, Context, Linear, Needs, Order
from ckpt.merge.registry import merge_method

Curve = Literal["linear", "one_minus_sqrt", "cosine", "inverse_sqrt", "user"]


@dataclass(frozen=True, kw_only=True)
class _Trajectory(Linear):
    """Weights by the place of a source in the run."""

    order: Order = "auto"

    @property
    def needs(self) -> Needs:
        return Needs(ordered=True)

    def check(self, context: Context) -> None:
        self._placed(context)

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        return self._placed(context)

    def along(self, context: Context, numbers: Sequence[int]) -> list[float]:
        """The weights of the sources `numbers`, oldest first."""
        raise NotImplementedError

    def _placed(self, context: Context) -> Coefficients:
        numbers = context.in_order(self.order)
        weights = [0.0] * len(numbers)
        for number, weight in zip(numbers, self.along(context, numbers), strict=True):
            weights[number] = weight
        return Coefficients.normalized(weights)


@merge_method("ema")
@dataclass(frozen=True, kw_only=True)
class Ema(_Trajectory):
    """The exponential moving average over the sources: e = decay * e + (1 - decay) * next, begun with the oldest.

    Args:
        decay: per source. Or `half_life`: steps after which a source counts half, whatever the gaps between steps.
        inv_gamma, power: with them the decay rises to `decay`: 1 - (1 + t / inv_gamma) ** -power for the t-th update; with both 1
            and decay 1 it is the mean.
        zero_start: begin with zeros and correct for it (divide by what the weights sum to) instead of with the oldest source.
    """

    decay: float | None = None
    half_life: float | None = None
    inv_gamma: float | None = None
    power: float | None = None
    zero_start: bool = False

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.half_life is None):
            raise InvalidInputError("method `ema` needs either `decay` or `half_life`")
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise InvalidInputError(f"`decay` must be 0 to 1, found {self.decay}")
        if self.half_life is not None and self.half_life <= 0:
            raise InvalidInputError(f"`half_life` must be positive, found {self.half_life}")
        if self.zero_start and self.decay is None:
            raise InvalidInputError("`zero_start` needs `decay`: there is no gap before the oldest source")
        if (self.inv_gamma is None) != (self.power is None) or (self.inv_gamma is not None and self.inv_gamma <= 0):
            raise InvalidInputError("a warm-up needs both `inv_gamma` (positive) and `power`")

    def along(self, context: Context, numbers: Sequence[int]) -> list[float]:
        weights: list[float] = []
        for t in range(len(numbers)):
            decay = 0.0 if t == 0 and not self.zero_start else self._decay(context, numbers, t)
            weights = [weight * decay for weight in weights] + [1.0 - decay if t or self.zero_start else 1.0]
        return weights

    def _decay(self, context: Context, numbers: Sequence[int], t: int) -> float:
        decay = self._steady(context, numbers, t)
        if self.inv_gamma is None or self.power is None:
            return decay
        return min(decay, max(0.0, 1.0 - math.pow(1.0 + t / self.inv_gamma, -self.power)))

    def _steady(self, context: Context, numbers: Sequence[int], t: int) -> float:
        if self.decay is not None:
            return self.decay
        steps = [context.sources[number].step for number in numbers]
        now, before = steps[t], steps[t - 1] if t else steps[0]
        if now is None or before is None:
            raise InvalidInputError("`half_life` needs the step of every source", kind="no-order")
        assert self.half_life is not None
        return math.exp(-math.log(2) * (now - before) / self.half_life)


@merge_method("lawa")
@dataclass(frozen=True, kw_only=True)
class Lawa(_Trajectory):
    """The mean of the newest sources (latest weight averaging): every `every`-th of them, counted back, `last` in all."""

    last: int = 10
    every: int = 1

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 1:
            raise InvalidInputError(f"`last` and `every` must be at least 1, found {self.last} and {self.every}")

    def along(self, context: Context, numbers: Sequence[int]) -> list[float]:
        back = range(len(numbers) - 1, -1, -1)
        return [1.0 if i % self.every == 0 and i // self.every < self.last else 0.0 for i in back]


@merge_method("wma")
@dataclass(frozen=True, kw_only=True)
class Wma(_Trajectory):
    """Weights that rise by one from source to source (PMA's weighted average)."""

    def along(self, context: Context, numbers: Sequence[int]) -> list[float]:
        return [float(i + 1) for i in range(len(numbers))]


@merge_method("decay_dual")
@dataclass(frozen=True, kw_only=True)
class DecayDual(_Trajectory):
    """The weights by which a merge of checkpoints at a constant learning rate equals a decay of it (WSM).

    Args:
        curve: of the learning rate over the merged stretch, from 1 down: 1 - x, 1 - sqrt(x), (1 + cos(pi x)) / 2,
            1 / sqrt(1 + sharpness x), or `values` (with `user`): the rate at x = 1/n, 2/n, ..., for n sources n - 1 of them.
        direction: which end gets the larger weight. It must be said where the weights are not symmetric: `one_minus_sqrt` is
            derived with the oldest heaviest.
    """

    curve: Curve
    direction: Literal["oldest_heaviest", "newest_heaviest"] | None = None
    sharpness: float = 8.0
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.curve == "user") != (self.values is not None):
            raise InvalidInputError("`values` and the curve `user` go together")
        if self.values is not None and any(
            b > a for a, b in zip((1.0, *self.values), (*self.values, 0.0), strict=True)
        ):
            raise InvalidInputError("`values` must fall from 1 and stay at 0 or above")
        if self.sharpness <= 0:
            raise InvalidInputError(f"`sharpness` must be positive, found {self.sharpness}")

    def along(self, context: Context, numbers: Sequence[int]) -> list[float]:
        num = len(numbers)
        derived = decay_weights([self._rate(i, num) for i in range(1, num)])
        if math.isclose(derived[0], derived[-1], rel_tol=1e-12):
            return derived
        if self.direction is None:
            heaviest = "oldest" if derived[0] > derived[-1] else "newest"
            raise InvalidInputError(
                f"method `decay_dual` needs a `direction`: the weights of curve `{self.curve}` are not symmetric",
                kind="no-direction",
                hints=(f"as derived, the {heaviest} source gets the larger weight: `direction: {heaviest}_heaviest`",),
            )
        as_derived = (derived[0] > derived[-1]) == (self.direction == "oldest_heaviest")
        return derived if as_derived else derived[::-1]

    def _rate(self, i: int, num: int) -> float:
        x = i / num
        if self.curve == "linear":
            return 1.0 - x
        if self.curve == "one_minus_sqrt":
            return 1.0 - math.sqrt(x)
        if self.curve == "cosine":
            return (1.0 + math.cos(math.pi * x)) / 2.0
        if self.curve == "inverse_sqrt":
            return 1.0 / math.sqrt(1.0 + self.sharpness * x)
        assert self.values is not None
        if len(self.values) != num - 1:
            raise InvalidInputError(f"{num} sources need {num - 1} `values`, found {len(self.values)}")
        return self.values[i - 1]


def decay_weights(rates: Sequence[float]) -> list[float]:
    """Weights of n checkpoints, given the wanted weight of each of the n - 1 updates between them."""
    wanted = [1.0, *rates, 0.0]
    return [a - b for a, b in zip(wanted, wanted[1:], strict=False)]


@merge_method("mwa")
@dataclass(frozen=True, kw_only=True)
class Mwa(Linear):
    """Metrics-weighted averaging: weights from one metric of each source. The published equation could not be read, so the kernel
    that is used has a name here.

    Args:
        by: a metric of the manifests, or `step`.
        best: which values of it are good; `min` unless it is the step.
        kernel: with m the metric, p the penalty: `minmax`: 1 - p (m - best) / (worst - best); `power`: m ** -p, or m ** p
            where the greatest is best; `exp`: exp(-p z), z standardised and low where good; `rank`: exp(-p rank), 0 the best.
        penalty: 0 is the mean; with `minmax` 1 drops the worst.
    """

    by: str
    penalty: float = 0.7
    kernel: Literal["minmax", "power", "exp", "rank"] = "minmax"
    best: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        if self.kernel == "minmax" and not 0 <= self.penalty <= 1:
            raise InvalidInputError(
                f"`penalty` must be 0 to 1 with the kernel `minmax`, found {self.penalty}",
                hints=("`power`, `exp` and `rank` take any number",),
            )

    @property
    def needs(self) -> Needs:
        return Needs(metric=self.by)

    def check(self, context: Context) -> None:
        self.weights(context)

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        return Coefficients.normalized(self.weights(context))

    def weights(self, context: Context) -> list[float]:
        """In canonical order."""
        values = context.metric(self.by)
        rising = (self.best or ("max" if self.by == "step" else "min")) == "max"
        bad = [-value if rising else value for value in values]  # low is good
        low, high = min(bad), max(bad)
        if low == high:
            return [1.0] * len(bad)
        if self.kernel == "minmax":
            return [1.0 - self.penalty * (m - low) / (high - low) for m in bad]
        if self.kernel == "power":
            return self._powers(values, rising)
        if self.kernel == "exp":
            middle = math.fsum(bad) / len(bad)
            spread = math.sqrt(math.fsum((m - middle) ** 2 for m in bad) / len(bad))
            return [math.exp(-self.penalty * (m - middle) / spread) for m in bad]
        return [math.exp(-self.penalty * sorted(bad).index(m)) for m in bad]

    def _powers(self, values: Sequence[float], rising: bool) -> list[float]:
        if min(values) <= 0:
            raise InvalidInputError(f"the kernel `power` needs metrics above 0, found {min(values):g}")
        top = max(values)
        return [(value / top) ** (self.penalty if rising else -self.penalty) for value in values]


@merge_method("post_hoc_ema")
@dataclass(frozen=True, kw_only=True)
class PostHocEma(Linear):
    """Another width of an exponential average, made afterwards out of snapshots of power-function averages (Karras et al.).

    Every source is a snapshot of an average of relative width `sigmas[i]` (in the order in which the sources are named) at its
    step.

    Args:
        sigma: the width that is wanted, 0 to 0.28.
        step: the training step that it is wanted at; the newest source's when not given.
    """

    sigma: float
    sigmas: tuple[float, ...]
    step: int | None = None

    def check(self, context: Context) -> None:
        self._solved(context)

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        return Coefficients(weights=self._solved(context))

    def _solved(self, context: Context) -> tuple[float, ...]:
        if len(self.sigmas) != len(context.sources):
            raise InvalidInputError(
                f"{len(self.sigmas)} sigmas are given for {len(context.sources)} sources", kind="wrong-number"
            )
        times = [source.step for source in context.sources]
        if any(time is None or time < 1 for time in times):
            raise InvalidInputError("method `post_hoc_ema` needs the step of every source, from 1 on", kind="no-order")
        at = np.array([float(time or 0) for time in times])
        gamma = np.array([gamma_of(self.sigmas[source.place]) for source in context.sources])
        wanted = float(self.step) if self.step is not None else float(at.max())
        matrix = np.array(
            [
                [_overlap(ta, ga, tb, gb) for tb, gb in zip(at, gamma, strict=True)]
                for ta, ga in zip(at, gamma, strict=True)
            ]
        )
        right = np.array([_overlap(ta, ga, wanted, gamma_of(self.sigma)) for ta, ga in zip(at, gamma, strict=True)])
        try:
            found = np.linalg.solve(matrix, right)
        except np.linalg.LinAlgError:
            raise InvalidInputError(
                "two sources are snapshots of one average at one step", kind="zero-weights"
            ) from None
        return tuple(float(x) for x in found)


def gamma_of(sigma: float) -> float:
    """The exponent of the power-function average of this relative width: the largest real root of
    g^3 + 7 g^2 + (16 - sigma^-2) g + (12 - sigma^-2)."""
    if not 0 < sigma < 0.289:
        raise InvalidInputError(f"a relative width must be above 0 and below 0.289, found {sigma}")
    inverse = sigma**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def _overlap(ta: float, ga: float, tb: float, gb: float) -> float:
    """The inner product of two power-function profiles."""
    ratio, exponent = ta / tb, gb if ta < tb else -ga
    return float((ga + 1) * (gb + 1) * ratio**exponent / ((ga + gb + 1) * max(ta, tb)))
