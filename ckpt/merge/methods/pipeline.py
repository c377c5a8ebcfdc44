"""The task-vector pipeline: stages, one after the other, over the changes of all sources to the base.

In: tiles. Out: merged elements. What every stage does is in ckpt/merge/stages/; here they are put in order, their passes of
statistics counted through, and tiles cut so that the arrays of all sources stay in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.merge.method import (
    Coefficients,
    Constants,
    Context,
    Elementwise,
    Float64Array,
    Needs,
    SourceTensor,
    Summary,
)
from ckpt.merge.registry import merge_method
from ckpt.merge.stages.stage import AFTER, BEFORE, FAMILIES, Stage, Work
from ckpt.merge.tile import Tile
from ckpt.merge.tiles import cut

BLOCK_ELEMENTS = 1 << 15  # of one source at a time: some arrays of fp64 in the second-level cache


@dataclass(frozen=True, kw_only=True)
class Staged(Elementwise):
    """A method that is a list of stages. Subclasses say which.

    Args:
        then: stages that come after its own.
    """

    then: tuple[Stage, ...] = ()

    def own_stages(self) -> tuple[Stage, ...]:
        """Without `then`."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        check_order(self.all_stages)

    @cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        return (*self.own_stages(), *self.then)

    @cached_property
    def _passes(self) -> tuple[tuple[int, int], ...]:
        """(number of the stage, number of its pass) of each pass."""
        return tuple((i, number) for i, one in enumerate(self.all_stages) for number in range(one.passes))

    @cached_property
    def _needs(self) -> Needs:
        stages = self.all_stages
        return Needs(
            base=any(one.needs_base for one in stages),
            slots=tuple(dict.fromkeys(slot for one in stages for slot in one.slots)),
            hyperparameters=any(one.hyperparameters and "step" in one.slots for one in stages),
            passes=len(self._passes),
            scopes=tuple(stages[i].statistics_of for i, _ in self._passes),
            unit="row" if any(one.unit == "row" for one in stages) else "element",
        )

    @property
    def needs(self) -> Needs:
        return self._needs

    def check(self, context: Context) -> None:
        for one in self.all_stages:
            one.check(context)

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        for one in self.all_stages:
            one.check_tensors(context, found)

    def as_sum(self, context: Context, tensor: TensorSpec) -> Coefficients | None:
        shares: list[float] | None = [1.0] * len(context.sources)
        for one in self.all_stages:
            shares = None if shares is None else one.on_shares(shares, context, tensor)
        if shares is None:
            return None
        if context.base is None:
            return Coefficients(weights=tuple(shares))
        return Coefficients(weights=tuple(shares), base=rest_of(shares))

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        last, of_stage = self._passes[number]
        out = Summary()
        for part in self._blocks(tile):
            work = self._worked(part.as_row(), last, constants)
            out.fold(self.all_stages[last].observe(work, of_stage, constants.get(_key(last), {})))
        return out

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        i, of_stage = self._passes[number]
        found = self.all_stages[i].resolve(of_stage, summary, constants.get(_key(i), {}), context)
        return {**constants, _key(i): found}

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        work = self._worked(tile.as_row(), len(self.all_stages), constants)
        assert work.merged is not None
        merged = work.merged.reshape(tile.box.lengths)
        if tile.base_elements is None:
            return merged
        base = tile.base
        return np.where(merged == 0.0, base, base + merged)  # -0 of the base stays where nothing is added

    def write(self, tile: Tile, constants: Constants, target: NDArray[np.uint8], dtype: str) -> bool:
        finite, start = True, 0
        for part in self._blocks(tile):
            stop = start + part.box.volume * (len(target) // tile.box.volume)
            finite &= kernels.narrow(self.apply(part, constants), dtype, target[start:stop])
            start = stop
        return finite

    def _worked(self, tile: Tile, stop: int, constants: Constants) -> Work:
        """What the stages before number `stop` make of a tile."""
        work = Work(tile)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            for i, one in enumerate(self.all_stages[:stop]):
                one.apply(work, constants.get(_key(i), {}))
        return work

    def _blocks(self, tile: Tile) -> Iterator[Tile]:
        if tile.box.volume <= BLOCK_ELEMENTS:
            yield tile
            return
        for box in cut(tile.box.lengths, BLOCK_ELEMENTS, whole_rows=self.needs.unit == "row"):
            yield tile.part(box)


def rest_of(shares: Sequence[float]) -> float:
    """What is left of 1: the share of the base in base + sum of shares * (source - base)."""
    from math import fsum

    return fsum([1.0, *(-share for share in shares)])


def _key(number: int) -> str:
    """Of a stage, in the constants."""
    return f"stage {number}"


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse stages in an order that means nothing."""
    combining = [i for i, one in enumerate(stages) if one.family == "combine"]
    if len(combining) != 1:
        raise InvalidInputError(
            f"a pipeline has one stage `combine`, found {len(combining)}",
            hints=("for example {combine: sum}: what the changes of all sources become",),
        )
    for i, one in enumerate(stages):
        allowed = BEFORE if i < combining[0] else AFTER
        if i != combining[0] and one.family not in allowed:
            where = "before" if i > combining[0] else "after"
            raise InvalidInputError(
                f"{one.title} stands {'after' if i > combining[0] else 'before'} `combine`, and belongs {where} it",
                hints=(f"the order is {', '.join(FAMILIES)}",),
            )
        if i > combining[0] and one.family == "consensus" and one.kind != "tall":
            raise InvalidInputError(f"{one.title} compares the sources: it belongs before `combine`")


StageList = Callable[[], tuple[Stage, ...]]


@merge_method("pipeline")
@dataclass(frozen=True, kw_only=True)
class Pipeline(Staged):
    """The base plus what the stages make of the changes of all sources.

    Args:
        stages: in their order, as docs/reference/merge-stages.md has them.
    """

    stages: tuple[Stage, ...]

    def own_stages(self) -> tuple[Stage, ...]:
        return self.stages
