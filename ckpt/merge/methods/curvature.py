"""Methods that weigh elements by their curvature, out of the optimizer state of the sources: Fisher, OTA, FFG.

In: nothing. Out: methods: lists of stages (ckpt/merge/stages/). Formulas and sources: docs/explanation/task-vectors.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError
from ckpt.merge.method import Scope
from ckpt.merge.methods.pipeline import Staged
from ckpt.merge.methods.task_vectors import ZeroSign
from ckpt.merge.registry import merge_method
from ckpt.merge.stages.combine import DisjointMean
from ckpt.merge.stages.consensus import Sign
from ckpt.merge.stages.curvature import EPS, Curvature
from ckpt.merge.stages.moments import Moment
from ckpt.merge.stages.scale import Constant
from ckpt.merge.stages.sparsify import Saliency
from ckpt.merge.stages.stage import Stage

Correction = Literal["auto", "never"]
Missing = Literal["error", "mean"]


@merge_method("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(Staged):
    """The mean of all sources, each element weighed by its diagonal Fisher information, for which Adam's second moment stands.

    Args:
        power: of the second moment.
        normalize: first divide a source's information by its `l2` norm or its `mean` over
        scope: this.
        eps: added to every weight.
        moment: which slot of the optimizer; `auto`: the full moment, else Adafactor's factors.
        bias_correction: `auto`: where step and beta2 of every source are known.
        missing: `mean` lets parameters without a second moment count alike in all sources.
    """

    power: float = 1.0
    normalize: Literal["none", "mean", "l2"] = "l2"
    scope: Scope = "model"
    eps: float = EPS
    moment: Moment = "auto"
    bias_correction: Correction = "auto"
    missing: Missing = "error"

    def own_stages(self) -> tuple[Stage, ...]:
        return (_weighed(self),)


@merge_method("ota")
@dataclass(frozen=True, kw_only=True)
class Ota(Staged):
    """The mean of all sources, each element weighed by the root of Adam's second moment.

    Args:
        power: of the second moment.
        normalize: first divide a source's powers by their `mean` or `l2` norm over
        scope: this.
        eps: added to every weight; far below the second moments.
        moment: which slot of the optimizer; `auto`: the full moment, else Adafactor's factors.
        bias_correction: `auto`: where step and beta2 of every source are known.
        missing: `mean` lets parameters without a second moment count alike in all sources.
    """

    power: float = 0.5
    normalize: Literal["none", "mean", "l2"] = "none"
    scope: Scope = "tensor"
    eps: float = EPS
    moment: Moment = "auto"
    bias_correction: Correction = "auto"
    missing: Missing = "error"

    def own_stages(self) -> tuple[Stage, ...]:
        return (_weighed(self),)


@merge_method("ffg")
@dataclass(frozen=True, kw_only=True)
class Ffg(Staged):
    """The base plus what is salient in the changes: v * change^2, with Adam's second moment v; where nothing is, the base stays.

    Args:
        keep: share of each source's elements that is salient; or
        least: the least saliency, instead.
        scope: what the share is of.
        aggregate: what is made of salient changes: their mean weighed as by `ota`, their weighted `mean`, or `ties`: the mean of
            those with the elected sign.
        zero_sign: the sign where changes cancel, for `ties`.
        power: of the second moment, for `ota`.
        eps: as of `ota`.
        scale: of the merged change.
        moment: which slot of the optimizer; `auto`: the full moment, else Adafactor's factors.
        bias_correction: `auto`: where step and beta2 of every source are known.
        missing: `mean` keeps all of parameters without a second moment, and lets them count alike in all sources.
    """

    keep: float | None = None
    least: float | None = None
    scope: Scope = "model"
    aggregate: Literal["ota", "mean", "ties"] = "ota"
    zero_sign: ZeroSign = "majority"
    power: float = 0.5
    eps: float = EPS
    scale: float = 1.0
    moment: Moment = "auto"
    bias_correction: Correction = "auto"
    missing: Missing = "error"

    def __post_init__(self) -> None:
        if self.keep is not None and self.least is not None:
            raise InvalidInputError("method `ffg` has either `keep` or `least`")
        super().__post_init__()

    def own_stages(self) -> tuple[Stage, ...]:
        keep = 0.3 if self.keep is None and self.least is None else self.keep
        salient = Saliency(
            keep=keep,
            least=self.least,
            scope=self.scope,
            moment=self.moment,
            bias_correction=self.bias_correction,
            missing=self.missing,
        )
        merged: tuple[Stage, ...] = (DisjointMean(),)
        if self.aggregate == "ota":
            merged = (
                Curvature(
                    power=self.power,
                    eps=self.eps,
                    moment=self.moment,
                    bias_correction=self.bias_correction,
                    missing=self.missing,
                ),
            )
        elif self.aggregate == "ties":
            merged = (Sign(zero=self.zero_sign, scope=self.scope), DisjointMean())
        return (salient, *merged, Constant(by=self.scale))


def _weighed(method: Fisher | Ota) -> Curvature:
    return Curvature(
        power=method.power,
        eps=method.eps,
        normalize=method.normalize,
        scope=method.scope,
        moment=method.moment,
        bias_correction=method.bias_correction,
        missing=method.missing,
    )
