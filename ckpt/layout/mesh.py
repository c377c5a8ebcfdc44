"""Meshes: ranks as points of a grid of named axes.

In: axis names and sizes. Out: `Mesh`, ranks, coordinates. Pure. Never knows which process or device a rank is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.layout.box import Int64Array

AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RANKS_MAX = 2**20  # a mesh beyond this is a typing error


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ordered named axes. Ranks are numbered in row-major order: the last axis varies fastest.

    No axes at all is the mesh of a single process.
    """

    axes: tuple[tuple[str, int], ...] = ()  # (name, number of ranks along it)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if not AXIS_NAME.fullmatch(name):
                raise InvalidInputError(f"mesh axis name must be letters, digits and `_`, found {name!r}")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InvalidInputError(f"mesh axis `{name}` must have a size of at least 1, found {size!r}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInputError(f"mesh axes must have different names, found twice: {', '.join(twice)}")
        if self.world_size > RANKS_MAX:
            raise InvalidInputError(f"a mesh has at most {RANKS_MAX:,} ranks, found {self.world_size:,}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.axes)

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(size for _, size in self.axes)

    def check_world_size(self, world_size: int) -> None:
        """Raise InvalidInputError unless the mesh has exactly this many ranks."""
        if self.world_size != world_size:
            product = " x ".join(f"{name} {size}" for name, size in self.axes) or "no axes"
            raise InvalidInputError(
                f"the mesh ({product}) has {self.world_size} ranks, but the job has {world_size}",
                hints=("the sizes of the mesh axes must multiply to the number of ranks",),
            )

    def index(self, axis: str) -> int:
        """Position of the axis in the mesh; InvalidInputError for a name that it does not have."""
        if axis not in self.names:
            raise InvalidInputError(f"the mesh has no axis `{axis}`; it has {', '.join(self.names) or 'none'}")
        return self.names.index(axis)

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return self.shape[self.index(axis)]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands, one index per axis."""
        if not 0 <= rank < self.world_size:
            raise InvalidInputError(f"rank {rank} is outside the mesh, which has ranks 0 to {self.world_size - 1}")
        out: list[int] = []
        for size in reversed(self.shape):
            rank, index = divmod(rank, size)
            out.append(index)
        return tuple(reversed(out))

    def rank(self, coordinate: tuple[int, ...] | Mapping[str, int]) -> int:
        """The rank at a coordinate: one index per axis, or by axis name (axes left out are 0)."""
        if isinstance(coordinate, Mapping):
            for axis in coordinate:
                self.index(axis)
            coordinate = tuple(coordinate.get(name, 0) for name in self.names)
        if len(coordinate) != len(self.shape) or not all(
            0 <= i < n for i, n in zip(coordinate, self.shape, strict=True)
        ):
            raise InvalidInputError(f"coordinate {coordinate} is outside a mesh of shape {self.shape}")
        out = 0
        for index, size in zip(coordinate, self.shape, strict=True):
            out = out * size + index
        return out

    def coordinates(self) -> Int64Array:
        """[world_size, number of axes] the coordinate of every rank."""
        ranks = np.arange(self.world_size, dtype=np.int64)
        columns = np.unravel_index(ranks, self.shape) if self.shape else ()
        out = np.zeros((self.world_size, len(self.shape)), np.int64)
        for i, column in enumerate(columns):
            out[:, i] = column
        return out

    def resized(self, sizes: Mapping[str, int]) -> Mesh:
        """The same axes with some sizes changed."""
        for axis in sizes:
            self.index(axis)
        return Mesh(axes=tuple((name, sizes.get(name, size)) for name, size in self.axes))
