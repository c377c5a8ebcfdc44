"""Methods on task vectors, by the names that papers gave them: lists of stages (ckpt/merge/stages/).

In: nothing. Out: methods. Formulas and sources: docs/explanation/task-vectors.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError
from ckpt.merge.depth import Depth
from ckpt.merge.method import Order, Scope
from ckpt.merge.methods.pipeline import Staged
from ckpt.merge.registry import merge_method
from ckpt.merge.stages.combine import DisjointMean, Greatest, LayerSwap, Mean, Ram, Sum
from ckpt.merge.stages.consensus import Sign, Tall
from ckpt.merge.stages.pcb import Pcb
from ckpt.merge.stages.rescale import L1, L2, InverseKeep, NoRescale
from ckpt.merge.stages.scale import Constant, Lines
from ckpt.merge.stages.sparsify import Band, Random, RowBand, RowRandom, TopK
from ckpt.merge.stages.stage import Stage

Rescale = Literal["none", "inverse_keep", "l1", "l2"]
ZeroSign = Literal["majority", "positive", "drop"]
Aggregate = Literal["mean", "sum", "max"]


def rescaled(kind: Rescale, scope: Scope) -> Stage:
    """The stage of this kind."""
    if kind == "l1":
        return L1(scope=scope)
    if kind == "l2":
        return L2(scope=scope)
    return InverseKeep() if kind == "inverse_keep" else NoRescale()


def aggregated(kind: Aggregate) -> Stage:
    """What is made of changes with the elected sign."""
    return {"mean": DisjointMean(), "sum": Sum(), "max": Greatest()}[kind]


@merge_method("task_arithmetic")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Staged):
    """The base plus `scale` times the weighted sum of all changes. A weighted sum: sources are read one at a time.

    Args:
        scale: of the sum.
    """

    scale: float = 0.3

    def own_stages(self) -> tuple[Stage, ...]:
        return (Sum(), Constant(by=self.scale))


@merge_method("ties_pipeline")
@dataclass(frozen=True, kw_only=True)
class TiesPipeline(Staged):
    """`ties` made of stages: the same bits, more slowly, and more can come `then`.

    Args:
        keep: as of `ties`; so are all others.
    """

    keep: float = 0.2
    scope: Scope = "model"
    aggregate: Aggregate = "mean"
    zero_sign: ZeroSign = "majority"
    scale: float = 1.0

    def own_stages(self) -> tuple[Stage, ...]:
        return (
            TopK(keep=self.keep, scope=self.scope),
            Sign(zero=self.zero_sign, scope=self.scope),
            aggregated(self.aggregate),
            Constant(by=self.scale),
        )


@merge_method("dare")
@dataclass(frozen=True, kw_only=True)
class Dare(Staged):
    """The base plus the weighted sum of the changes, of each of which elements are left out by chance.

    Args:
        keep: the chance of an element to be kept (1 - p of the paper).
        rescale: what makes up for the rest: `inverse_keep` (as published), the norm `l1` (as mergekit) or `l2`, or `none`.
        scope: of that norm.
        aggregate: `sum`, or the weighted `mean`.
        scale: of the merged change.
    """

    keep: float = 0.1
    rescale: Rescale = "inverse_keep"
    scope: Scope = "tensor"
    aggregate: Literal["sum", "mean"] = "sum"
    scale: float = 1.0

    def own_stages(self) -> tuple[Stage, ...]:
        combined: Stage = Sum() if self.aggregate == "sum" else Mean()
        return (Random(keep=self.keep), rescaled(self.rescale, self.scope), combined, Constant(by=self.scale))


@merge_method("dare_ties")
@dataclass(frozen=True, kw_only=True)
class DareTies(Staged):
    """As `dare`, but only what has the elected sign is merged.

    Args:
        keep: the chance of an element to be kept.
        rescale: as of `dare`.
        scope: of the norm, and of the majority that decides where changes cancel.
        zero_sign: the sign where changes cancel, as of `ties`.
        aggregate: what is made of changes with the elected sign.
        scale: of the merged change.
    """

    keep: float = 0.1
    rescale: Rescale = "inverse_keep"
    scope: Scope = "tensor"
    zero_sign: ZeroSign = "majority"
    aggregate: Aggregate = "mean"
    scale: float = 1.0

    def own_stages(self) -> tuple[Stage, ...]:
        return (
            Random(keep=self.keep),
            rescaled(self.rescale, self.scope),
            Sign(zero=self.zero_sign, scope=self.scope),
            aggregated(self.aggregate),
            Constant(by=self.scale),
        )


@merge_method("della")
@dataclass(frozen=True, kw_only=True)
class Della(Staged):
    """As `dare`, but the chance of an element rises with the rank of its magnitude in its row.

    Args:
        keep: the mean chance.
        spread: how far the chances of the least and of the greatest are from it.
        rescale: `inverse_keep` divides each element by its own chance; norms as of `dare`.
        scope: of that norm, and of the majority that decides where changes cancel.
        consensus: `sign` merges only what has the elected sign.
        zero_sign: the sign where changes cancel, as of `ties`.
        aggregate: what is made of the changes.
        scale: of the merged change.
    """

    keep: float = 0.3
    spread: float = 0.15
    rescale: Rescale = "inverse_keep"
    scope: Scope = "tensor"
    consensus: Literal["none", "sign"] = "sign"
    zero_sign: ZeroSign = "majority"
    aggregate: Aggregate = "mean"
    scale: float = 1.0

    def own_stages(self) -> tuple[Stage, ...]:
        voted: tuple[Stage, ...] = (Sign(zero=self.zero_sign, scope=self.scope),) if self.consensus == "sign" else ()
        return (
            RowRandom(keep=self.keep, spread=self.spread),
            rescaled(self.rescale, self.scope),
            *voted,
            aggregated(self.aggregate),
            Constant(by=self.scale),
        )


@merge_method("breadcrumbs")
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Staged):
    """The base plus `scale` times the sum of the changes, each without its greatest elements and without most of the small ones.

    Args:
        scope: `row`: shares are of each row along the last dim (as published); `tensor` (as mergekit), `layer`, `model`.
        keep: share that is kept: 0.15 of rows, 0.9 otherwise, when not given.
        out: share of the greatest that is left out: 0.006 of rows, 0.01 otherwise, when not given.
        consensus: `sign` merges only what has the elected sign, as their mean.
        zero_sign: the sign where changes cancel, as of `ties`.
        scale: of the merged change.
    """

    scope: Literal["row", "tensor", "layer", "model"] = "row"
    keep: float | None = None
    out: float | None = None
    consensus: Literal["none", "sign"] = "none"
    zero_sign: ZeroSign = "majority"
    scale: float = 0.3

    def own_stages(self) -> tuple[Stage, ...]:
        if self.scope == "row":
            rows = RowBand()
            chosen: Stage = RowBand(
                keep=rows.keep if self.keep is None else self.keep, out=rows.out if self.out is None else self.out
            )
        else:
            band = Band()
            chosen = Band(
                keep=band.keep if self.keep is None else self.keep,
                out=band.out if self.out is None else self.out,
                scope=self.scope,
            )
        if self.consensus == "none":
            return (chosen, Sum(), Constant(by=self.scale))
        of: Scope = "tensor" if self.scope == "row" else self.scope
        return (chosen, Sign(zero=self.zero_sign, scope=of), DisjointMean(), Constant(by=self.scale))


@merge_method("pcb")
@dataclass(frozen=True, kw_only=True)
class PcbMerging(Staged):
    """The base plus `scale` times the mean of the changes, each element weighed by how it competes within and between sources.

    Args:
        keep: share of the elements whose scores differ from the least.
        clamp: share of the greatest and of the least magnitudes that are clamped first.
        scope: what shares and ranges are of.
        scale: of the merged change.
    """

    keep: float = 0.1
    clamp: float = 1e-4
    scope: Scope = "model"
    scale: float = 1.2

    def own_stages(self) -> tuple[Stage, ...]:
        return (Pcb(keep=self.keep, clamp=self.clamp, scope=self.scope), Constant(by=self.scale))


@merge_method("consensus")
@dataclass(frozen=True, kw_only=True)
class Consensus(Staged):
    """The base plus `scale` times the merged change, where enough sources need it (TALL masks).

    Args:
        of: the merged change that is masked: that of `task_arithmetic`, or of `ties`.
        least: so many sources must need an element; 0 keeps all.
        threshold: how much a source's own change must stand out for it to need an element.
        thresholds: of each source, in the order in which they are named, instead.
        keep: of `ties`.
        scope: of `ties`.
        zero_sign: of `ties`.
        scale: of the masked change.
    """

    of: Literal["task_arithmetic", "ties"] = "task_arithmetic"
    least: int = 2
    threshold: float = 0.4
    thresholds: tuple[float, ...] | None = None
    keep: float = 0.2
    scope: Scope = "model"
    zero_sign: ZeroSign = "majority"
    scale: float = 0.3

    def own_stages(self) -> tuple[Stage, ...]:
        merged: tuple[Stage, ...] = (Sum(),)
        if self.of == "ties":
            merged = (
                TopK(keep=self.keep, scope=self.scope),
                Sign(zero=self.zero_sign, scope=self.scope),
                DisjointMean(),
            )
        masked = Tall(least=self.least, threshold=self.threshold, thresholds=self.thresholds)
        return (*merged, masked, Constant(by=self.scale))


@merge_method("ram")
@dataclass(frozen=True, kw_only=True)
class RamMerging(Staged):
    """The base plus changes that one source has alone, and the mean of those that several have.

    Args:
        least: magnitude above which a source has a change.
        boost: 0: RAM; above: RAM+ (0.1 is usual).
        boost_max: of the ratio that it is multiplied by.
        scope: of that ratio.
        scale: of the merged change.
    """

    least: float = 1e-5
    boost: float = 0.0
    boost_max: float = 0.2
    scope: Scope = "tensor"
    scale: float = 1.0

    def own_stages(self) -> tuple[Stage, ...]:
        return (
            Ram(least=self.least, boost=self.boost, boost_max=self.boost_max, scope=self.scope),
            Constant(by=self.scale),
        )


@merge_method("lines")
@dataclass(frozen=True, kw_only=True)
class LinesScaling(Depth, Staged):
    """The base plus the sum of all changes, those of deep layers more than those of the first (LiNeS). A weighted sum, but for
    stacked tensors.

    Args:
        alpha: of the first layer, and of tensors outside of all layers. `auto`: 0.1 of one source, 1/N of N.
        beta: how much more the last layer has: 1 - alpha of one source; of several it must be given.
    """

    alpha: float | Literal["auto"] = "auto"
    beta: float | None = None

    def __post_init__(self) -> None:
        Depth.__post_init__(self)
        Staged.__post_init__(self)

    def own_stages(self) -> tuple[Stage, ...]:
        scaled = Lines(
            alpha=self.alpha,
            beta=self.beta,
            layer=self.layer,
            stacked=self.stacked,
            axis=self.axis,
            num_layers=self.num_layers,
        )
        return (Sum(), scaled)


@merge_method("layer_swap")
@dataclass(frozen=True, kw_only=True)
class LayerSwapping(Depth, Staged):
    """The first source, with the bottom and top layers of the second. A weighted sum, but for stacked tensors; no base.

    Args:
        bottom: so many layers from the first on come from the second source,
        top: so many up to the last,
        transition: and so many beyond each of these are the mean of both.
        outside: what tensors outside of all layers (embeddings, head) have of the second source: 0 to 1.
        order: which source is the first: `given`: as they are named; `auto` and `step`: the older one.
    """

    bottom: int
    top: int
    transition: int = 0
    outside: float = 0.0
    order: Order = "given"

    def __post_init__(self) -> None:
        Depth.__post_init__(self)
        Staged.__post_init__(self)
        if self.then:
            raise InvalidInputError("`layer_swap` has no change to the base that stages could come after")

    def own_stages(self) -> tuple[Stage, ...]:
        swapped = LayerSwap(
            bottom=self.bottom,
            top=self.top,
            transition=self.transition,
            outside=self.outside,
            order=self.order,
            layer=self.layer,
            stacked=self.stacked,
            axis=self.axis,
            num_layers=self.num_layers,
        )
        return (swapped,)
