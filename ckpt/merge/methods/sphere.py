"""Means on the sphere: `multislerp`, `karcher`, and `nuslerp` of two. Each tensor, or each row of it, is one vector.

In: dot products of the sources' tensors. Out: weights of a sum. Formulas: docs/explanation/geometry-of-merging.md. A tensor that
is zero in some source has no direction there; it becomes the weighted mean, as with `slerp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Float64Array, Needs, SourceInfo
from ckpt.merge.methods.slerp import NEARLY_PARALLEL, NORM_MIN, slerp_weights
from ckpt.merge.registry import merge_method
from ckpt.merge.spanned import NoDirectionError, Spanned
from ckpt.merge.tile import Tile

CANCELLED = 1e-6  # a mean of unit vectors that is shorter than this points nowhere

Dots = Sequence[Sequence[float]]


def shares_of(sources: Sequence[SourceInfo], method: str) -> list[float]:
    """The users' weights over their sum. InvalidInputError where one is below zero, or all are zero."""
    weights = [source.weight for source in sources]
    if min(weights) < 0 or not sum(weights) > 0:
        raise InvalidInputError(
            f"method `{method}` needs weights of 0 and above that do not sum to 0, found {weights}", kind="bad-weights"
        )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True, kw_only=True)
class _Sphere(Spanned):
    """Vectors of unit length in the span of the sources are written as weights of the sources' unit vectors."""

    deltas: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(base=self.deltas, passes=1, scope="tensor")

    def check(self, context: Context) -> None:
        shares_of(context.sources, self.name)

    def weigh(self, dots: Dots, sources: Sequence[SourceInfo]) -> list[float]:
        shares = shares_of(sources, self.name)
        norms = [math.sqrt(dots[i][i]) for i in range(len(shares))]
        if min(norms) < NORM_MIN:
            return shares
        cosines = [
            [max(-1.0, min(1.0, dots[i][j] / math.sqrt(dots[i][i] * dots[j][j]))) for j in range(len(shares))]
            for i in range(len(shares))
        ]
        length = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
        return [length * part / norm for part, norm in zip(self.direction(cosines, shares), norms, strict=True)]

    def direction(self, cosines: Dots, shares: Sequence[float]) -> list[float]:
        """The unit vector of the result, as weights of unit vectors."""
        raise NotImplementedError


@merge_method("multislerp")
@dataclass(frozen=True, kw_only=True)
class Multislerp(_Sphere):
    """A spherical mean of any number of sources: at the point where their weighted mean meets the sphere, the mean of the ways to
    all of them, walked along the sphere. Its length is the weighted mean of theirs.

    Args:
        deltas: of the changes to the base instead of the parameters themselves.
        ways: how long they are: as the arcs, or as their chords seen from the side (as mergekit has it): the mean of those is
            nothing, so that the weighted mean of the unit vectors, made a unit vector, is all there is to it.
    """

    ways: Literal["arc", "chord"] = "arc"

    def direction(self, cosines: Dots, shares: Sequence[float]) -> list[float]:
        start = _start(cosines, shares)
        return start if self.ways == "chord" else _walked(cosines, shares, start)[0]


@merge_method("karcher")
@dataclass(frozen=True, kw_only=True)
class Karcher(_Sphere):
    """The point of the sphere with the least sum of squared (weighted) distances to all sources: `multislerp` again and again.

    Args:
        deltas: of the changes to the base instead of the parameters themselves.
        steps_max: walks at most.
        tolerance: a walk that is shorter (radians) is the last one.
    """

    steps_max: int = 10
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if not 1 <= self.steps_max <= 1000 or not self.tolerance > 0:
            raise InvalidInputError("`steps_max` must be 1 to 1000 and `tolerance` above 0")

    def direction(self, cosines: Dots, shares: Sequence[float]) -> list[float]:
        at = _start(cosines, shares)
        for _ in range(self.steps_max):
            at, way = _walked(cosines, shares, at)
            if way < self.tolerance:
                break
        return at


