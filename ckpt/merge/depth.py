"""How deep in the model a tensor lies: the number of its layer, by its name or along an axis.

In: names and shapes. Out: a number per tensor, or an array along the axis of a tensor that holds all layers. Pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.merge.method import SourceTensor
from ckpt.merge.tile import Tile

# The number after the first part of a name that says that layers follow.
LAYER = r"(?:^|[./])(?:layers?|blocks?|resblocks|h)[./]([0-9]+)(?=[./]|$)"

Curve = Callable[[int, int], float]  # (number of the layer from 0, how many there are) -> factor


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Where layers stand in names.

    Args:
        layer: a regular expression that is searched for in names; its group is the number of the layer. What stands before the
            number is the stack: an encoder and a decoder are counted apart.
        stacked: a regular expression for the names of tensors that hold all layers along an axis.
        axis: that axis.
        num_layers: of every stack; as many as the names show when not given.
    """

    layer: str = LAYER
    stacked: str | None = None
    axis: int = 0
    num_layers: int | None = None

    def __post_init__(self) -> None:
        for name, text in (("layer", self.layer), ("stacked", self.stacked)):
            if text is None:
                continue
            try:
                found = re.compile(text)
            except re.error as error:
                raise InvalidInputError(f"`{name}` is no regular expression: {error}") from None
            if name == "layer" and found.groups < 1:
                raise InvalidInputError("`layer` has no group: put the number of the layer into parentheses")
        if self.num_layers is not None and self.num_layers < 1:
            raise InvalidInputError(f"`num_layers` must be at least 1, found {self.num_layers}")

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a model in which no layer is found: every tensor would be outside of all."""
        if any(self.is_stacked(name) for name in names) or _counts(self.layer, tuple(names)):
            return
        shown = ", ".join(f"`{name}`" for name in list(names)[:5])
        raise InvalidInputError(
            f"no tensor's name says of which layer it is: `layer` is {self.layer!r}, and names are like {shown}",
            kind="no-layers",
            hints=("give `layer`, a regular expression whose group is the number of the layer",),
        )

    def check_axes(self, found: Sequence[SourceTensor]) -> None:
        """Refuse tensors that should hold layers along an axis that they do not have."""
        for one in found:
            dims = len(one.tensor.shape)
            if self.is_stacked(one.tensor.name) and not -dims <= self.axis < dims:
                raise InvalidInputError(
                    f"`{one.tensor.name}` {list(one.tensor.shape)} has no axis {self.axis} to hold layers",
                    kind="no-layers",
                )

    def is_stacked(self, name: str) -> bool:
        return self.stacked is not None and re.search(self.stacked, name) is not None

    def place(self, name: str, names: tuple[str, ...]) -> tuple[int, int] | None:
        """(number of its layer, number of layers); None: it is in none. Not for stacked tensors."""
        found = re.search(self.layer, name)
        if found is None:
            return None
        number = int(found[1])
        count = self.num_layers or _counts(self.layer, names).get(name[: found.start(1)], number + 1)
        return number, max(count, number + 1)

    def factor(self, name: str, names: tuple[str, ...], curve: Curve, outside: float) -> float | None:
        """The factor of a tensor; None: it is stacked."""
        if self.is_stacked(name):
            return None
        place = self.place(name, names)
        return outside if place is None else curve(*place)

    def factors(self, tile: Tile, curve: Curve, outside: float) -> float | NDArray[np.float64]:
        """What the elements of a tile are multiplied by: a number, or an array along the axis of layers."""
        one = self.factor(tile.name, tile.context.names, curve, outside)
        if one is not None:
            return one
        dims = len(tile.shape)
        axis = self.axis % dims
        start, length, count = tile.box.offsets[axis], tile.box.lengths[axis], tile.shape[axis]
        values = np.array([curve(number, count) for number in range(start, start + length)])
        return values.reshape([length if dim == axis else 1 for dim in range(dims)])


@functools.lru_cache(maxsize=64)
def _counts(layer: str, names: tuple[str, ...]) -> dict[str, int]:
    """Layers of each stack."""
    out: dict[str, int] = {}
    for name in names:
        found = re.search(layer, name)
        if found is not None:
            stack = name[: found.start(1)]
            try:
                out[stack] = max(out.get(stack, 0), int(found[1]) + 1)
            except ValueError:
                raise InvalidInputError(
                    f"`layer` finds {found[1]!r} in `{name}`, which is no number", kind="no-layers"
                ) from None
    return out
