"""What a merge method is: its parameters, what it needs, and what it does with the arrays that it is given.

In: nothing. Out: the classes that methods are made of. A method is a frozen dataclass whose fields are its parameters; it is
pure: it sees arrays and records, never a file, and its result may depend on nothing else.

    Linear       one coefficient per source (and for the base), which may differ by tensor; the core does all the rest
    Elementwise  a function of the tile's arrays and of constants that passes of statistics made
    Matrix       the same on whole tensors

A registered method (ckpt.merge.registry) is found by its name in recipes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels

if TYPE_CHECKING:
    from ckpt.merge.tile import Tile

Scope = Literal["tensor", "layer", "model"]
Unit = Literal["element", "row", "matrix"]
Order = Literal["auto", "step", "given"]
Constants = Mapping[str, Any]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method must be given. The planner refuses a recipe that cannot give it, before any I/O."""

    base: bool = False
    slots: tuple[str, ...] = ()  # of the optimizer, read for each source beside the parameter: "exp_avg_sq"
    metric: str | None = None  # of each source's manifest
    passes: int = 0  # over all elements before the last one, which writes
    scope: Scope = "tensor"  # what statistics of a pass are summed over
    unit: Unit = "element"  # what a tile may not cut: nothing, the last dim, the tensor
    num_sources_min: int = 1
    num_sources_max: int | None = None
    ordered: bool = False  # the order of the sources matters


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source, as a method sees it."""

    label: str  # as in messages: URL@STEP, or the folder
    id: str  # its step, and a number where several have it; random numbers belong to it
    step: int | None  # None: of a folder that says none
    metrics: Mapping[str, float]
    weight: float  # as the user gave it; 1.0 otherwise
    place: int  # in the order in which the user named the sources


@dataclass(frozen=True, kw_only=True)
class Context:
    """All sources, in the canonical order in which sums are made: by step, then by digest; an anchor comes last."""

    sources: tuple[SourceInfo, ...]
    base: SourceInfo | None = None
    seed: int = 0

    def in_order(self, order: Order = "auto") -> list[int]:
        """Numbers of the sources, oldest first: by step, or as the user named them.

        `auto` is by step where the steps are all known and different, else as named. InvalidInputError for `step` where they
        are not.
        """
        numbers = range(len(self.sources))
        steps = [one.step for one in self.sources]
        by_step = None not in steps and len(set(steps)) == len(steps)
        if order == "given" or (order == "auto" and not by_step):
            return sorted(numbers, key=lambda i: self.sources[i].place)
        if not by_step:
            raise InvalidInputError(
                "the order of the sources matters and does not follow from their steps, which are not all known and different",
                kind="no-order",
                hints=("say `order: given` to take them as they are named, the oldest first",),
            )
        return sorted(numbers, key=lambda i: self.sources[i].step or 0)

    def metric(self, name: str) -> list[float]:
        """A metric of each source; `step` is the step. InvalidInputError (`no-metric`) that names every source without it."""
        if name == "step":
            found: list[Any] = [one.step for one in self.sources]
        else:
            found = [one.metrics.get(name) for one in self.sources]
        lacking = [
            one.label for one, value in zip(self.sources, found, strict=True) if value is None or math.isnan(value)
        ]
        if lacking:
            known = sorted({key for one in self.sources for key in one.metrics})
            raise InvalidInputError(
                f"metric `{name}` is missing or NaN in {len(lacking)} of {len(self.sources)} sources: {', '.join(lacking[:20])}",
                kind="no-metric",
                hints=(f"metrics there: {', '.join(known) or 'none'}", "save with metrics={...} to record them"),
            )
        return [float(value) for value in found]


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """A weighted sum: one weight per source in canonical order, one for the base, over a divisor."""

    weights: tuple[float, ...]
    base: float = 0.0
    divisor: float = 1.0
    divisor_rest: float = 0.0  # what the divisor lost when it was rounded to 64 bits

    @staticmethod
    def normalized(weights: Sequence[float], base: float = 0.0) -> Coefficients:
        """Weights over their sum. InvalidInputError (`zero-weights`) when that is not positive."""
        total = math.fsum([*weights, base])
        if not total > 0:
            raise InvalidInputError(f"the weights sum to {total:g}: there is nothing to divide by", kind="zero-weights")
        rest = math.fsum([*weights, base, -total])
        return Coefficients(weights=tuple(weights), base=base, divisor=total, divisor_rest=rest)

    @property
    def shares(self) -> tuple[float, ...]:
        """Weight over divisor of each source, for people."""
        return tuple(weight / self.divisor for weight in self.weights)


@dataclass(kw_only=True)
class Summary:
    """What one pass found in some elements: added up, or the greatest taken. Arrays by a name of the method's own."""

    sums: dict[str, NDArray[Any]] = field(default_factory=dict)
    maxima: dict[str, NDArray[Any]] = field(default_factory=dict)

    def fold(self, other: Summary) -> None:
        """Take in the summary of the elements that come next."""
        for mine, theirs, join in ((self.sums, other.sums, np.add), (self.maxima, other.maxima, np.maximum)):
            for name, array in theirs.items():
                mine[name] = join(mine[name], array) if name in mine else array


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Fields of a subclass are its parameters, checked in `__post_init__` or in `check`."""

    name: ClassVar[str] = ""  # set when it is registered

    @property
    def needs(self) -> Needs:
        """What it must be given; may depend on the parameters."""
        return Needs()

    def check(self, context: Context) -> None:
        """Refuse sources that it cannot merge: InvalidInputError."""


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """A weighted sum. A source with weight 0 is not read."""

    def coefficients(self, context: Context, tensor: TensorSpec) -> Coefficients:
        """Of one tensor (most methods do not look at it)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """A function of the elements that stand at one place in all sources, and of constants.

    Passes run before: `observe` is called for every tile, the summaries of a unit (`needs.scope`) are folded in the order of the
    tiles, and `resolve` makes constants of them, which all later passes and `apply` see.
    """

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        """What pass `number` (from 0) finds in one tile."""
        raise NotImplementedError

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        """Constants of a unit after pass `number`; what it gives takes the place of `constants`."""
        raise NotImplementedError

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        """The merged elements, of the tile's shape."""
        raise NotImplementedError

    def write(self, tile: Tile, constants: Constants, target: NDArray[np.uint8], dtype: str) -> bool:
        """Merge into raw elements of `dtype`; whether all are finite. For methods with a native loop of their own."""
        return kernels.narrow(self.apply(tile, constants), dtype, target)


@dataclass(frozen=True, kw_only=True)
class Matrix(Elementwise):
    """An elementwise method on whole tensors: a tile is a tensor. `apply` is also given tensors that are no matrices."""

    @property
    def needs(self) -> Needs:
        return Needs(unit="matrix")

    def memory_bytes(self, shape: Sequence[int], num_sources: int) -> int:
        """About what `apply` takes beside the raw elements of all sources: for the plan."""
        return 8 * math.prod(shape) * (num_sources + 2)
