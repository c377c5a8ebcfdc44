"""TSV-M: merge the task singular vectors of matrices (Gargiulo et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.merge.method import Constants, Float64Array, Matrix, Needs
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile


@merge_method("tsv_m")
@dataclass(frozen=True, kw_only=True)
class TsvM(Matrix):
    """The base plus the changes of all sources, each reduced to its leading singular vectors, which are made orthogonal to the
    others'. Tensors that are no matrices: the mean of the changes.

    Args:
        scale: of the merged change.
        rank: singular vectors of each source as a share of all; one over the number of sources when not given.
    """

    scale: float = 1.0
    rank: float | None = None

    @property
    def needs(self) -> Needs:
        return Needs(base=True, unit="matrix")

    def memory_bytes(self, shape: Sequence[int], num_sources: int) -> int:
        if len(shape) != 2:
            return 8 * math.prod(shape) * 4
        rows, columns = shape
        rank = min(rows, columns)
        kept = max(1, self._kept(rank, num_sources)) * num_sources
        return 8 * (4 * rows * columns + 3 * rank * rank + 3 * kept * (rows + columns))

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        kept = self._kept(min(tile.shape), len(tile)) if len(tile.shape) == 2 else 0
        if kept == 0:
            return tile.base + self.scale * _mean(tile)
        left, middle, right = [], [], []
        for source in range(len(tile)):  # one at a time: only the factors stay
            u, s, v = np.linalg.svd(tile.delta(source), full_matrices=False)
            left.append(u[:, :kept].copy())
            middle.append(s[:kept])
            right.append(v[:kept].copy())
        u, v = _polar(np.concatenate(left, axis=1)), _polar(np.concatenate(right, axis=0))
        out: Float64Array = tile.base + self.scale * ((u * np.concatenate(middle)) @ v)
        return out

    def _kept(self, rank: int, num_sources: int) -> int:
        return rank // num_sources if self.rank is None else min(rank // num_sources, int(self.rank * rank))


def _mean(tile: Tile) -> Float64Array:
    total: Float64Array = tile.delta(0)
    for source in range(1, len(tile)):
        total = total + tile.delta(source)
    return total / len(tile)


def _polar(matrix: Float64Array) -> Float64Array:
    """The nearest matrix with orthonormal columns (or rows)."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ v)
