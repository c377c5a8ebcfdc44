"""OPCM: take in one fine-tune after the other, each projected away from what is there (Tang et al. 2025), in constant memory.

In: the changes of all sources to one matrix, and where an earlier merge left off. Out: the merged matrix, and what a later merge
goes on from. Formulas: docs/explanation/geometry-of-merging.md.

The published recipe keeps a scale l with the merged change T: T' = l T + D', then l = |T'| / m and T = T' / l, with m the mean
length of the changes taken in. So l T is the unscaled sum of all D', and the directions of T are its directions: within one merge
that sum is all there is to keep, and one pass over the model finds its length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.errors import InvalidInputError, MismatchError
from ckpt.kernels import merge as kernels
from ckpt.merge.matrices import svd, svd_nbytes
from ckpt.merge.method import Constants, Context, Float64Array, Matrix, Needs, Order, Summary
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile


@merge_method("opcm")
@dataclass(frozen=True, kw_only=True)
class Opcm(Matrix):
    """The base plus the sum of all changes, each without what it has in the leading directions of those before it, scaled to the
    mean length of the changes. The result keeps what a later merge needs to take in more sources without the earlier ones: give
    it as the first source.

    Args:
        alpha: how much of the singular values of what is there counts as its leading directions.
        order: which source is taken in first.
        fresh: take a source that such a merge made for one like any other.
    """

    alpha: float = 0.5
    order: Order = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InvalidInputError(f"`alpha` must be 0 to 1, found {self.alpha}")

    @property
    def needs(self) -> Needs:
        return Needs(base=True, unit="matrix", passes=1, scope="model", ordered=True, weights=False)

    @property
    def keeps_state(self) -> bool:
        return True

    def memory_bytes(self, shape: Sequence[int], num_sources: int) -> int:
        own = 8 * 4 * math.prod(shape)
        return own + svd_nbytes((shape[0], shape[1])) if len(shape) == 2 else own

    def check(self, context: Context) -> None:
        order = context.in_order(self.order)
        earlier = [number for number in order if self._state_of(context, number)]
        if not earlier:
            return
        first = context.sources[earlier[0]]
        if earlier != order[:1]:
            raise InvalidInputError(
                f"{first.label} is a merge that is gone on with, so it must be the first source, and the only such one",
                kind="not-first",
                hints=("`order: given` takes sources as they are named", "`fresh: true` takes it for a plain source"),
            )
        assert context.base is not None
        if first.state["base"] != context.base.digest:
            raise MismatchError(
                f"{first.label} was merged on another base than {context.base.label}: expected {first.state['base']}, found "
                f"{context.base.digest}",
                kind="other-base",
            )

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        merged, lengths = self._merged(tile)
        return Summary(sums={"merged": np.array([_squares(merged)]), "lengths": np.array(lengths)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        first = context.in_order(self.order)[0]
        state = self._state_of(context, first)
        lengths = np.sqrt(summary.sums["lengths"]).tolist()
        own = lengths[1:] if state else lengths  # what is gone on with is no change of its own
        count = int(state.get("count", 0)) + len(own)
        mean = (float(state.get("mean", 0.0)) * int(state.get("count", 0)) + math.fsum(own)) / max(count, 1)
        length = math.sqrt(float(summary.sums["merged"][0]))
        return {"scale": length / mean if mean > 0 and length > 0 else 1.0, "mean": mean, "count": count}

    def state(self, constants: Constants, context: Context) -> Mapping[str, Any]:
        assert context.base is not None
        return {"base": context.base.digest, **{key: constants[key] for key in ("scale", "mean", "count")}}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        out: Float64Array = tile.base + self._merged(tile)[0] / constants["scale"]
        return out

    def _state_of(self, context: Context, number: int) -> Mapping[str, Any]:
        """What a source that such a merge made says of itself; nothing of any other one."""
        state = context.sources[number].state
        return state if not self.fresh and state.get("method") == self.name else {}

    def _merged(self, tile: Tile) -> tuple[Float64Array, list[float]]:
        """The sum of all changes, projected; and the sum of squares of each change as it came, in order."""
        order = tile.context.in_order(self.order)
        state = self._state_of(tile.context, order[0])
        total = tile.delta(order[0])
        lengths = [_squares(total)]
        if state:
            total = float(state["scale"]) * total
        for number in order[1:]:
            delta = tile.delta(number)
            lengths.append(_squares(delta))
            total = total + (self._projected(delta, total) if len(tile.shape) == 2 else delta)
        return total, lengths

    def _projected(self, delta: Float64Array, total: Float64Array) -> Float64Array:
        """A change without its part in the leading block of what is there, and on the rest of its diagonal."""
        u, s, v = svd(total)
        if not len(s):
            return delta
        above = np.flatnonzero(np.cumsum(s) / s.sum() > self.alpha)
        leading = int(above[0]) if len(above) else len(s)
        inner = u.T @ delta @ v.T
        removed = np.zeros_like(inner)
        removed[:leading, :leading] = inner[:leading, :leading]
        rest = np.arange(leading, len(s))
        removed[rest, rest] = inner[rest, rest]
        out: Float64Array = delta - u @ removed @ v
        return out


def _squares(array: Float64Array) -> float:
    flat = np.ascontiguousarray(array).reshape(-1)
    if not flat.size:
        return 0.0
    elements = kernels.Elements(data=flat.view(np.uint8), dtype="float64")
    return float(kernels.moments(kernels.Tile(sources=[elements]))[0, 2])
