"""One torch tensor to a part: its global tensor, its boxes, and the memory that they lie in.

In: tensors, DTensors, annotations. Out: `Located`, `Part`. Never copies data and never changes a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
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


@dataclass(frozen=True, kw_only=True)
class Located:
    """A local tensor and what it holds of a global one."""

    shape: tuple[int, ...]  # global, elements
    placed: tuple[Placed, ...]  # boxes and where they start in `memory`; none: this rank holds no element
    memory: torch.Tensor  # plain, strided, detached; of fewer dims than the boxes when it is flat
    on: MeshPlacement | None = None  # of a DTensor

    @property
    def is_whole(self) -> bool:
        """True when this rank holds all of the tensor, in its own shape."""
        return len(self.placed) == 1 and self.placed[0].box.lengths == self.shape == tuple(self.memory.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor, elements."""
        return tuple(self.memory.shape)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named tensor of the state as this rank holds it."""

    spec: TensorSpec
    located: Located
    source: str  # the user's object that it comes from, for messages


@dataclass(frozen=True, kw_only=True)
class _Annotation:
    shape: tuple[int, ...]
    placed: tuple[Placed, ...]
    local_shape: tuple[int, ...]


_annotations: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
    note: _Annotation | None = _annotations.get(tensor)  # type: ignore[no-untyped-call]
    if note is None:
        return None
    if tuple(tensor.shape) != note.local_shape:
        raise InvalidInputError(
            f"tensor `{name}` was annotated with local shape {note.local_shape}, found {tuple(tensor.shape)}"
        )
    return Located(shape=note.shape, placed=note.placed, memory=plain_memory(name, tensor))


def part(name: str, role: str, located: Located, *, source: str, aliases: Sequence[str] = ()) -> Part:
    """A part of the state, checked."""
    _check_inside(name, located)
    spec = TensorSpec(
        name=name,
        role=role,
        dtype=dtype_name(located.memory.dtype, tensor=name),
        shape=located.shape,
        aliases=tuple(aliases),
    )
    return Part(spec=spec, located=located, source=source)


def locate_plain(name: str, tensor: torch.Tensor) -> Located:
    """A tensor that is the whole of itself on every rank that holds it."""
    memory = plain_memory(name, tensor)
    shape = tuple(memory.shape)
    return Located(shape=shape, placed=(_placed_whole(shape),), memory=memory)


def locate_dtensor(name: str, tensor: DTensor) -> Located:
    """A DTensor: its boxes follow from its mesh and placements."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    shape = tuple(tensor.shape)
    local = tensor.to_local()
    if coordinate is None:
        return Located(shape=shape, placed=(), memory=plain_memory(name, local))
    placements = tuple(_placement(name, item) for item in tensor.placements)
    memory = plain_memory(name, local)
    found = _dtensor_placed(shape, tuple(mesh.shape), tuple(coordinate), placements, tuple(memory.shape))
    if found is None:
        raise InvalidInputError(
            f"tensor `{name}`: placements {tensor.placements} on a mesh of shape {tuple(mesh.shape)} do not give a "
            f"local shape {tuple(memory.shape)} at coordinate {tuple(coordinate)} of a tensor of shape {shape}"
        )
    on = _mesh_placement(mesh.mesh_dim_names, tuple(mesh.shape), placements)
    return Located(shape=shape, placed=found, memory=memory, on=on)


@functools.lru_cache(maxsize=4096)
def _mesh_placement(
    names: tuple[str, ...] | None, mesh_shape: tuple[int, ...], placements: tuple[where.DimPlacement, ...]
) -> MeshPlacement:
    return MeshPlacement(axes=names or ("",) * len(mesh_shape), mesh_shape=mesh_shape, placements=placements)


def plain_memory(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as plain strided memory; InvalidInputError for what has none."""
    problem = memory_problem(tensor)
    if problem is not None:
        raise InvalidInputError(f"tensor `{name}` {problem}", kind="unsupported-tensor")
    return tensor.detach()


def overlaps_itself(memory: torch.Tensor) -> bool:
    """True when two elements may share an address (an expanded tensor): such memory cannot be written in place."""
    if memory.numel() == 0:
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
def _placed_whole(shape: tuple[int, ...]) -> Placed:
    return Placed(box=whole(shape), local_offsets=(0,) * len(shape))


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
