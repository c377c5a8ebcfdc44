"""Weighted sums whose weights were found by a search: by group of tensors, and by range of elements of one tensor.

In: records of sources, tiles. Out: coefficients, merged elements. ckpt/search/ writes recipes with these methods; nothing of
evaluators or drivers is known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.merge.method import Coefficients, Constants, Context, Elementwise, Linear, Needs
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile


@merge_method("coefficients")
@dataclass(frozen=True, kw_only=True)
class GroupCoefficients(Linear):
    """The sum of all sources, each times a weight that the tensor's name decides; nothing is divided.

    Args:
        match: name patterns, one for each row of `weights`. A name in full wins, then the first pattern that matches.
        weights: rows of one weight per source, in the order in which the sources are named, one row after the other.
        deltas: the weights are of changes to the base, which has the rest: base + sum of w_i * (x_i - base).
    """

    match: tuple[str, ...]
    weights: tuple[float, ...]
    deltas: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(base=self.deltas)

    def __post_init__(self) -> None:
        if not self.match or len(self.weights) % len(self.match):
            raise InvalidInputError(f"{len(self.weights)} weights are no rows for {len(self.match)} patterns")
        assert self._patterns  # they parse

    def check(self, context: Context) -> None:
        _check_width(len(self.weights) // len(self.match), context)

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        row, num = self._row(tensor.name), len(context.sources)
        given = self.weights[row * num : (row + 1) * num]
        weights = tuple(given[source.place] for source in context.sources)
        if not any(weights) and not self.deltas:
            raise InvalidInputError(f"all weights of `{tensor.name}` are 0", kind="zero-weights")
        return Coefficients(weights=weights, base=_rest(weights) if self.deltas else 0.0)

    @cached_property
    def _patterns(self) -> list[NamePattern]:
        return [NamePattern(text) for text in self.match]

    @cached_property
    def _exact(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for i, pattern in enumerate(self._patterns):
            if pattern.exact:
                found.setdefault(pattern.text, i)
        return found

    def _row(self, name: str) -> int:
        if name in self._exact:
            return self._exact[name]
        parsed = TensorName.parse(name)
        for i, pattern in enumerate(self._patterns):
            if pattern.match(name, parsed) is not None:
                return i
        raise InvalidInputError(f"`{name}` matches none of the patterns {', '.join(self.match[:20])}", kind="no-group")


@merge_method("pieces")
@dataclass(frozen=True, kw_only=True)
class Pieces(Elementwise):
    """As `coefficients`, with weights that change inside a tensor (split points of M2N2).

    Args:
        starts: row-major number of the first element of each piece; the first is 0.
        weights: a row of weights for each piece.
        deltas: as in `coefficients`.
    """

    starts: tuple[int, ...]
    weights: tuple[float, ...]
    deltas: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(base=self.deltas)

    def __post_init__(self) -> None:
        starts = list(self.starts)
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or len(self.weights) % len(starts):
            raise InvalidInputError(
                f"`starts` must rise from 0, with as many weights for each, found {starts[:20]} and "
                f"{len(self.weights)} weights"
            )

    def check(self, context: Context) -> None:
        _check_width(len(self.weights) // len(self.starts), context)

    def apply(self, tile: Tile, constants: Constants) -> NDArray[np.float64]:
        rows = np.array(self.weights).reshape(len(self.starts), -1)
        rows = rows[:, [source.place for source in tile.sources]]
        first, volume = tile.first, tile.box.volume
        arrays = [array.reshape(-1) for array in tile.arrays]
        base = tile.base.reshape(-1) if self.deltas else None
        out = np.empty(volume)
        for row, start, stop in zip(rows, self.starts, [*self.starts[1:], first + volume], strict=True):
            low, high = max(start - first, 0), min(stop - first, volume)
            if low < high:
                out[low:high] = _sum(
                    [a[low:high] for a in arrays], row.tolist(), None if base is None else base[low:high]
                )
        return out.reshape(tile.box.lengths)


def _sum(
    arrays: Sequence[NDArray[np.float64]], weights: Sequence[float], base: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """As the native weighted sum: products and sums one by one, in canonical order, no source with weight 0, the base last."""
    terms = [weight * array for weight, array in zip(weights, arrays, strict=True) if weight != 0.0]
    if base is not None and (rest := _rest(weights)) != 0.0:
        terms.append(rest * base)
    total = terms[0] if terms else np.zeros_like(arrays[0])
    for term in terms[1:]:
        total = total + term
    return total


def _rest(weights: Sequence[float]) -> float:
    """What is left for the base."""
    return 1.0 - math.fsum(weights)


def _check_width(width: int, context: Context) -> None:
    if width != len(context.sources):
        raise InvalidInputError(f"{width} weights in a row for {len(context.sources)} sources", kind="wrong-number")
