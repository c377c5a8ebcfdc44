"""One torch tensor to a part: its global tensor, its boxes, and the memory that they lie in.

In: tensors, DTensors, annotations. Out: `Located`, `Part`. Never copies data and never changes a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.layout import placement as where
from ckpt.layout.box import Box, whole
from ckpt.layout.placement import Placed
from ckpt.state.dtypes import dtype_name


@dataclass(frozen=True, kw_only=True)
class MeshPlacement:
    """What a DTensor says of its mesh."""

    axes: tuple[str, ...]  # "" where the mesh dim has no name
    mesh_shape: tuple[int, ...]
    placements: tuple[where.DimPlacement, ...]


class Located(NamedTuple):
    """A local tensor and what it holds of a global one. A tuple, as there is one per tensor and walk."""

    shape: tuple[int, ...]  # global, elements
    placed: tuple[Placed, ...]  # boxes and where they start in `memory`; none: this rank holds no element
    memory: torch.Tensor  # plain, strided, detached; of fewer dims than the boxes when it is flat
    on: MeshPlacement | None = None  # of a DTensor
    is_checked: bool = False  # the boxes were made from `shape` and the shape of `memory`: they cannot lie outside

    @property
    def is_whole(self) -> bool:
        """True when this rank holds all of the tensor, in its own shape."""
        return len(self.placed) == 1 and self.placed[0].box.lengths == self.shape == tuple(self.memory.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor, elements."""
        return tuple(self.memory.shape)


class Part(NamedTuple):
    """A named tensor of the state as this rank holds it. A tuple, as there is one per tensor and walk."""

    spec: TensorSpec
    located: Located
    source: str  # the user's object that it comes from, for messages


@dataclass(frozen=True, kw_only=True)
class _Annotation:
    shape: tuple[int, ...]
    placed: tuple[Placed, ...]
    local_shape: tuple[int, ...]


_annotations: WeakIdKeyDictionary = WeakIdKeyDictionary()
_PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter})  # exactly these: a subclass may keep its data elsewhere


def annotate(tensor: torch.Tensor, *, shape: Sequence[int], boxes: Sequence[tuple[Box, Sequence[int]]]) -> torch.Tensor:
    """Say what a plain local tensor holds of a global one; the way out for layouts that ckpt does not know.

    Args:
        tensor: a plain tensor or parameter. The note stays with this object; optimizer slots of its shape inherit it.
        shape: global shape, elements.
        boxes: every box that the tensor holds, with the index in `tensor` at which it starts: one number per dim, or a
            single one where `tensor` is a flat buffer that holds the box row-major.

    Returns:
        `tensor` itself. Called on the rank that holds it; communicates with nobody. Errors: InvalidInputError for a box
        that lies outside the global shape or outside the tensor.
    """
    if isinstance(tensor, DTensor):
        raise InvalidInputError("a DTensor knows its placement and cannot be annotated")
    placed = tuple(Placed(box=box, local_offsets=tuple(offsets)) for box, offsets in boxes)
    note = _Annotation(shape=tuple(shape), placed=placed, local_shape=tuple(tensor.shape))
    _check_inside("annotation", Located(shape=note.shape, placed=placed, memory=tensor.detach()))
    _annotations[tensor] = note
    return tensor


def annotated(name: str, tensor: torch.Tensor) -> Located | None:
    """What `annotate` said of this tensor object, or None."""
    if not _annotations.data:
        return None
    note: _Annotation | None = _annotations.get(tensor)  # type: ignore[no-untyped-call]
    if note is None:
        return None
    if tuple(tensor.shape) != note.local_shape:
        raise InvalidInputError(
            f"tensor `{name}` was annotated with local shape {note.local_shape}, found {tuple(tensor.shape)}"
        )
    return Located(shape=note.shape, placed=note.placed, memory=plain_memory(name, tensor))


def notes_of(tensors: Sequence[torch.Tensor]) -> list[tuple[int, object]]:
    """Position and note of the tensors that were annotated, as plain values that can be compared and kept."""
    if not _annotations.data:
        return []
    noted = {id(tensor): note for tensor, note in _annotations.items()}  # type: ignore[no-untyped-call]
    return [(index, noted[id(tensor)]) for index, tensor in enumerate(tensors) if id(tensor) in noted]


