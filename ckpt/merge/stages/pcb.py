"""The stage of PCB: competition of elements within a source and between sources. The variant that is made here is our own
choice of what published variants differ in; docs/explanation/task-vectors.md spells it out.

In: the changes of one tile, quantiles over the scope. Out: the merged change. Exponentials are made of products and divisions
alone (ckpt/kernels/smooth.py), so that the bits are the same on every processor. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.kernels.smooth import exp, tanh
from ckpt.merge import thresholds
from ckpt.merge.method import Constants, Context, Float64Array, Scope, Summary
from ckpt.merge.stages.sparsify import as_sizes, share_of
from ckpt.merge.stages.stage import Stage, Work, of_arrays, stage, summed

SOURCES_MAX = 64  # exp(N) must stay within float32, as which scores are compared
SHARE_MIN = 1e-12  # of what is divided by


@stage("combine", "pcb")
@dataclass(frozen=True, kw_only=True)
class Pcb(Stage):
    """sum(s * change) / sum(s), with a score s from 0 to 1 per element and source: exp(N * n^2) * tanh(change * sum of changes),
    n being the source's magnitudes from 0 to 1; of the scores those below a quantile, or below 0, count as that.

    Args:
        keep: share of the elements whose scores differ from the least.
        clamp: share of the greatest and of the least magnitudes that are clamped before they are mapped to 0 to 1.
        scope: what shares and ranges are of.
    """

    keep: float = 0.1
    clamp: float = 1e-4
    scope: Scope = "model"

    def __post_init__(self) -> None:
        share_of("keep", self.keep)
        if not 0 <= self.clamp < 0.5:
            raise InvalidInputError(f"`clamp` must be 0 to 0.5, found {self.clamp}")

    @property
    def passes(self) -> int:
        return 2 * thresholds.PASSES

    def check(self, context: Context) -> None:
        if len(context.sources) > SOURCES_MAX:
            raise InvalidInputError(
                f"{self.title} is for at most {SOURCES_MAX} sources, found {len(context.sources)}", kind="wrong-number"
            )

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        if number < thresholds.PASSES:
            return thresholds.counted(work.raw(), number, constants, threads=work.tile.threads)
        scores = [np.maximum(one, 0.0) for one in self._scores(work, constants)]
        found = thresholds.counted(of_arrays(scores), number - thresholds.PASSES, constants, threads=work.tile.threads)
        return Summary(sums=found.sums, maxima={"most": np.array([one.max(initial=0.0) for one in scores])})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        if number < thresholds.PASSES:
            found = thresholds.resolved(number, summary, constants, self._edges)
            return {"edges": as_sizes(found["bits"]).astype(np.float64)} if "bits" in found else found
        kept = {"edges": constants["edges"]}
        found = thresholds.resolved(
            number - thresholds.PASSES, summary, constants, lambda count: [thresholds.rank_of(self.keep, count)]
        )
        if "bits" not in found:
            return {**kept, **found}
        least = as_sizes(found["bits"][0]).astype(np.float64)
        return {**kept, "least": least, "most": summary.maxima["most"]}

    def _edges(self, count: int) -> list[int]:
        """Ranks of the greatest and of the least magnitude that is not clamped."""
        out = min(int(count * self.clamp), max((count - 1) // 2, 0))
        return [1 + out, max(count - out, 1)]

    def apply(self, work: Work, constants: Constants) -> None:
        merged, share = np.zeros(work.tile.box.lengths), np.zeros(work.tile.box.lengths)
        scores = self._scores(work, constants)
        ends = zip(constants["least"].tolist(), constants["most"].tolist(), strict=True)
        for values, score, weight, (least, most) in zip(work.values, scores, work.weights, ends, strict=True):
            span = most - least
            one = np.minimum(np.maximum(score - least, 0.0) / span, 1.0) if span > 0 else np.ones(score.shape)
            merged = merged + weight * (one * values)
            share = share + one
        work.merged = merged / np.maximum(share, SHARE_MIN)

    def _scores(self, work: Work, constants: Constants) -> list[Float64Array]:
        together = summed(work.values)
        most, least = constants["edges"]
        out = []
        for source, values in enumerate(work.values):
            span = most[source] - least[source]
            sizes = np.minimum(np.maximum(np.abs(values), least[source]), most[source])
            near = (sizes - least[source]) / span if span > 0 else np.zeros(sizes.shape)
            out.append(exp(len(work) * (near * near)) * tanh(values * together))
        return out
