"""A merge that can be undone: the mean of all sources, and a basis of how they differ from it, from which each source comes back.

In: tiles. Out: for each tensor the mean, and as many tensors as are kept: directions. Coefficients, and how much is lost, go
into the lineage. Formulas: docs/explanation/geometry-of-merging.md. (Reversible Model Merging, as its summaries have it, does
this with rows of adapters' factors; its paper could not be read. This is our own form of it: whole tensors, around their mean.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import FloatDtype
from ckpt.merge.matrices import one_thread
from ckpt.merge.method import Coefficients, Constants, Context, Elementwise, Float64Array, Linear, Needs, Summary
from ckpt.merge.outputs import UNMERGE
from ckpt.merge.registry import merge_method
from ckpt.merge.tile import Tile

NOISE = 2e-8  # of the largest singular value: what a matrix of dot products does not see


@merge_method("reversible")
@dataclass(frozen=True, kw_only=True)
class Reversible(Elementwise):
    """The mean of all sources, and beside it the directions in which they differ most, tensor by tensor: `ckpt unmerge` gives
    each source back. With one direction less than there are sources nothing is lost but the rounding of what is stored.

    Args:
        keep: directions, at most one less than sources.
        error_max: how far from a source that comes back, at most, relative to the length of its parameters; an error before
            anything is written where it would be further.
    """

    keep: int = 2
    error_max: float | None = None

    def __post_init__(self) -> None:
        if self.keep < 1 or (self.error_max is not None and not self.error_max >= 0):
            raise InvalidInputError("`keep` must be 1 or more, and `error_max` 0 or more")

    @property
    def needs(self) -> Needs:
        return Needs(passes=1, scope="model", num_sources_min=2, weights=False)

    @property
    def keeps_state(self) -> bool:
        return True

    def num_outputs(self, context: Context) -> int:
        return 1 + min(self.keep, len(context.sources) - 1)

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        first, *others = tile.elements
        differences = kernels.gram(kernels.Tile(sources=others, base=first), threads=tile.threads)
        squares = kernels.moments(tile.raw(), threads=tile.threads)[:, 2]
        dtypes = np.array([FloatDtype[one.dtype].value for one in tile.elements], np.float64)
        return Summary(
            sums={f"differences {tile.name}": differences, f"squares {tile.name}": squares},
            maxima={f"dtypes {tile.name}": dtypes},
        )

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        names = [key.partition(" ")[2] for key in sorted(summary.maxima)]
        kept = self.num_outputs(context) - 1
        with one_thread():
            bases = {name: _basis(summary.sums[f"differences {name}"], kept) for name in names}
        lost = np.sqrt(sum(bases[name]["lost"] ** 2 for name in names))
        lengths = np.sqrt(sum(summary.sums[f"squares {name}"] for name in names))
        errors = np.divide(lost, lengths, out=np.zeros_like(lost), where=lengths > 0)
        worst = int(np.argmax(errors))
        if self.error_max is not None and errors[worst] > self.error_max:
            raise CheckpointError(
                f"{context.sources[worst].label} would come back with an error of {errors[worst]:.3g}, and `error_max` is "
                f"{self.error_max:g}",
                kind="error-too-large",
                hints=(f"more directions than {kept} are up to {len(context.sources) - 1}: `--set keep=N`",),
            )
        return {
            "bases": bases,
            "squares": {name: summary.sums[f"squares {name}"] for name in names},
            "dtypes": {name: summary.maxima[f"dtypes {name}"] for name in names},
        }

    def state(self, constants: Constants, context: Context) -> Mapping[str, Any]:
        dtypes = [
            sorted({FloatDtype(int(found[i])).name for found in constants["dtypes"].values()})
            for i in range(len(context.sources))
        ]
        return {
            "sources": [
                {"label": source.label, "step": source.step, "dtypes": found}
                for source, found in zip(context.sources, dtypes, strict=True)
            ],
            "tensors": {
                name: {
                    "of": basis["of"].tolist(),
                    "sizes": basis["sizes"].tolist(),
                    "lost": basis["lost"].tolist(),
                    "lengths": np.sqrt(constants["squares"][name]).tolist(),
                }
                for name, basis in constants["bases"].items()
            },
        }

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        if tile.output == 0:
            total: Float64Array = tile.array(0)
            for source in range(1, len(tile)):
                total = total + tile.array(source)
            return total / len(tile)
        column = constants["bases"][tile.name]["of"][:, tile.output - 1]
        column = column - column.mean()  # so that differences to the first are as good as those to the mean
        out: Float64Array = np.zeros(tile.box.lengths)
        for source in range(1, len(tile)):
            difference = kernels.widen(tile.elements[source], base=tile.elements[0], threads=tile.threads)
            out = out + column[source] * difference.reshape(tile.box.lengths)
        return out


def _basis(differences: Float64Array, kept: int) -> dict[str, Float64Array]:
    """Of one tensor, from the dot products of all sources less the first one.

    Returns:
        of [S, kept]: what each source is made of, and of what each direction is: orthonormal columns.
        sizes [kept]: lengths of the directions.
        lost [S]: the length of what does not come back.
    """
    num = len(differences) + 1
    dots = np.zeros((num, num))
    dots[1:, 1:] = differences
    dots = dots - dots.mean(axis=0)
    dots = dots - dots.mean(axis=1)[:, None]  # of differences to the mean
    values, vectors = np.linalg.eigh((dots + dots.T) / 2)
    squares, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    top = np.argmax(np.abs(vectors), axis=0)
    vectors = vectors * np.where(vectors[top, np.arange(num)] < 0, -1.0, 1.0)
    rest = (vectors[:, kept : num - 1] ** 2 * squares[kept : num - 1]).sum(axis=1)
    lost = np.sqrt(rest) + NOISE * math.sqrt(float(squares[0]))
    return {"of": vectors[:, :kept], "sizes": np.sqrt(squares[:kept]), "lost": lost}


@merge_method(UNMERGE)
@dataclass(frozen=True, kw_only=True)
class Unmerge(Linear):
    """One source of a `reversible` merge, out of the tensors of that. Its sources are the directions in their order, and then the
    mean: `ckpt unmerge` names them.

    Args:
        source: its number.
    """

    source: int

    @property
    def needs(self) -> Needs:
        return Needs(weights=False)

    def check(self, context: Context) -> None:
        for one in context.sources:
            if one.state.get("method") != Reversible.name:
                raise InvalidInputError(
                    f"{one.label} was not made by method `{Reversible.name}`", kind="not-reversible"
                )

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        found = context.sources[-1].state["tensors"].get(tensor.name)
        none = [0.0] * (len(context.sources) - 1)  # of a tensor without elements
        return Coefficients(weights=(*(none if found is None else found["of"][self.source]), 1.0))
