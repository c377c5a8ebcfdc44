"""DOGE: adaptive projective gradient descent (Wei et al. 2025): learn one correction per matrix, from the changes alone.

In: the changes of all sources to one matrix, and thresholds of the whole model. Out: the merged matrix. No data and no gradients
of a model: some hundred steps of Adam on a quadratic of the changes, for each matrix. Formulas:
docs/explanation/geometry-of-merging.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.merge import thresholds
from ckpt.merge.matrices import svd, svd_nbytes
from ckpt.merge.method import Constants, Context, Float64Array, Matrix, Needs, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # of Adam


@merge_method("doge")
@dataclass(frozen=True, kw_only=True)
class Doge(Matrix):
    """The base plus the sum over all sources of a weight times its largest changes and a correction that all share. The weight is
    `eta` over the norm of a source's change to a tensor. Tensors that are no matrices: without a correction.

    Args:
        eta: see above.
        keep: the share of a source's changes that is kept, over the whole model, those of the greatest magnitude.
        steps: of Adam, for each matrix.
        rate: its learning rate.
        shared: the share of a matrix's rank that the space has in which nothing is corrected: the leading directions that sources
            have in common. 0: none.
    """

    eta: float = 0.07
    keep: float = 0.3
    steps: int = 400
    rate: float = 1e-4
    shared: float = 1.0 / 6.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 <= self.shared <= 1:
            raise InvalidInputError("`keep` must be above 0 and at most 1, `shared` 0 to 1")
        if self.steps < 0 or not self.rate > 0 or not self.eta > 0:
            raise InvalidInputError("`steps` must be 0 or more, `rate` and `eta` above 0")

    @property
    def needs(self) -> Needs:
        return Needs(base=True, unit="matrix", passes=2, scope="model", weights=False)

    def memory_bytes(self, shape: Sequence[int], num_sources: int) -> int:
        own = 8 * math.prod(shape) * (num_sources + 5)
        return own + svd_nbytes((shape[0], shape[1])) if len(shape) == 2 else own

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        return thresholds.counted(tile.raw(less_base=True), number, constants, threads=tile.threads)

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        found = thresholds.resolved(number, summary, constants, lambda count: [max(1, int(self.keep * count))])
        return found if number == 0 else {"least": found["bits"][0]}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        deltas = tile.deltas
        weights = [self._weight(delta) for delta in deltas]
        correction = self._correction(deltas, weights) if len(tile.shape) == 2 and self.steps else 0.0
        out: Float64Array = np.zeros(tile.box.lengths)
        for weight, delta, least in zip(weights, deltas, constants["least"], strict=True):
            bits = np.abs(delta).astype(np.float32).view(np.uint32)
            out = out + weight * (np.where(bits >= least, delta, 0.0) + correction)
        return tile.base + out

    def _weight(self, delta: Float64Array) -> float:
        norm = math.sqrt(float((delta * delta).sum()))
        return self.eta / norm if norm > 0 else 0.0

    def _correction(self, deltas: Sequence[Float64Array], weights: Sequence[float]) -> Float64Array:
        """Adam on the sum over sources j, rows r of (the sum over columns of t_j (t_j - M - L X))^2, with M and L the weighted
        sum of changes and the sum of weights, and X the correction."""
        shape, total = deltas[0].shape, math.fsum(weights)
        out, first, second = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        if total == 0.0:
            return out
        mean = np.zeros(shape)
        for weight, delta in zip(weights, deltas, strict=True):
            mean = mean + weight * delta
        gaps = [(delta * (delta - mean)).sum(axis=1) for delta in deltas]  # what the rows of each source sum to, less X
        space = self._space(deltas)
        for step in range(1, self.steps + 1):
            gradient = np.zeros(shape)
            for delta, gap in zip(deltas, gaps, strict=True):
                left = gap - total * (delta * out).sum(axis=1)
                gradient -= (2.0 * total * left)[:, None] * delta
            if space is not None:
                gradient -= space @ (space.T @ gradient)
            first = BETA_1 * first + (1.0 - BETA_1) * gradient
            second = BETA_2 * second + (1.0 - BETA_2) * (gradient * gradient)
            root = np.sqrt(second / (1.0 - BETA_2**step)) + EPSILON
            out -= self.rate * (first / (1.0 - BETA_1**step)) / root
        return out

    def _space(self, deltas: Sequence[Float64Array]) -> Float64Array | None:
        """Orthonormal columns: the directions that the leading left singular vectors of all sources share most."""
        rank = min(deltas[0].shape)
        each, wanted = rank // len(deltas), int(rank * self.shared)
        if not each or not wanted:
            return None
        leading = np.concatenate([svd(delta)[0][:, :each] for delta in deltas], axis=1)
        space = svd(leading)[0][:, :wanted]
        return space if space.shape[1] else None
