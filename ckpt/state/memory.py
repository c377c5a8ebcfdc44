"""Parts to a table of pieces in host memory, with copies of what lies on a device.

In: `Part`s. Out: `PieceTable`, the owners of its memory, and the way back to the device. Never interprets names.

The owners are one per part, in order: `keep_alive[pieces.boxes.tensor[i]]` owns piece i. The owner of memory on a device
is always the tensor itself, so that `device_view` can make a tensor of any of its pieces.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.spec import LocalState, PieceTable
from ckpt.layout.box import BoxTable
from ckpt.layout.placement import Placed
from ckpt.state.tensors import Part, local_lengths, overlaps_itself


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """The memory of some parts, on the host."""

    pieces: PieceTable  # `boxes.tensor` is the index of the part
    storage: NDArray[np.uint64]  # [N] where the torch storage of each piece begins
    on_device: NDArray[np.bool_] | None  # [N] pieces whose memory the host cannot read; None: there are none
    keep_alive: tuple[object, ...]  # owners of the memory, one per part
    to_device: Callable[[], None]  # copy staged parts back to where they came from; for load targets


class SourceMemory:
    """Memory to save from: the tensors' own on the host, a pinned copy of those on a device. One owner, one thread.

    Keeps the last table, never a tensor: a table is given out again when all that it is made of is equal.
    """

    def __init__(self) -> None:
        self._last: tuple[_Facts, PieceTable, NDArray[np.uint64]] | None = None

    def of(self, parts: Sequence[Part], *, stage_devices: bool = True) -> HostMemory:
        """The memory of these parts.

        Device copies run on a side stream that waits for the current one, and are complete on return. Without
        `stage_devices` the memory of CUDA tensors is given as it is, on the device: whoever reads it takes care of the
        streams.
        """
        staged = _HostCopies(stage_cuda=stage_devices)
        tensors = [staged.readable(part.located.memory) for part in parts]
        staged.wait()
        facts = _facts(parts, tensors)
        if self._last is None or self._last[0] != facts:
            boxes = self._last[1].boxes if self._last is not None else None
            table = _table(facts)
            if boxes is not None and _equal(boxes, table.boxes):  # other addresses, the same boxes
                table = dataclasses.replace(table, boxes=boxes)
            self._last = (facts, table, np.array(facts.storage, np.uint64)[table.boxes.tensor])
        return _memory(self._last[1], self._last[2], tensors)


def _memory(
    pieces: PieceTable,
    storage: NDArray[np.uint64],
    tensors: Sequence[torch.Tensor],
    to_device: Callable[[], None] = lambda: None,
) -> HostMemory:
    on_host = [tensor.is_cpu for tensor in tensors]
    on_device = None if all(on_host) else ~np.array(on_host, np.bool_)[pieces.boxes.tensor]
    keep_alive = tuple(tensors)
    return HostMemory(pieces=pieces, storage=storage, on_device=on_device, keep_alive=keep_alive, to_device=to_device)


def device_view(local: LocalState, row: int) -> torch.Tensor:
    """Piece `row` of a state that was collected with `stage_devices=False`, as a tensor of the shape of its box.

    It shares the memory of the user's tensor, and keeps it alive. For pieces on a device.
    """
    pieces, number = local.pieces, int(local.pieces.boxes.tensor[row])
    owner, dims = local.keep_alive[number], len(local.specs[number].shape)
    assert isinstance(owner, torch.Tensor)
    itemsize, storage = owner.element_size(), owner.untyped_storage()
    strides = [stride // itemsize for stride in pieces.strides[row, :dims].tolist()]
    start = (int(pieces.address[row]) - storage.data_ptr()) // itemsize
    return owner.as_strided(pieces.boxes.lengths[row, :dims].tolist(), strides, start)


def _equal(one: BoxTable, other: BoxTable) -> bool:
    columns = ((one.tensor, other.tensor), (one.offsets, other.offsets), (one.lengths, other.lengths))
    return all(np.array_equal(a, b) for a, b in columns)


def target_memory(parts: Sequence[Part], *, filled: Sequence[bool]) -> HostMemory:
    """Memory to load into: the tensors' own on the host, a pinned buffer for those on a device.

    Args:
        parts: the wanted tensors.
        filled: per part, whether it will be filled; a buffer that will not be starts as a copy of the tensor.
    """
    tensors: list[torch.Tensor] = []
    back: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part, is_filled in zip(parts, filled, strict=True):
        memory = part.located.memory
        if memory.is_conj() or memory.is_neg() or overlaps_itself(memory):
            raise InvalidInputError(
                f"tensor `{part.spec.name}` cannot be loaded into: its elements share memory (expanded) or are "
                f"computed on reading (conjugated); strides {memory.stride()}, shape {tuple(memory.shape)}",
                kind="unsupported-tensor",
                hints=("replace it by a copy of its own (`tensor.clone()`) before loading",),
            )
        if memory.device.type == "cpu":
            tensors.append(memory)
            continue
        buffer = _host_buffer(memory)
        if not is_filled:
            buffer.copy_(memory)
        tensors.append(buffer)
        back.append((memory, buffer))
    facts = _facts(parts, tensors)
    table = _table(facts)
    storage = np.array(facts.storage, np.uint64)[table.boxes.tensor]
    return _memory(table, storage, tensors, to_device=lambda: _copy_to_devices(back))


class _HostCopies:
    """Copies of device tensors in pinned host memory, made on one side stream per device. One owner, one thread."""

    def __init__(self, *, stage_cuda: bool) -> None:
        self._stage_cuda = stage_cuda
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def readable(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor itself on the host, or where CUDA tensors are left there; else a copy, complete after `wait`."""
        if memory.is_cpu or (memory.is_cuda and not self._stage_cuda):
            return memory.resolve_conj().resolve_neg() if memory.is_neg() or memory.is_conj() else memory
        if memory.device.type != "cuda":
            return memory.cpu()
        stream = self._streams.get(memory.device)
        if stream is None:
            stream = torch.cuda.Stream(device=memory.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(memory.device))
            self._streams[memory.device] = stream
        buffer = _host_buffer(memory)
        with torch.cuda.stream(stream):
            buffer.copy_(memory, non_blocking=True)
        return buffer

    def wait(self) -> None:
        """Return when all copies are complete."""
        for stream in self._streams.values():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            event.synchronize()


