"""Methods whose result is a weighted sum with weights that follow, tensor by tensor, from the dot products of the sources.

In: tiles. Out: `Spanned`, to be made a method by `weigh`. One pass of statistics, then a weighted sum by the native loop; where a
tensor fits into the memory, its elements are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import CheckpointError
from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Context, Elementwise, Float64Array, SourceInfo, Summary
from ckpt.merge.tile import Tile


class NoDirectionError(Exception):
    """Why the sources of a tensor have no weights. The message goes on from "the sources of `name` ..."."""


@dataclass(frozen=True, kw_only=True)
class Spanned(Elementwise):
    """A tensor is one vector. The result is the sum of the sources, or the base plus the sum of their changes."""

    @property
    def from_base(self) -> bool:
        """Whether vectors are changes to the base."""
        return self.needs.base

    def weigh(self, dots: Sequence[Sequence[float]], sources: Sequence[SourceInfo]) -> list[float]:
        """Weights of the sources of a tensor, given the dot products of their vectors. NoDirectionError when there are none."""
        raise NotImplementedError

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        return Summary(sums={"dots": kernels.gram(tile.raw(less_base=self.from_base), threads=tile.threads)})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        sources = [source for source in context.sources if source.weight != 0.0]  # those that tiles have
        try:
            return {"weights": self.weigh(summary.sums["dots"].tolist(), sources)}
        except NoDirectionError as error:
            return {"why": str(error)}  # told where the tensor has a name

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        out = np.empty(tile.box.lengths)
        self.write(tile, constants, out.reshape(-1).view(np.uint8), "float64")
        return out

    def write(self, tile: Tile, constants: Constants, target: NDArray[np.uint8], dtype: str) -> bool:
        if "why" in constants:
            raise CheckpointError(
                f"method `{self.name}` cannot merge `{tile.name}`: its sources {constants['why']}",
                kind="no-direction",
                hints=("a rule can give this tensor another method, or other weights mend it",),
            )
        weights, elements = list(constants["weights"]), list(tile.elements)
        if self.from_base:
            assert tile.base_elements is not None
            weights.append(1.0 - sum(weights))
            elements.append(tile.base_elements)
        kept = [i for i, weight in enumerate(weights) if weight != 0.0] or [0]
        chosen = [elements[i] for i in kept]
        return kernels.combine(chosen, [weights[i] for i in kept], target, dtype, threads=tile.threads)
