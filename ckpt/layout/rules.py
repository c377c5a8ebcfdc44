"""Placement rules: what a user says of the tensors that a pattern matches.

In: the fields of a rule. Out: checked `Rule` records, and the placement of one tensor at one coordinate. Pure. Never
decides which rule is for which tensor (that is assign.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ckpt.errors import InvalidInputError
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.placement import Placement, Ranges, chunk_range, place_ranges, shard_parts, shard_ranges

Stage = Literal["first", "last", "all"] | int


@dataclass(frozen=True, kw_only=True)
class ShardStep:
    """Cut `dim` of what is local by then over the ranks along `axis`."""

    axis: str
    dim: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The dim that `axis` cuts is several tensors fused; each is cut on its own, its pieces lie one after the other."""

    axis: str
    sizes: tuple[int, ...] = ()  # elements of each part along the dim; or
    num: int = 0  # that many equal parts

    def __post_init__(self) -> None:
        if (not self.sizes) == (not self.num) or self.num < 0 or any(size < 1 for size in self.sizes):
            raise InvalidInputError(
                f"parts are given as `sizes` or as `num`, each at least 1; found sizes {self.sizes}, num {self.num}"
            )

    def of(self, size: int, subject: str) -> tuple[int, ...]:
        """The part sizes of a dim of `size` elements; InvalidInputError when they do not make it up."""
        if self.num:
            if size % self.num:
                raise InvalidInputError(f"{subject} has {size} elements, which are not {self.num} equal parts")
            return (size // self.num,) * self.num
        if sum(self.sizes) != size:
            raise InvalidInputError(
                f"{subject} has {size} elements, but the parts {list(self.sizes)} have {sum(self.sizes)} together"
            )
        return self.sizes


@dataclass(frozen=True, kw_only=True)
class Pad:
    """The dim that `axis` cuts is padded to a multiple of `multiple` x the size of the axis before it is cut."""

    axis: str
    multiple: int = 1
    size: int | None = None  # elements of the dim without padding, to infer the global shape from local ones

    def __post_init__(self) -> None:
        if self.multiple < 1 or (self.size is not None and self.size < 1):
            raise InvalidInputError(f"padding needs a multiple and a size of at least 1, found {self}")

    def padded(self, size: int, axis_size: int) -> int:
        unit = self.multiple * axis_size
        return -(-size // unit) * unit


@dataclass(frozen=True, kw_only=True)
class Experts:
    """One tensor per expert, number `{expert}` in its name: only the ranks along `axis` that own it have it."""

    axis: str
    num: int  # experts in all, dealt out as torch.chunk does

    def __post_init__(self) -> None:
        if self.num < 1:
            raise InvalidInputError(f"there must be at least 1 expert, found {self.num}")


@dataclass(frozen=True, kw_only=True)
class Flat:
    """All local tensors of the rule, one after the other in one flat buffer, padded, and cut evenly over `axis`."""

    axis: str
    multiple: int = 1  # the buffer is padded to a multiple of this x the size of the axis
    order: tuple[str, ...] = ()  # tensor paths in buffer order; empty: sorted by name
    name: str = "flat"  # of the buffer; rules with the same name share one

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InvalidInputError(f"a flat buffer's multiple must be at least 1, found {self.multiple}")
        if len(set(self.order)) != len(self.order):
            raise InvalidInputError(f"the order of flat buffer `{self.name}` names a tensor twice")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages of layers over `axis`: `split` layers each, or `layers` layers dealt out evenly, earlier stages first."""

    axis: str
    layers: int = 0
    split: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (not self.layers) == (not self.split) or self.layers < 0 or any(num < 0 for num in self.split):
            raise InvalidInputError("a pipeline has either `layers` (their number) or `split` (layers of each stage)")

    @property
    def num_layers(self) -> int:
        return self.layers or sum(self.split)

    def stage_of(self, layer: int, num_stages: int) -> int:
        """The stage that has this layer, of `num_layers`."""
        for stage, num in enumerate(self.sizes(num_stages)):
            layer -= num
            if layer < 0:
                return stage
        raise AssertionError(f"layer beyond the last of {self.num_layers}")

    def sizes(self, num_stages: int) -> tuple[int, ...]:
        """Layers of each stage. Dealt out evenly, they differ by at most one, the larger ones first."""
        if self.split:
            return self.split
        each, more = divmod(self.layers, num_stages)
        return tuple(each + (stage < more) for stage in range(num_stages))


@dataclass(frozen=True, kw_only=True)
class Where:
    """How the tensors of a rule lie. Empty: every rank holds them whole."""

    shard: tuple[ShardStep, ...] = ()  # outermost cut first
    parts: Parts | None = None
    pad: Pad | None = None
    experts: Experts | None = None
    stage: Stage | None = None  # None: by `{layer}` where the pattern has it, else all
    on: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (axis, indices along it): other ranks have nothing
    flat: Flat | None = None
    shape: tuple[int, ...] | None = None  # global; to infer it where the local shape does not say it

    def __post_init__(self) -> None:
        axes = [step.axis for step in self.shard]
        for axis in axes:
            if axes.count(axis) > 1:
                raise InvalidInputError(f"axis `{axis}` cuts the same tensor twice")
        for step in self.shard:
            if step.dim < 0:
                raise InvalidInputError(f"a dim is counted from 0, found {step.dim} for axis `{step.axis}`")
        for label, special in (("parts", self.parts), ("pad", self.pad)):
            if special is not None:
                self._check_first(label, special.axis)
        if self.parts and self.pad and self._dim_of(self.parts.axis) == self._dim_of(self.pad.axis):
            raise InvalidInputError("one dim cannot have both `parts` and `pad`")
        if self.flat and self.flat.axis in [*axes, *dict(self.on)]:
            raise InvalidInputError(f"axis `{self.flat.axis}` both places the tensor and cuts its flat buffer")

    def _dim_of(self, axis: str) -> int | None:
        return next((step.dim for step in self.shard if step.axis == axis), None)

    def _check_first(self, label: str, axis: str) -> None:
        dim = self._dim_of(axis)
        if dim is None:
            raise InvalidInputError(f"`{label}` is for axis `{axis}`, which is not in `shard`")
        first = next(step.axis for step in self.shard if step.dim == dim)
        if first != axis:
            raise InvalidInputError(f"`{label}` is for axis `{axis}`, but axis `{first}` cuts dim {dim} before it")

    @cached_property
    def axes(self) -> frozenset[str]:
        """All mesh axes that the placement names."""
        one = (self.parts, self.pad, self.experts, self.flat)
        return frozenset(
            [step.axis for step in self.shard] + [axis for axis, _ in self.on] + [item.axis for item in one if item]
        )

    def place(self, shape: tuple[int, ...], mesh: Mesh, index_of: Mapping[str, int], name: str) -> Placement:
        """What the rank with these axis indices holds, before any flat buffer. A 0-d tensor is always whole."""
        if not shape:
            return place_ranges((), ())
        self.check_dims(shape, name)
        dims: list[Ranges] = [((0, size),) if size else () for size in shape]
        for step in self.shard:
            num, index = mesh.size(step.axis), index_of[step.axis]
            size = shape[step.dim]
            if self.parts is not None and self.parts.axis == step.axis:
                sizes = self.parts.of(size, f"dim {step.dim} of `{name}`")
                dims[step.dim] = shard_parts(sizes, num, index)
            elif self.pad is not None and self.pad.axis == step.axis:
                padded = self.pad.padded(size, num)
                dims[step.dim] = shard_ranges(((0, padded),) if padded else (), num, index)
            else:
                dims[step.dim] = shard_ranges(dims[step.dim], num, index)
        return place_ranges(dims, shape)

    def check_dims(self, shape: tuple[int, ...], name: str) -> None:
        """Raise InvalidInputError when the rule cuts a dim that the tensor does not have."""
        if not shape:
            return
        for step in self.shard:
            if step.dim >= len(shape):
                raise InvalidInputError(
                    f"the rule for `{name}` cuts dim {step.dim} over axis `{step.axis}`, but its shape is {list(shape)}"
                )
        if self.shape is not None and self.shape != shape:
            raise InvalidInputError(f"the rule for `{name}` says shape {list(self.shape)}, but it is {list(shape)}")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which tensors lie how."""

    match: tuple[NamePattern, ...]
    where: Where = dataclasses.field(default_factory=Where)
    optimizer: Where | Literal["same", "none"] = "same"  # how their optimizer state lies; "none": not by this rule
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.match:
            raise InvalidInputError("a rule needs at least one name pattern")
        wheres = [self.where] if isinstance(self.optimizer, str) else [self.where, self.optimizer]
        if any(where.experts for where in wheres):
            for pattern in self.match:
                if "expert" not in pattern.captures:
                    raise InvalidInputError(f"pattern `{pattern.text}` has no `{{expert}}`, but its rule has `experts`")

    def where_of(self, slot: str | None, pattern: NamePattern) -> Where | None:
        """How the tensor itself (slot None) or its optimizer state lies; None when the rule is not for it."""
        if slot is None or pattern.whole_name or self.optimizer == "same":
            return self.where
        return None if self.optimizer == "none" else self.optimizer


def owner_of_expert(expert: int, num: int, ranks: int) -> int:
    """Index along the expert axis of the rank that owns expert `expert`."""
    return next(
        index for index in range(ranks) for start, stop in (chunk_range(num, ranks, index),) if start <= expert < stop
    )
