"""Reads and writes the pieces of a `LocalState` by address, and keeps whole global tensors as bytes.

Goal: an oracle for ckpt.state that shares no code with it. Method: NumPy views made of raw addresses, bounds checked by
NumPy against `[address, limit)`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ckpt.format.spec import LocalState, StoredObject, TensorSpec
from ckpt.state import LoadTarget, SavedWorld, StoredObjectRow, collect, target

Exported = tuple[list[TensorSpec], list[tuple[str, tuple[slice, ...], Any]], list[StoredObject]]


def piece_views(local: LocalState) -> Iterable[tuple[TensorSpec, tuple[slice, ...], np.ndarray[Any, Any]]]:
    """(spec, slices in the global tensor, bytes of shape [*lengths, itemsize]) of each piece."""
    pieces = local.pieces
    for row in range(len(pieces.boxes)):
        spec = local.specs[int(pieces.boxes.tensor[row])]
        box = pieces.boxes.box(row, len(spec.shape))
        nbytes = int(pieces.limit[row]) - int(pieces.address[row])
        memory = (ctypes.c_uint8 * nbytes).from_address(int(pieces.address[row]))
        strides = tuple(pieces.strides[row, : len(spec.shape)].tolist())
        view = np.ndarray((*box.lengths, spec.itemsize), np.uint8, memory, strides=(*strides, 1))
        yield spec, box.slices(), view


def export(local: LocalState) -> Exported:
    """A copy that can be sent to another process."""
    return local.specs, [(spec.name, slices, view.copy()) for spec, slices, view in piece_views(local)], local.objects


class Memory:
    """A checkpoint as whole tensors in memory. Overlapping pieces must agree."""

    def __init__(self, locals_: Iterable[LocalState]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.bytes: dict[str, np.ndarray[Any, Any]] = {}
        self.covered: dict[str, np.ndarray[Any, Any]] = {}
        self.objects: dict[str, list[StoredObjectRow]] = {}
        for rank, local in enumerate(locals_):
            self.add(rank, local)

    def add(self, rank: int, local: LocalState) -> None:
        self.add_exported(rank, export(local))

    def add_exported(self, rank: int, exported: Exported) -> None:
        specs, pieces, objects = exported
        for spec in specs:
            known = self.specs.setdefault(spec.name, spec)
            assert (known.shape, known.dtype, known.role) == (spec.shape, spec.dtype, spec.role)
            self.bytes.setdefault(spec.name, np.zeros((*spec.shape, spec.itemsize), np.uint8))
            self.covered.setdefault(spec.name, np.zeros(spec.shape, bool))
        for name, slices, view in pieces:
            spec = self.specs[name]
            old, mask = self.bytes[spec.name][slices], self.covered[spec.name][slices]
            assert np.array_equal(old[mask], view[mask]), f"replicas of {spec.name} differ"
            self.bytes[spec.name][slices] = view
            self.covered[spec.name][slices] = True
        for item in objects:
            row = StoredObjectRow(
                rank=rank, kind=item.kind, payload=item.payload, dp_rank=item.dp_rank, dp_size=item.dp_size
            )
            self.objects.setdefault(item.name, []).append(row)

    def check_complete(self) -> None:
        missing = [name for name, mask in self.covered.items() if not mask.all()]
        assert not missing, f"not every element is held by a rank: {missing}"

    def tensor(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        dtype = getattr(torch, spec.dtype)
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=dtype)
        flat = torch.from_numpy(self.bytes[name].reshape(-1).copy())
        return flat.view(dtype).reshape(spec.shape)

    def fill(self, local: LocalState) -> None:
        """Write the pieces of a target. Names are looked up through aliases, as an engine does."""
        names = {alias: spec.name for spec in self.specs.values() for alias in (spec.name, *spec.aliases)}
        for spec, slices, view in piece_views(local):
            stored = next(names[name] for name in (spec.name, *spec.aliases) if name in names)
            assert (self.specs[stored].shape, self.specs[stored].dtype) == (spec.shape, spec.dtype), spec.name
            view[...] = self.bytes[stored][slices]


def save_alone(state: Mapping[str, Any], **options: Any) -> Memory:
    """Collect as the only rank."""
    memory = Memory([collect(state, rank=0, world=1, **options)])
    memory.check_complete()
    return memory


def load_alone(state: Mapping[str, Any], memory: Memory, *, saved_world: int = 1, **options: Any) -> LoadTarget:
    """Load as the only rank."""
    goal = target(state, list(memory.specs.values()), rank=0, world=1, **options)
    assert set(goal.wants_objects) <= set(memory.objects), "an object that is wanted is not stored"
    saved = SavedWorld(world=saved_world, same_layout=saved_world == 1)
    goal.check(memory.objects, saved=saved)
    memory.fill(goal.local)
    goal.restore(memory.objects, saved=saved)
    return goal


def numbered(shape: Iterable[int], dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """A tensor that holds its own element indices, shifted by `start`."""
    shape = tuple(shape)
    size = int(np.prod(shape, dtype=np.int64))
    return torch.arange(start, start + size).reshape(shape).to(dtype)