def part(name: str, role: str, located: Located, *, source: str, aliases: Sequence[str] = ()) -> Part:
    """A part of the state, checked."""
    if not located.is_checked:
        _check_inside(name, located)
    spec = _spec(name, role, dtype_name(located.memory.dtype, tensor=name), located.shape, tuple(aliases))
    return Part(spec, located, source)


@functools.lru_cache(maxsize=131072)
def _spec(name: str, role: str, dtype: str, shape: tuple[int, ...], aliases: tuple[str, ...]) -> TensorSpec:
    """The same object at every save, so that lists of specs compare at the speed of a comparison of addresses."""
    return TensorSpec(name=name, role=role, dtype=dtype, shape=shape, aliases=aliases)


def locate_plain(name: str, tensor: torch.Tensor) -> Located:
    """A tensor that is the whole of itself on every rank that holds it."""
    memory = plain_memory(name, tensor)
    shape = tuple(memory.shape)
    return Located(shape, _placed_whole(shape), memory, None, True)


class DTensorPlaces:
    """Where DTensors lie, with what they have in common found once. Owned by one walk, as a mesh may be gone after it."""

    def __init__(self) -> None:
        self._grids: dict[tuple[object, ...], _Grid] = {}
        self._last: _Grid | None = None  # most tensors lie as the one before them, and that is told without a hash

    def locate(self, name: str, tensor: DTensor) -> Located:
        """A DTensor's place: its boxes follow from its mesh and placements."""
        spec = tensor._spec  # its fields, and not the properties of the tensor: 20,000 of those take 20 ms
        mesh, placements = spec.mesh, spec.placements
        grid = self._last
        if grid is None or grid.mesh is not mesh or not grid.has(placements):
            grid = self._last = self._find(name, mesh, placements)
        memory = plain_memory(name, tensor._local_tensor)
        key = (tensor.shape, memory.shape)
        found = grid.placed.get(key)
        if found is None:
            shape = tuple(tensor.shape)
            placed = () if grid.coordinate is None else _grid_placed(name, grid, shape, tuple(memory.shape))
            found = grid.placed[key] = (shape, placed)
        return Located(*found, memory, None if grid.coordinate is None else grid.on, True)

    def _find(self, name: str, mesh: DeviceMesh, placements: tuple[object, ...]) -> _Grid:
        same = (id(mesh), placements, *map(type, placements))
        grid = self._grids.get(same)
        if grid is None:
            grid = self._grids[same] = _grid(name, mesh, placements)
        return grid


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Meshes and placements that many DTensors share."""

    mesh: DeviceMesh  # kept, so that its id stays its own
    placements: tuple[object, ...]  # torch's
    kinds: list[type]  # of those: in some torches a strided Shard equals a plain one
    coordinate: tuple[int, ...] | None  # None: this rank is not in the mesh
    on: MeshPlacement
    # By global and local shape: the global one as a plain tuple, and the boxes.
    placed: dict[tuple[torch.Size, torch.Size], tuple[tuple[int, ...], tuple[Placed, ...]]] = field(
        default_factory=dict
    )

    def has(self, placements: tuple[object, ...]) -> bool:
        """Whether these are its placements."""
        return (
            placements is self.placements or placements == self.placements and list(map(type, placements)) == self.kinds
        )


def _grid(name: str, mesh: DeviceMesh, placements: tuple[object, ...]) -> _Grid:
    coordinate, mesh_shape, kinds = mesh.get_coordinate(), tuple(mesh.shape), list(map(type, placements))
    if coordinate is None:  # then nothing is said of the placements, not even that they are known
        on = MeshPlacement(axes=(), mesh_shape=mesh_shape, placements=())
        return _Grid(mesh=mesh, placements=placements, kinds=kinds, coordinate=None, on=on)
    on = MeshPlacement(
        axes=mesh.mesh_dim_names or ("",) * len(mesh_shape),
        mesh_shape=mesh_shape,
        placements=tuple(_placement(name, item) for item in placements),
    )
    return _Grid(mesh=mesh, placements=placements, kinds=kinds, coordinate=tuple(coordinate), on=on)


def _grid_placed(name: str, grid: _Grid, shape: tuple[int, ...], local_shape: tuple[int, ...]) -> tuple[Placed, ...]:
    assert grid.coordinate is not None
    found = _dtensor_placed(shape, grid.on.mesh_shape, grid.coordinate, grid.on.placements, local_shape)
    if found is None:
        raise InvalidInputError(
            f"tensor `{name}`: placements {grid.on.placements} on a mesh of shape {grid.on.mesh_shape} do not give a "
            f"local shape {local_shape} at coordinate {grid.coordinate} of a tensor of shape {shape}"
        )
    return found


def plain_memory(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as plain strided memory; InvalidInputError for what has none."""
    problem = memory_problem(tensor)
    if problem is not None:
        raise InvalidInputError(f"tensor `{name}` {problem}", kind="unsupported-tensor")
    return tensor.detach()


