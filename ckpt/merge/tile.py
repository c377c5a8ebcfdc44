"""A tile: the same elements of every source, as a method sees them.

In: raw elements. Out: arrays. Arrays are made when they are asked for, as fp64 and exactly; `raw` has the elements as they were
stored, for native loops. Never reads a file; one thread at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements
from ckpt.layout.box import Box
from ckpt.merge.method import Context, SourceInfo
from ckpt.merge.tiles import first_element

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """An optimizer slot of one source, or a part of it."""

    elements: Elements
    shape: tuple[int, ...]
    whole: bool  # all of a slot that has another shape than its parameter: a factor, a counter


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A run of elements of one tensor in all sources that have a share in it."""

    name: str  # of the tensor, without prefix of a source
    shape: tuple[int, ...]  # of the tensor
    box: Box  # of the tile, in the tensor
    context: Context  # of all sources
    numbers: tuple[int, ...]  # which of the context's sources these are
    elements: tuple[Elements, ...]  # of each
    base_elements: Elements | None = None
    slots: Mapping[str, tuple[Slot | None, ...]] = field(default_factory=dict)  # None: a source without it
    hyperparameters: tuple[Mapping[str, float], ...] = ()  # of the optimizer of each source, of this parameter
    output: int = 0  # which of the tensors that the method makes of this one (`Method.num_outputs`)
    threads: int = 1  # that a native loop may use

    def __len__(self) -> int:
        """Sources."""
        return len(self.elements)

    @property
    def first(self) -> int:
        """Row-major number of the first element."""
        return first_element(self.shape, self.box.offsets)

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        return tuple(self.context.sources[number] for number in self.numbers)

    @property
    def weights(self) -> Float64Array:
        """[S] as the user gave them."""
        return np.array([source.weight for source in self.sources])

    def array(self, source: int) -> Float64Array:
        """Elements of a source, of the tile's shape."""
        return kernels.widen(self.elements[source], threads=self.threads).reshape(self.box.lengths)

    def delta(self, source: int) -> Float64Array:
        """Elements of a source less those of the base."""
        assert self.base_elements is not None
        values = kernels.widen(self.elements[source], base=self.base_elements, threads=self.threads)
        return values.reshape(self.box.lengths)

    @property
    def arrays(self) -> list[Float64Array]:
        return [self.array(source) for source in range(len(self))]

    @property
    def deltas(self) -> list[Float64Array]:
        return [self.delta(source) for source in range(len(self))]

    @property
    def base(self) -> Float64Array:
        """Elements of the base."""
        assert self.base_elements is not None
        return kernels.widen(self.base_elements, threads=self.threads).reshape(self.box.lengths)

    def slot(self, name: str, source: int) -> Float64Array | None:
        """An optimizer slot of a source: of the tile where it has the parameter's shape, else all of it (a factor, a counter).

        None: this source has none.
        """
        found = self.slots[name][source]
        return None if found is None else kernels.widen(found.elements).reshape(found.shape)

    def slot_is_whole(self, name: str, source: int) -> bool:
        """Whether `slot` gives all of a slot, whatever part of the tensor this is."""
        found = self.slots[name][source]
        return found is not None and found.whole

    def raw(self, *, less_base: bool = False) -> kernels.Tile:
        """For the native loops of ckpt.kernels.merge."""
        return kernels.Tile(sources=self.elements, base=self.base_elements if less_base else None)

    def uniform(self, source: int) -> Float64Array:
        """Random numbers in [0, 1), one per element: of this source, this tensor and the recipe's seed, however it is cut."""
        text = f"{self.context.seed}\0{self.sources[source].id}\0{self.name}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return kernels.uniform(key, self.first, self.box.volume).reshape(self.box.lengths)

    def as_row(self) -> Tile:
        """A tile of a scalar as one of a row: NumPy makes numbers, not arrays, of 0-d arrays. Any other as it is."""
        if self.shape:
            return self
        slots = {
            name: tuple(one if one is None or one.whole else dataclasses.replace(one, shape=(1,)) for one in found)
            for name, found in self.slots.items()
        }
        return dataclasses.replace(self, shape=(1,), box=Box(offsets=(0,), lengths=(1,)), slots=slots)

    def part(self, box: Box) -> Tile:
        """The elements of a run inside this tile; `box` counts from its first corner. Whole slots stay whole."""
        start = first_element(self.box.lengths, box.offsets)
        stop = start + box.volume

        def some(one: Elements) -> Elements:
            size = one.kind.itemsize
            return Elements(data=one.data[start * size : stop * size], dtype=one.dtype)

        def some_slot(one: Slot | None) -> Slot | None:
            if one is None or one.whole:
                return one
            return Slot(elements=some(one.elements), shape=box.lengths, whole=False)

        offsets = tuple(a + b for a, b in zip(self.box.offsets, box.offsets, strict=True))
        return Tile(
            name=self.name,
            shape=self.shape,
            box=Box(offsets=offsets, lengths=box.lengths),
            context=self.context,
            numbers=self.numbers,
            elements=tuple(some(one) for one in self.elements),
            base_elements=None if self.base_elements is None else some(self.base_elements),
            slots={name: tuple(map(some_slot, found)) for name, found in self.slots.items()},
            hyperparameters=self.hyperparameters,
            output=self.output,
            threads=self.threads,
        )
