"""What a stage of the task-vector pipeline is, and how a recipe says one: `{sparsify: top_k, keep: 0.2}`.

In: nodes of a recipe. Out: stages. A stage is a frozen dataclass whose fields are its parameters. It changes a `Work`: the
changes of all sources in one tile, from which some stage makes one. Pure; sees arrays alone.

    sparsify   which elements of each source's change take part
    rescale    what makes up for those that do not
    consensus  which of them agree with the other sources
    combine    all sources to one change: every pipeline has exactly one such stage
    scale      of the merged change, by name or by depth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements, TiesMode, TiesRule
from ckpt.merge.method import Constants, Context, Float64Array, Scope, SourceTensor, Summary, Unit
from ckpt.merge.nodes import Node, nearest
from ckpt.merge.parameters import instance
from ckpt.merge.tile import Tile

FAMILIES = ("sparsify", "rescale", "consensus", "combine", "scale")
BEFORE = ("sparsify", "rescale", "consensus")  # that may stand before `combine`
AFTER = ("consensus", "scale")  # and behind it

Mask = NDArray[np.bool_]
_Subject = TypeVar("_Subject", bound=type["Stage"])

_kinds: dict[tuple[str, str], type[Stage]] = {}


def stage(family: str, kind: str) -> Callable[[_Subject], _Subject]:
    """Register a class of stages under what a recipe calls it."""

    def register(cls: _Subject) -> _Subject:
        cls.family, cls.kind = family, kind
        assert _kinds.setdefault((family, kind), cls) is cls, f"two stages {family}: {kind}"
        return cls

    return register


def known_stages() -> dict[tuple[str, str], type[Stage]]:
    """All classes of stages, by family and kind."""
    import ckpt.merge.stages  # noqa: F401  (registers them)

    return dict(_kinds)


class Work:
    """One tile on its way through a pipeline."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.kept: list[Mask | None] = [None] * len(tile)  # which elements of a source take part; None: all
        self.share: list[float | Float64Array] = [1.0] * len(tile)  # of them that was meant to
        self.merged: Float64Array | None = None
        self._values: list[Float64Array] | None = None
        self._zero_sign: int | None = None  # of an election that is still to be held

    def __len__(self) -> int:
        return len(self.tile)

    @property
    def values(self) -> list[Float64Array]:
        """The change of each source as it is now (the elements themselves without a base); zero where they take no part."""
        if self._values is None:
            self._values = self.tile.arrays if self.tile.base_elements is None else self.tile.deltas
        if self._zero_sign is not None:
            zero_sign, self._zero_sign = self._zero_sign, None
            self.keep_sign(summed(self.weighted()), zero_sign)
        return self._values

    def elect(self, zero_sign: int) -> None:
        """Only what has the sign of the weighted sum of all sources takes part from here on.

        The election is held when values are asked for, or, together with what comes of it, by `agreed`.

        Args:
            zero_sign: the sign where the sum is zero: 1, -1, or 0: nothing takes part.
        """
        if self._values is None or self._zero_sign is not None:
            _ = self.values
        self._zero_sign = zero_sign

    def agreed(self, mode: TiesMode) -> Float64Array | None:
        """What comes of an election that is still to be held, by a native loop; None: there is none."""
        zero_sign, self._zero_sign = self._zero_sign, None
        if zero_sign is None:
            return None
        out = np.empty(self.tile.box.lengths)
        rule = self.vote(zero_sign, mode)
        kernels.ties(self.voters(), rule, out.reshape(-1).view(np.uint8), "float64", threads=self.tile.threads)
        return out

    def vote(self, zero_sign: int = 0, mode: TiesMode = TiesMode.mean) -> TiesRule:
        """For `voters`: all changes count, whatever their magnitude."""
        threshold = np.zeros(len(self), np.uint32)
        return TiesRule(threshold=threshold, weight=np.array(self.weights), scale=1.0, mode=mode, zero_sign=zero_sign)

    def voters(self) -> kernels.Tile:
        """The values over a base of zeros, as the loops of TIES take them."""
        arrays = of_arrays(self.values)
        zeros = np.zeros(self.tile.box.volume).view(np.uint8)
        return kernels.Tile(sources=arrays.sources, base=Elements(data=zeros, dtype="float64"))

    def keep_sign(self, votes: Float64Array, zero_sign: int) -> None:
        """Only what has the sign of its vote takes part from here on."""
        signs = np.where(votes == 0.0, zero_sign, votes)
        for source, values in enumerate(self.weighted()):
            self.keep(source, ((values > 0) & (signs > 0)) | ((values < 0) & (signs < 0)))

    @property
    def weights(self) -> list[float]:
        return [source.weight for source in self.tile.sources]

    def keep(self, source: int, mask: Mask) -> None:
        """Only these elements take part from here on."""
        values = self.values
        before = self.kept[source]
        self.kept[source] = mask if before is None else mask & before
        values[source] = np.where(mask, values[source], 0.0)

    def raw(self) -> kernels.Tile:
        """The values as native loops take them."""
        if self._values is None and self._zero_sign is None:
            return self.tile.raw(less_base=self.tile.base_elements is not None)
        return of_arrays(self.values)

    def weighted(self) -> list[Float64Array]:
        """Values times the weights of their sources."""
        return [weight * values for weight, values in zip(self.weights, self.values, strict=True)]