def overlaps_itself(memory: torch.Tensor) -> bool:
    """True when two elements may share an address (an expanded tensor): such memory cannot be written in place."""
    if memory.numel() == 0 or memory.is_contiguous():
        return False
    reach = 1
    sizes = zip(memory.stride(), memory.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def memory_problem(memory: torch.Tensor) -> str | None:
    """Why this is not plain strided memory, as the end of a sentence; None when it is."""
    is_dense = memory.layout is torch.strided and not (memory.is_quantized or memory.is_nested or memory.is_meta)
    if is_dense and type(memory) in _PLAIN_TYPES:
        return None
    if isinstance(memory, UninitializedTensorMixin):
        return "belongs to a lazy module that has not run yet; run it once before"
    if memory.layout != torch.strided or memory.is_quantized or memory.is_nested:
        return f"is not a plain dense tensor (layout {memory.layout}); store its dense parts under names of their own"
    if memory.is_meta:
        return "is on the meta device; give it memory with `to_empty` before"
    if is_traceable_wrapper_subclass(memory):
        return f"is a {type(memory).__name__}, whose memory ckpt does not know; store the tensors that it wraps"
    return None


def _placement(name: str, item: object) -> where.DimPlacement:
    if isinstance(item, _StridedShard):
        return where.StridedShard(dim=item.dim, split_factor=int(item.split_factor))
    if isinstance(item, Shard):
        return where.Shard(dim=item.dim)
    if isinstance(item, Replicate):
        return where.Replicate()
    raise InvalidInputError(
        f"tensor `{name}` has placement {item}, expected Shard or Replicate",
        kind="unsupported-tensor",
        hints=("a partial value is not a value yet: `redistribute` it to Replicate or Shard before saving",),
    )


@functools.lru_cache(maxsize=65536)
def _dtensor_placed(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[where.DimPlacement, ...],
    local_shape: tuple[int, ...],
) -> tuple[Placed, ...] | None:
    """Boxes whose local shape is the one found: as `fully_shard` cuts, else as `distribute_tensor` does, else None."""
    ways: tuple[Literal["order", "split"], ...] = ("order", "split")
    for way in ways:
        found = where.dtensor_placement(shape, mesh_shape, coordinate, placements, strided=way)
        if found.local_shape == local_shape:
            return found.placed
    return None


@functools.lru_cache(maxsize=65536)
def _placed_whole(shape: tuple[int, ...]) -> tuple[Placed, ...]:
    return (Placed(box=whole(shape), local_offsets=(0,) * len(shape)),)


def _check_inside(name: str, located: Located) -> None:
    if located.is_whole:
        return
    shape, local_shape = located.shape, located.local_shape
    for item in located.placed:
        box = item.box
        inside = len(box.offsets) == len(shape) and all(
            0 <= o and o + n <= size for o, n, size in zip(box.offsets, box.lengths, shape, strict=False)
        )
        if not inside:
            raise InvalidInputError(f"tensor `{name}`: {box} is outside its global shape {shape}")
        lengths = local_lengths(box, len(local_shape))
        if len(item.local_offsets) != len(local_shape) or not all(
            0 <= o and o + n <= size for o, n, size in zip(item.local_offsets, lengths, local_shape, strict=True)
        ):
            raise InvalidInputError(
                f"tensor `{name}`: {box} at {item.local_offsets} is outside its local shape {local_shape}"
            )


def local_lengths(box: Box, local_dims: int) -> tuple[int, ...]:
    """Lengths of a box in a local tensor of `local_dims` dims: all of it row-major in a flat one.

    Leading dims of length 1 may be missing (one expert of a stack).
    """
    dims = len(box.lengths)
    if dims == local_dims:
        return box.lengths
    if local_dims == 1:
        return (box.volume,)
    missing = dims - local_dims
    if missing > 0 and box.lengths[:missing] == (1,) * missing:
        return box.lengths[missing:]
    raise InvalidInputError(f"{box} does not fit a local tensor of {local_dims} dims")
