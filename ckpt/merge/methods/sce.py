"""SCE: select elements on which sources differ, calculate weights from what is left, erase what goes against the sum's sign
(FuseChat, Wan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.merge.method import Constants, Context, Elementwise, Float64Array, Needs, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.thresholds import HIGH_BITS, LOW_BITS, place_of
from ckpt.merge.tile import Tile

_HIGH, _LOW, _WEIGHTS = "high", "low", "weights"  # passes


@merge_method("sce")
@dataclass(frozen=True, kw_only=True)
class Sce(Elementwise):
    """The base plus the weighted mean of the changes that have the sign of their sum; a source's weight is its share of the
    squared changes of a tensor.

    Args:
        select: the share of a tensor's elements that is merged, those whose changes vary most over the sources (of those that
            vary at all; all of equal variance); 1 takes all. Where no element varies, all are taken.
    """

    select: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.select <= 1:
            raise InvalidInputError(f"`select` must be above 0 and at most 1, found {self.select}")

    @property
    def needs(self) -> Needs:
        return Needs(base=True, passes=len(self._passes), scope="tensor", weights=False)

    @property
    def _passes(self) -> tuple[str, ...]:
        return (_WEIGHTS,) if self.select == 1 else (_HIGH, _LOW, _WEIGHTS)

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        deltas = tile.deltas
        if self._passes[number] == _WEIGHTS:
            return Summary(sums={"squares": np.array([_sum_of_squares(d) for d in _selected(deltas, constants)])})
        bits = _spread_bits(deltas)
        if self._passes[number] == _HIGH:
            counts = np.bincount(bits >> LOW_BITS, minlength=1 << HIGH_BITS)
            return Summary(sums={"bins": counts, "varying": np.array([np.count_nonzero(bits)])})
        low = bits[bits >> LOW_BITS == constants["prefix"]] & ((1 << LOW_BITS) - 1)
        return Summary(sums={"bins": np.bincount(low, minlength=1 << LOW_BITS)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        kind = self._passes[number]
        if kind == _WEIGHTS:
            squares = summary.sums["squares"]
            total = float(squares.sum())
            weights = squares / total if total > 0 else np.full(len(squares), 1.0 / len(squares))
            return {**constants, "weights": weights}
        bins = summary.sums["bins"].astype(np.uint64)
        if kind == _HIGH:
            varying = int(summary.sums["varying"][0])
            place, left = place_of(bins, max(1, int(self.select * varying)))
            return {"prefix": place, "left": left, "varying": varying}
        place, _ = place_of(bins, constants["left"])
        least = (constants["prefix"] << LOW_BITS) | place
        return {"least": least if constants["varying"] else 0}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        deltas = _selected(tile.deltas, constants)
        positive = _sum(deltas) >= 0
        up, down = np.zeros(tile.box.lengths), np.zeros(tile.box.lengths)
        for weight, delta in zip(constants["weights"], deltas, strict=True):
            agree = np.where(positive, delta > 0, delta < 0)
            up = up + np.where(agree, weight * delta, 0.0)
            down = down + np.where(agree, weight, 0.0)
        out: Float64Array = tile.base + np.divide(up, down, out=np.zeros_like(up), where=down > 0)
        return out


def _selected(deltas: Sequence[Float64Array], constants: Constants) -> list[Float64Array]:
    """The changes, those that are not selected set to zero."""
    if not constants.get("least"):
        return list(deltas)
    kept = _spread_bits(deltas).reshape(deltas[0].shape) >= constants["least"]
    return [np.where(kept, delta, 0.0) for delta in deltas]


def _spread_bits(deltas: Sequence[Float64Array]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The standard deviation of each element over the sources, rounded to fp32, as bits: they rise with it."""
    mean = _sum(deltas) / len(deltas)
    squares = _sum([(delta - mean) * (delta - mean) for delta in deltas])
    return np.sqrt(squares / len(deltas)).astype(np.float32).reshape(-1).view(np.uint32).astype(np.int64)


def _sum(arrays: Sequence[Float64Array]) -> Float64Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _sum_of_squares(array: Float64Array) -> float:
    return float((array * array).sum())
