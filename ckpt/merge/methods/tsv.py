"""TSV-M: merge the task singular vectors of matrices (Gargiulo et al. 2025), and a form of it with weights and ranks of its own.

In: the changes of all sources to one matrix. Out: the merged matrix. Formulas: docs/explanation/geometry-of-merging.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.merge.matrices import polar, svd, svd_nbytes
from ckpt.merge.method import Constants, Float64Array, Matrix, Needs
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile

SMALL = 0.05  # of its root mean square: what `rank: sparsity` counts as zero


@dataclass(frozen=True, kw_only=True)
class _Tsv(Matrix):
    """What both have in common: leading singular vectors of each change, made orthogonal to the others'."""

    scale: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(base=True, unit="matrix", weights=False)

    def memory_bytes(self, shape: Sequence[int], num_sources: int) -> int:
        if len(shape) != 2:
            return 8 * math.prod(shape) * 4
        rows, columns = shape
        kept = max(1, min(shape) // num_sources) * num_sources
        return svd_nbytes((rows, columns)) + 8 * (rows * columns + 2 * kept * (rows + columns))

    def kept(self, singular_values: Float64Array, delta: Float64Array, most: int) -> int:
        """How many singular vectors of a change stay, at most `most`."""
        raise NotImplementedError

    def weights_of(self, tile: Tile) -> list[float]:
        """What the change of each source is multiplied by."""
        return [1.0] * len(tile)

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        most = min(tile.shape) // len(tile) if len(tile.shape) == 2 else 0
        if most == 0:
            return tile.base + self.scale * _mean(tile)
        left, middle, right = [], [], []
        for source, weight in enumerate(self.weights_of(tile)):  # one at a time: only the factors stay
            delta = tile.delta(source)
            u, s, v = svd(delta)
            kept = min(len(s), self.kept(s, delta, most))
            left.append(u[:, :kept].copy())
            middle.append(weight * s[:kept])
            right.append(v[:kept].copy())
        u, v = polar(np.concatenate(left, axis=1)), polar(np.concatenate(right, axis=0))
        out: Float64Array = tile.base + self.scale * ((u * np.concatenate(middle)) @ v)
        return out


@merge_method("tsv_m")
@dataclass(frozen=True, kw_only=True)
class TsvM(_Tsv):
    """The base plus the changes of all sources, each reduced to its leading singular vectors, which are made orthogonal to the
    others'. Tensors that are no matrices, or have fewer rows or columns than there are sources: the mean of the changes.

    Args:
        scale: of the merged change.
        rank: singular vectors of each source as a share of all, at most one over the number of sources; that when not given.
    """

    rank: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and not 0 < self.rank <= 1:
            raise InvalidInputError(f"`rank` must be above 0 and at most 1, found {self.rank}")

    def kept(self, singular_values: Float64Array, delta: Float64Array, most: int) -> int:
        return most if self.rank is None else min(most, max(1, int(self.rank * min(delta.shape))))


@merge_method("tsv_m_reweighted")
@dataclass(frozen=True, kw_only=True)
class TsvMReweighted(_Tsv):
    """TSV-M with a weight for each source and a rank for each matrix. The published form of this (R-TSVM, RESM) could not be
    read: these kernels are ours, and bear our names.

    Args:
        scale: of the merged change.
        weigh: `outlier`: a source counts in a matrix by the norm of its outliers there, its elements above `sigmas` times their
            root mean square, times the number of sources over the sum of these norms; `uniform`: all count once.
        sigmas: see `weigh`.
        rank: how many singular vectors stay of those that TSV-M gives to a source: `energy`: the fewest with a share `energy`
            of the squares of all singular values; `sparsity`: the share of elements that are not small (0.05 times their root
            mean square, or less); `equal`: all.
        energy: see `rank`.
    """

    weigh: Literal["uniform", "outlier"] = "outlier"
    sigmas: float = 3.0
    rank: Literal["equal", "energy", "sparsity"] = "sparsity"
    energy: float = 0.9

    def __post_init__(self) -> None:
        if not self.sigmas > 0 or not 0 < self.energy <= 1:
            raise InvalidInputError("`sigmas` must be above 0, and `energy` above 0 and at most 1")

    def kept(self, singular_values: Float64Array, delta: Float64Array, most: int) -> int:
        if self.rank == "equal" or not len(singular_values):
            return most
        if self.rank == "energy":
            mass = np.cumsum(singular_values * singular_values)
            return min(most, 1 + int(np.searchsorted(mass, self.energy * mass[-1])))
        large = np.count_nonzero(np.abs(delta) > SMALL * _rms(delta))
        return max(1, int(most * (large / delta.size)))

    def weights_of(self, tile: Tile) -> list[float]:
        if self.weigh == "uniform":
            return [1.0] * len(tile)
        norms = [_outlier_norm(tile.delta(source), self.sigmas) for source in range(len(tile))]
        total = math.fsum(norms)
        return [len(norms) * norm / total for norm in norms] if total > 0 else [1.0] * len(norms)


def _rms(delta: Float64Array) -> float:
    return math.sqrt(float((delta * delta).sum()) / delta.size)


def _outlier_norm(delta: Float64Array, sigmas: float) -> float:
    """Of the elements that are far from zero."""
    outliers = delta[np.abs(delta) > sigmas * _rms(delta)]
    return math.sqrt(float((outliers * outliers).sum()))


def _mean(tile: Tile) -> Float64Array:
    total: Float64Array = tile.delta(0)
    for source in range(1, len(tile)):
        total = total + tile.delta(source)
    return total / len(tile)
