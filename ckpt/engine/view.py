"""Stored tensors as lazy arrays: a slice reads just the bytes it needs.

In: a stored checkpoint and an index expression. Out: torch tensors. Needs no process group and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from ckpt.engine.reader import StoredCheckpoint, ids_of
from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.format.manifest import Manifest
from ckpt.format.objects import decode
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable
from ckpt.state.dtypes import torch_dtype

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorView:
    """One stored tensor. `view[index]` reads and verifies what the index covers; `view[...]` reads all."""

    def __init__(self, stored: StoredCheckpoint, tensor_id: int) -> None:
        self._stored, self._id = stored, tensor_id
        self.spec: TensorSpec = stored.specs[tensor_id]

    @property
    def shape(self) -> torch.Size:
        """Global shape, elements."""
        return torch.Size(self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.spec.dtype)

    def __len__(self) -> int:
        return self.spec.shape[0]

    def __repr__(self) -> str:
        return f"TensorView(`{self.spec.name}`, {self.spec.dtype}, {list(self.spec.shape)}, step {self._stored.step})"

    def __getitem__(self, index: Index) -> torch.Tensor:
        starts, lengths, local = _resolve(index, self.spec)
        self._stored.check_room(math.prod(lengths) * self.spec.itemsize)
        out = torch.empty(lengths, dtype=self.dtype)
        if out.numel():
            self._stored.read_pieces(_piece(self._id, starts, out))
        return out[local]


def _piece(tensor_id: int, starts: list[int], memory: torch.Tensor) -> PieceTable:
    num_dims = max(len(starts), 1)
    offsets, lengths = np.zeros((1, num_dims), np.int64), np.ones((1, num_dims), np.int64)
    strides = np.zeros((1, num_dims), np.int64)
    offsets[0, : len(starts)] = starts
    lengths[0, : len(starts)] = memory.shape
    strides[0, : len(starts)] = memory.stride()
    address = memory.data_ptr()
    return PieceTable(
        boxes=BoxTable(tensor=np.array([tensor_id], np.int32), offsets=offsets, lengths=lengths),
        address=np.array([address], np.uint64),
        limit=np.array([address + memory.numel() * memory.element_size()], np.uint64),
        strides=strides * memory.element_size(),
    )


def _resolve(index: Index, spec: TensorSpec) -> tuple[list[int], list[int], tuple[Any, ...]]:
    """(starts, lengths) of the box to read, and the index of the answer in that box."""
    parts = list(index) if isinstance(index, tuple) else [index]
    num_dims = len(spec.shape)
    if sum(part is Ellipsis for part in parts) > 1 or len([p for p in parts if p is not Ellipsis]) > num_dims:
        raise InvalidInputError(f"too many indices for `{spec.name}` of shape {list(spec.shape)}: {index}")
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    fill = [slice(None)] * (num_dims - len([p for p in parts if p is not Ellipsis]))
    parts = [*parts[:at], *fill, *parts[at + 1 :]]
    starts: list[int] = []
    lengths: list[int] = []
    local: list[int | slice] = []
    for part, length in zip(parts, spec.shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(length)
            if step < 0:
                raise InvalidInputError(f"`{spec.name}`: a slice with a negative step cannot be read: {part}")
            starts.append(min(start, length))
            lengths.append(max(0, stop - start))
            local.append(slice(None, None, step))
        elif isinstance(part, int) and -length <= part < length:
            starts.append(part % length)
            lengths.append(1)
            local.append(0)
        else:
            raise InvalidInputError(f"index {part!r} is outside `{spec.name}` of shape {list(spec.shape)}")
    return starts, lengths, tuple(local)


class Checkpoint(Mapping[str, TensorView]):
    """One stored checkpoint, opened for reading: a mapping from tensor names to lazy tensors. See `ckpt.open`."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        self._stored = stored
        self._ids = ids_of(stored.specs)

    @property
    def step(self) -> int:
        return self._stored.step

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint says of itself: times, sizes, metadata, metrics."""
        return self._stored.manifest

    @property
    def metrics(self) -> dict[str, float]:
        return self._stored.manifest.metrics

    def __getitem__(self, name: str) -> TensorView:
        if name not in self._ids:
            near = [known for known in self._ids if name.split("/")[-1] in known][:5]
            raise NotFoundError(
                f"no tensor `{name}` in step {self.step} of {self._stored.store.url}",
                kind="no-tensor",
                hints=(f"similar: {', '.join(near)}",) if near else (),
            )
        return TensorView(self._stored, self._ids[name])

    def __iter__(self) -> Iterator[str]:
        return iter(spec.name for spec in self._stored.specs)

    def __len__(self) -> int:
        return len(self._stored.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def read_object(self, name: str, *, rank: int = 0) -> Any:
        """The non-tensor state of `name` ("scheduler", ...) that rank `rank` saved, as a plain tree."""
        for row in self._stored.objects:
            if row.name == name and row.rank == rank:
                return decode(self._stored.read_object(row), name=name)
        raise NotFoundError(f"no object `{name}` of rank {rank} in step {self.step}", kind="no-object")

    def objects(self) -> list[tuple[str, int]]:
        """(name, rank) of all objects."""
        return [(row.name, row.rank) for row in self._stored.objects]

    def close(self) -> None:
        """Let go of the store."""
        self._stored.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