def _start(cosines: Dots, shares: Sequence[float]) -> list[float]:
    """The weighted mean of unit vectors, made a unit vector."""
    length = _length(cosines, shares)
    if length < CANCELLED:
        raise NoDirectionError("point in opposite directions, so that their weighted mean points nowhere")
    return [share / length for share in shares]


def _walked(cosines: Dots, shares: Sequence[float], at: Sequence[float]) -> tuple[list[float], float]:
    """Walk from a point of the sphere along the mean of the ways to all sources; where that leads, and how far it is."""
    along = [math.fsum(part * cosine for part, cosine in zip(at, row, strict=True)) for row in cosines]
    if min(along) < -NEARLY_PARALLEL:
        raise NoDirectionError("have one opposite to their mean, to which no way is the shortest")
    angles = [math.acos(max(-1.0, min(1.0, cosine))) for cosine in along]
    pull = [share * (_over_sine(angle)) for share, angle in zip(shares, angles, strict=True)]
    back = math.fsum(one * cosine for one, cosine in zip(pull, along, strict=True))
    way = [one - back * part for one, part in zip(pull, at, strict=True)]
    far = _length(cosines, way)
    if far == 0.0:
        return list(at), 0.0
    there = [math.cos(far) * part + math.sin(far) / far * step for part, step in zip(at, way, strict=True)]
    length = _length(cosines, there)  # one, but for rounding
    return [part / length for part in there], far


def _over_sine(angle: float) -> float:
    """angle / sin(angle)."""
    return 1.0 if angle < 1e-4 else angle / math.sin(angle)  # off by less than 2e-9 there, and acos is no better


def _length(cosines: Dots, parts: Sequence[float]) -> float:
    square = math.fsum(a * b * cosines[i][j] for i, a in enumerate(parts) for j, b in enumerate(parts))
    return math.sqrt(max(square, 0.0))


@merge_method("nuslerp")
@dataclass(frozen=True, kw_only=True)
class Nuslerp(Spanned):
    """Along the arc between two sources, as far as their weights say: the share of the one in their sum, seen from the other.

    Args:
        deltas: of the changes to the base instead of the parameters themselves.
        vector: what is one vector: a tensor, or each row of it (the last dim).
    """

    deltas: bool = False
    vector: Literal["tensor", "row"] = "tensor"

    @property
    def needs(self) -> Needs:
        rows = self.vector == "row"
        return Needs(
            base=self.deltas,
            unit="row" if rows else "element",
            passes=0 if rows else 1,
            scope="tensor",
            num_sources_min=2,
            num_sources_max=2,
        )

    def check(self, context: Context) -> None:
        shares_of(context.sources, self.name)

    def weigh(self, dots: Dots, sources: Sequence[SourceInfo]) -> list[float]:
        shares = shares_of(sources, self.name)
        return shares if len(shares) == 1 else list(slerp_weights(dots, 0, 1, shares[1]))

    def write(self, tile: Tile, constants: Constants, target: NDArray[np.uint8], dtype: str) -> bool:
        if self.vector == "tensor" or len(tile) == 1:
            return super().write(tile, constants or {"weights": [1.0]}, target, dtype)
        return kernels.narrow(self._rows(tile), dtype, target)

    def _rows(self, tile: Tile) -> Float64Array:
        one, other = (array.reshape(-1, tile.shape[-1] if tile.shape else 1) for array in self._vectors(tile))
        t = shares_of(tile.sources, self.name)[1]
        columns = ((one * one).sum(axis=1), (one * other).sum(axis=1), (other * other).sum(axis=1))
        found = [
            slerp_weights(((a, b), (b, c)), 0, 1, t) for a, b, c in zip(*map(np.ndarray.tolist, columns), strict=True)
        ]
        weights = np.array(found).reshape(-1, 2)
        out = (weights[:, :1] * one + weights[:, 1:] * other).reshape(tile.box.lengths)
        return tile.base + out if self.deltas else np.asarray(out)

    def _vectors(self, tile: Tile) -> list[Float64Array]:
        return tile.deltas if self.deltas else tile.arrays