def of_arrays(arrays: Sequence[Float64Array]) -> kernels.Tile:
    """fp64 arrays as native loops take them."""
    flat = [np.ascontiguousarray(one, np.float64).reshape(-1).view(np.uint8) for one in arrays]
    return kernels.Tile(sources=[Elements(data=one, dtype="float64") for one in flat])


def summed(arrays: Sequence[Float64Array]) -> Float64Array:
    """Their sum, in their order, the first one not added to zero."""
    out = arrays[0]
    for one in arrays[1:]:
        out = out + one
    return out


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages."""

    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    needs_base: ClassVar[bool] = True
    unit: ClassVar[Unit] = "element"
    hyperparameters: ClassVar[bool] = False  # of the sources' optimizers

    @property
    def passes(self) -> int:
        """Of statistics, before it can be applied."""
        return 0

    @property
    def statistics_of(self) -> Scope:
        """What these are summed over."""
        return getattr(self, "scope", "tensor")

    @property
    def slots(self) -> tuple[str, ...]:
        """Of the sources' optimizers that it looks at."""
        return ()

    @property
    def title(self) -> str:
        return f"stage `{self.family}: {self.kind}`"

    def check(self, context: Context) -> None:
        """Refuse sources that it cannot work on: InvalidInputError."""

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        """Refuse tensors that it cannot work on: InvalidInputError."""

    def on_shares(self, shares: Sequence[float], context: Context, tensor: TensorSpec) -> list[float] | None:
        """What becomes of a weighted sum of the changes, by its weights; None: something else than a weighted sum."""
        return None

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        """What pass `number` finds in the work as it comes to this stage."""
        raise NotImplementedError

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        """Constants after pass `number`; they take the place of `constants`."""
        raise NotImplementedError

    def apply(self, work: Work, constants: Constants) -> None:
        """Do it."""
        raise NotImplementedError

    def plain(self) -> dict[str, Any]:
        """As a recipe has it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            self.family: self.kind,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None},
        }

    @classmethod
    def from_node(cls, node: Node) -> Stage:
        """The stage that a node of a recipe says."""
        entries = {key: value for key, value in node.entries("a stage").items() if value.value is not None}
        said = [family for family in FAMILIES if family in entries]
        if len(said) != 1:
            raise node.fail(
                f"a stage is said by one of {', '.join(FAMILIES)}, found {', '.join(said) or ', '.join(entries) or 'none'}",
                "for example {sparsify: top_k, keep: 0.2}",
            )
        family = said[0]
        named = entries.pop(family)
        if family == "scale" and isinstance(named.value, (int, float)) and not isinstance(named.value, bool):
            kind, entries = (
                "constant",
                {"by": named, **entries},
            )  # `scale: 0.5` is short for `{scale: constant, by: 0.5}`
        else:
            kind = _kind_of(family, named)
        return instance(known_stages()[family, kind], f"stage `{family}: {kind}`", entries, node)


def _kind_of(family: str, node: Node) -> str:
    """The kind of a stage; one that there is."""
    kinds = [kind for of, kind in known_stages() if of == family]
    kind = node.text(f"`{family}`")
    if kind not in kinds:
        raise node.fail(f"unknown stage `{family}: {kind}`", nearest(kind, kinds))
    return kind