def _host_buffer(memory: torch.Tensor) -> torch.Tensor:
    pinned = memory.device.type == "cuda" and memory.numel() > 0
    return torch.empty(memory.shape, dtype=memory.dtype, device="cpu", pin_memory=pinned)


def _copy_to_devices(back: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for memory, buffer in back:
        memory.copy_(buffer, non_blocking=True)
    for device in {memory.device for memory, _ in back if memory.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """All that a table is made of, one entry per part. Lists of what is mostly the same objects compare fast."""

    shapes: list[tuple[int, ...]]  # global
    placed: list[tuple[Placed, ...]]
    strides: list[tuple[int, ...]]  # elements
    itemsizes: list[int]
    address: list[int]
    limit: list[int]
    storage: list[int]


def _facts(parts: Sequence[Part], tensors: Sequence[torch.Tensor]) -> _Facts:
    storages = [tensor.untyped_storage() for tensor in tensors]
    starts = [storage.data_ptr() for storage in storages]
    return _Facts(
        shapes=[part.located.shape for part in parts],
        placed=[part.located.placed for part in parts],
        strides=[tensor.stride() for tensor in tensors],
        itemsizes=[tensor.element_size() for tensor in tensors],
        address=[tensor.data_ptr() for tensor in tensors],
        limit=[start + storage.nbytes() for start, storage in zip(starts, storages, strict=True)],
        storage=starts,
    )


def _table(facts: _Facts) -> PieceTable:
    """One row per box that holds an element, in order of the parts."""
    dims = max(map(len, facts.shapes), default=1) or 1
    rows: list[int] = []  # number of the part
    offsets, lengths, strides = list[int](), list[int](), list[int]()  # `dims` numbers per row, one after the other
    starts: list[int] = []  # elements from the tensor's first one
    pads = [((0,) * n, (1,) * n) for n in range(dims + 1)]
    for row, (shape, all_placed, own) in enumerate(zip(facts.shapes, facts.placed, facts.strides, strict=True)):
        zeros, ones = pads[dims - len(shape)]
        for placed in all_placed:
            box = placed.box
            if 0 in box.lengths:
                continue
            start, steps = _in_memory(placed, own)
            rows.append(row)
            starts.append(start)
            offsets += box.offsets + zeros
            lengths += box.lengths + ones
            strides += steps + zeros
    num, index = len(rows), np.array(rows, np.int64)
    width = np.array(facts.itemsizes, np.int64)[index]
    return PieceTable(
        boxes=BoxTable(
            tensor=index.astype(np.int32),
            offsets=np.array(offsets, np.int64).reshape(num, dims),
            lengths=np.array(lengths, np.int64).reshape(num, dims),
        ),
        address=np.array(facts.address, np.uint64)[index] + (np.array(starts, np.int64) * width).astype(np.uint64),
        limit=np.array(facts.limit, np.uint64)[index],
        strides=np.array(strides, np.int64).reshape(num, dims) * width[:, None],
    )


def _in_memory(placed: Placed, own: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(start of the box, its strides) in elements from the first element of a tensor with strides `own`."""
    at, dims = placed.local_offsets, len(placed.box.lengths)
    offset = sum(map(operator.mul, at, own)) if any(at) else 0
    if dims == len(own):
        return offset, own
    if len(own) == 1:
        strides, step = [0] * dims, own[0]
        for dim in reversed(range(dims)):
            strides[dim] = step
            step *= placed.box.lengths[dim]
        return offset, tuple(strides)
    local_lengths(placed.box, len(own))
    return offset, (0,) * (dims - len(own)) + own
