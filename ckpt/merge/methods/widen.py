"""WIDEN: weigh changes by how much the length and the direction of each column changed (Yu et al. 2024).

In: tiles of whole rows. Out: merged elements. One pass finds norms and dot products of columns. Formulas:
docs/explanation/geometry-of-merging.md.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.merge.method import Constants, Context, Elementwise, Float64Array, Needs, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile


@merge_method("widen")
@dataclass(frozen=True, kw_only=True)
class Widen(Elementwise):
    """The base plus the changes of all sources, each column times its score: the mean of two, of its length and of its direction.
    A score compares how high a column ranks among all columns of its source, by how much it changed, with its rank in the other
    sources. Vectors: the same of each element by the size of its change. Tensors of three dims and more: the mean of the changes.

    Args:
        above: a column that ranks above so many times the mean rank has the score `calibrated`, whatever it is elsewhere.
        calibrated: see `above`.
        rows: names of matrices whose rows are compared instead of columns, as `*` patterns: embeddings.
    """

    above: float = 1.0
    calibrated: float = 1.0
    rows: tuple[str, ...] = ("*embed*", "*wte*", "*wpe*")

    def __post_init__(self) -> None:
        if not self.above >= 0:
            raise InvalidInputError(f"`above` must be 0 or more, found {self.above}")

    @property
    def needs(self) -> Needs:
        return Needs(base=True, passes=1, scope="tensor", unit="row", weights=False)

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        if len(tile.shape) != 2:
            return Summary(sums={"rows": np.zeros(1)})
        axis = self._axis(tile.name)
        base, arrays = tile.base, tile.arrays
        found = {
            "own": np.array([(array * array).sum(axis=axis) for array in arrays]),
            "both": np.array([(array * base).sum(axis=axis) for array in arrays]),
            "base": (base * base).sum(axis=axis)[None],
        }
        if axis == 1:  # of some rows: in their places among all
            found = {name: _placed(array, tile) for name, array in found.items()}
        return Summary(sums={**found, "rows": np.array([float(axis)])})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        sums = summary.sums
        if "own" not in sums:
            return {}
        own, base = np.sqrt(sums["own"]), np.sqrt(sums["base"])
        cosine = np.divide(sums["both"], own * base, out=np.zeros_like(own), where=(own > 0) & (base > 0))
        turned = np.where((own == 0) & (base == 0), 0.0, 1.0 - cosine)
        weights = 0.5 * (self._scores(np.abs(own - base)) + self._scores(turned))
        return {"weights": weights, "axis": int(sums["rows"][0] > 0)}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        out: Float64Array = np.zeros(tile.box.lengths)
        if len(tile.shape) > 2:
            weights = np.full(len(tile), 1.0 / len(tile))
        elif len(tile.shape) == 2:
            weights = constants["weights"]
            if constants["axis"] == 1:
                first = tile.box.offsets[0]
                weights = weights[:, first : first + tile.box.lengths[0], None]
        else:  # all of a vector is in one tile
            sizes = np.array([np.abs(delta).reshape(-1) for delta in tile.deltas])
            weights = self._scores(sizes).reshape(-1, *tile.shape)
        for source in range(len(tile)):
            out = out + weights[source] * tile.delta(source)
        return tile.base + out

    def _axis(self, name: str) -> int:
        """What is summed over: rows, so that columns stay; or the other way round."""
        return 1 if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.rows) else 0

    def _scores(self, changes: Float64Array) -> Float64Array:
        """[S, n] of how much each of n columns changed in each source -> its score there."""
        num = changes.shape[1]
        ranks = np.empty(changes.shape, np.int64)
        for source, row in enumerate(changes):
            ranks[source, np.argsort(row, kind="stable")] = np.arange(num)
        powers = np.array([math.exp(rank / num) for rank in range(num)])[
            ranks
        ]  # e to the rank, for a softmax over sources
        total = powers[0]
        for row in powers[1:]:
            total = total + row
        high = ranks / num > self.above * ((num - 1) / (2 * num))
        return np.where(high, self.calibrated, powers / total)


def _placed(array: Float64Array, tile: Tile) -> Float64Array:
    first = tile.box.offsets[0]
    out = np.zeros((len(array), tile.shape[0]))
    out[:, first : first + array.shape[1]] = array
    return out
