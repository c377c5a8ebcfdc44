"""Stages that make one change of those of all sources.

In: the changes of one tile. Out: the merged change. Sums are made in the canonical order of the sources. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import TiesMode
from ckpt.merge.depth import Depth
from ckpt.merge.method import Constants, Context, Float64Array, Order, Scope, SourceTensor, Summary
from ckpt.merge.stages.stage import Mask, Stage, Work, stage, summed


def check_sum_of_weights(context: Context) -> None:
    """Refuse weights that there is nothing to divide by of."""
    total = math.fsum(source.weight for source in context.sources)
    if not total > 0:
        raise InvalidInputError(f"the weights sum to {total:g}: there is nothing to divide by", kind="zero-weights")


@stage("combine", "sum")
@dataclass(frozen=True, kw_only=True)
class Sum(Stage):
    """The weighted sum (Task Arithmetic)."""

    needs_base: ClassVar[bool] = False

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        return [share * source.weight for share, source in zip(shares, context.sources, strict=True)]

    def apply(self, work: Work, constants: Constants) -> None:
        agreed = work.agreed(TiesMode.sum)
        work.merged = summed(work.weighted()) if agreed is None else agreed


@stage("combine", "mean")
@dataclass(frozen=True, kw_only=True)
class Mean(Stage):
    """The weighted mean over all sources; where one takes no part its change counts as zero."""

    needs_base: ClassVar[bool] = False

    def check(self, context: Context) -> None:
        check_sum_of_weights(context)

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        total = math.fsum(source.weight for source in context.sources)
        return [share * source.weight / total for share, source in zip(shares, context.sources, strict=True)]

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = summed(work.weighted()) / math.fsum(work.weights)


@stage("combine", "disjoint_mean")
@dataclass(frozen=True, kw_only=True)
class DisjointMean(Stage):
    """The weighted mean over the sources that take part, element by element; where none does nothing changes (TIES)."""

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = work.agreed(TiesMode.mean)
        if work.merged is not None:
            return
        merged, share = np.zeros(work.tile.box.lengths), np.zeros(work.tile.box.lengths)
        for values, kept, weight in zip(work.weighted(), work.kept, work.weights, strict=True):
            merged = merged + values
            share = share + (weight if kept is None else np.where(kept, weight, 0.0))
        out = merged.copy()
        np.divide(merged, share, out=out, where=share != 0.0)
        work.merged = out


@stage("combine", "max")
@dataclass(frozen=True, kw_only=True)
class Greatest(Stage):
    """The change of the greatest magnitude, weights included; of equal ones that of the older source."""

    def apply(self, work: Work, constants: Constants) -> None:
        work.merged = work.agreed(TiesMode.max)
        if work.merged is not None:
            return
        merged = np.zeros(work.tile.box.lengths)
        for values in work.weighted():
            merged = np.where(np.abs(values) > np.abs(merged), values, merged)
        work.merged = merged


@stage("combine", "ram")
@dataclass(frozen=True, kw_only=True)
class Ram(Stage):
    """Changes that one source has alone as they are, the mean of those that several have (RAM).

    Args:
        least: magnitude above which a source has a change.
        boost: RAM+: the changes that a source has alone are made greater by `boost` times the ratio of those that it shares to
            those that it has alone, the ratio being at most
        boost_max: this.
        scope: of that ratio.
    """

    least: float = 1e-5
    boost: float = 0.0
    boost_max: float = 0.2
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        if min(self.least, self.boost, self.boost_max) < 0:
            raise InvalidInputError(f"{self.title}: no parameter may be below 0")

    @property
    def passes(self) -> int:
        return 1 if self.boost else 0

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        has, owners = self._has(work)
        alone = [int((one & (owners == 1)).sum()) for one in has]
        shared = [int((one & (owners > 1)).sum()) for one in has]
        return Summary(sums={"alone": np.array(alone), "shared": np.array(shared)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        pairs = zip(summary.sums["alone"].tolist(), summary.sums["shared"].tolist(), strict=True)
        ratios = [min(shared / alone, self.boost_max) if alone else 0.0 for alone, shared in pairs]
        return {"factors": [1 + self.boost * ratio for ratio in ratios]}

    def apply(self, work: Work, constants: Constants) -> None:
        has, owners = self._has(work)
        factors = constants.get("factors", [1.0] * len(work))
        alone, shared = np.zeros(owners.shape), np.zeros(owners.shape)
        for values, one, factor in zip(work.weighted(), has, factors, strict=True):
            shared = shared + np.where(one, values, 0.0)
            alone = alone + np.where(one, values * factor, 0.0)
        work.merged = np.where(owners > 1, shared / np.maximum(owners, 1), alone)

    def _has(self, work: Work) -> tuple[list[Mask], NDArray[np.int32]]:
        has: list[Mask] = [np.abs(values) > self.least for values in work.values]
        owners = np.zeros(work.tile.box.lengths, np.int32)
        for one in has:
            owners += one
        return has, owners


@stage("combine", "layer_swap")
@dataclass(frozen=True, kw_only=True)
class LayerSwap(Depth, Stage):
    """One of two sources, but for layers that come from the other; between them a mean (Layer Swapping).

    Which source is which is said by `order`: the first one stays, layers of the second take the place of its own.

    Args:
        bottom: so many layers from the first on come from the second source,
        top: so many up to the last,
        transition: and so many beyond each of these are the mean of both.
        outside: what tensors outside of all layers (embeddings, head) are of the second source: 0 to 1.
        order: `auto`: by step where steps are known and different, else as the sources are named.
    """

    needs_base: ClassVar[bool] = False

    bottom: int
    top: int
    transition: int = 0
    outside: float = 0.0
    order: Order = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.bottom, self.top, self.transition) < 0 or not 0 <= self.outside <= 1:
            raise InvalidInputError(
                f"{self.title}: `bottom`, `top` and `transition` must be at least 0, `outside` 0 to 1"
            )

    def check(self, context: Context) -> None:
        if len(context.sources) != 2:
            raise InvalidInputError(
                f"{self.title} is for two sources, found {len(context.sources)}", kind="wrong-number"
            )
        if any(source.weight == 0.0 for source in context.sources):
            raise InvalidInputError(f"{self.title} takes both sources: neither may have weight 0", kind="zero-weights")
        context.in_order(self.order)

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        self.check_names(context.names)
        self.check_axes(found)

    def share_of_second(self, number: int, count: int) -> float:
        """What layer `number` of `count` has of the second source."""
        from_top = count - 1 - number
        if number < self.bottom or from_top < self.top:
            return 1.0
        beside_bottom = self.bottom and number < self.bottom + self.transition
        beside_top = self.top and from_top < self.top + self.transition
        return 0.5 if beside_bottom or beside_top else 0.0

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        second = self.factor(tensor.name, context.names, self.share_of_second, self.outside)
        if second is None:
            return None
        out = [0.0, 0.0]
        first, other = context.in_order(self.order)
        out[first], out[other] = shares[first] * (1 - second), shares[other] * second
        return out

    def apply(self, work: Work, constants: Constants) -> None:
        first, other = work.tile.context.in_order(self.order)
        second = self.factors(work.tile, self.share_of_second, self.outside)
        a, b = work.values[first], work.values[other]
        mixed = (1 - second) * a + second * b
        work.merged = np.where(second == 0.0, a, np.where(second == 1.0, b, mixed))


def merged_of(work: Work) -> Float64Array:
    """What `combine` made."""
    assert work.merged is not None
    return work.merged
