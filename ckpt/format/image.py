"""The image: all fragments that one writer stores in one step, as the bytes of a safetensors file.

In: the boxes that a writer stores and the sizes of its objects. Out: `ImageLayout`: the header's bytes and the byte offset
of everything behind it; and back: a checked header. Pure: bytes in memory only.

File: u64 header length, JSON header padded with spaces so that the data start on a 4 KiB boundary, then fragments by falling
element size (so that each is aligned to its elements), then objects.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.config import HEADER_BYTES_MAX, TENSOR_DIMS_MAX
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.format.dtypes import DTYPES, dtype_of
from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable, Int64Array

ALIGN_BYTES = 4096
OBJECT_SLOT_BYTES = 1024  # an object takes a multiple of this, padded with spaces: its growth rarely moves others
OBJECT_PREFIX = "object:"


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """Where everything lies in one image. Offsets are bytes from the start of the file."""

    header: bytes
    rows: BoxTable  # in file order
    source: Int64Array  # [N] row of the caller's table that file row i came from
    offsets: Int64Array  # [N] of each fragment
    nbytes: Int64Array  # [N]
    object_offsets: tuple[int, ...]
    object_nbytes: tuple[int, ...]  # padded sizes
    total_bytes: int


def padded_object(payload: bytes) -> bytes:
    """An encoded object, padded with spaces to whole slots."""
    slots = max(1, -(-len(payload) // OBJECT_SLOT_BYTES))
    return payload.ljust(slots * OBJECT_SLOT_BYTES)


def lay_out(specs: Sequence[TensorSpec], boxes: BoxTable, objects: Sequence[tuple[str, int]]) -> ImageLayout:
    """Lay out an image.

    Args:
        specs: the tensors that `boxes.tensor` indexes, sorted by name.
        boxes: what to store; no box is empty.
        objects: (name, padded size in bytes) of each object.
    """
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)[boxes.tensor]
    keys = [boxes.offsets[:, dim] for dim in reversed(range(boxes.num_dims))]
    order = np.lexsort([*keys, boxes.tensor.astype(np.int64), -itemsizes]).astype(np.int64)
    rows = boxes.take(order)
    nbytes = rows.volumes() * itemsizes[order]
    ends = np.cumsum(nbytes)
    sizes = [n for _, n in objects]
    object_ends = (int(ends[-1]) if len(ends) else 0) + np.cumsum(np.array(sizes, np.int64))
    header = _header(specs, rows, ends - nbytes, ends, objects, object_ends)
    base = len(header)
    total = base + (int(object_ends[-1]) if sizes else int(ends[-1]) if len(ends) else 0)
    return ImageLayout(
        header=header,
        rows=rows,
        source=order,
        offsets=base + ends - nbytes,
        nbytes=nbytes,
        object_offsets=tuple(base + int(end) - size for end, size in zip(object_ends, sizes, strict=True)),
        object_nbytes=tuple(sizes),
        total_bytes=total,
    )


def fragment_key(spec: TensorSpec, offsets: Sequence[int], lengths: Sequence[int]) -> str:
    """The name of a fragment in an image: the tensor's name, and its box unless it is the whole tensor."""
    if tuple(lengths) == spec.shape:
        return spec.name
    return f"{spec.name}@[{','.join(f'{o}:{o + n}' for o, n in zip(offsets, lengths, strict=True))}]"


def object_key(name: str, *, rank: int, writer: int) -> str:
    """The name of an object in an image, without its prefix: the rank stands in it when another rank's image holds it."""
    return name if rank == writer else f"{name}@{rank}"


def header_entry(spec: TensorSpec, lengths: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """(safetensors dtype, shape) that the header has for a fragment of these lengths."""
    code, shape = _stored_as(spec.dtype, list(lengths))
    return code, tuple(shape)


def _header(
    specs: Sequence[TensorSpec],
    rows: BoxTable,
    starts: Int64Array,
    ends: Int64Array,
    objects: Sequence[tuple[str, int]],
    object_ends: Int64Array,
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "ckpt", "version": "1"}}
    columns = (rows.tensor.tolist(), rows.offsets.tolist(), rows.lengths.tolist(), starts.tolist(), ends.tolist())
    for tensor, offsets, lengths, start, end in zip(*columns, strict=True):
        spec = specs[tensor]
        num_dims = len(spec.shape)
        code, shape = _stored_as(spec.dtype, lengths[:num_dims])
        entries[fragment_key(spec, offsets[:num_dims], lengths[:num_dims])] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [start, end],
        }
    for (name, size), end in zip(objects, object_ends.tolist(), strict=True):
        entries[OBJECT_PREFIX + name] = {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
    if len(entries) != 1 + len(rows) + len(objects):
        raise InvalidInputError(
            "two fragments of this rank would have the same name in its image", kind="name-collision"
        )
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGN_BYTES) * ALIGN_BYTES - 8
    if padded > HEADER_BYTES_MAX:
        raise InvalidInputError(
            f"the image of this rank has {len(rows)} fragments; its header of {padded} bytes is over safetensors' limit of"
            f" {HEADER_BYTES_MAX}",
            kind="too-many-fragments",
        )
    return struct.pack("<Q", padded) + text.ljust(padded)


def _stored_as(dtype_name: str, lengths: list[int]) -> tuple[str, list[int]]:
    """The safetensors dtype and shape of a fragment; bytes with one more dim for a dtype that safetensors lacks."""
    dtype = dtype_of(dtype_name)
    if dtype.safetensors is not None:
        return dtype.safetensors, lengths
    return "U8", [*lengths, dtype.itemsize]


def header_nbytes(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """Length of the whole header (prefix included) from a file's first 8 bytes; DamagedError if that cannot be."""
    if len(prefix) < 8:
        raise DamagedError(f"`{file}` is damaged: {len(prefix)} bytes are too few for an image")
    size = int(struct.unpack("<Q", prefix[:8])[0])
    if size > min(HEADER_BYTES_MAX, file_bytes - 8):
        raise DamagedError(f"`{file}` is damaged: its header claims {size} bytes of a file of {file_bytes}")
    return 8 + size


def parse_header(header: bytes, *, file: str, file_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Check a whole image header. Returns name -> (safetensors dtype, shape, start, stop), bytes from the start of the file.

    Raises DamagedError for anything but a valid safetensors header whose entries tile the file without hole or overlap.
    """

    def bad(reason: str) -> DamagedError:
        return DamagedError(f"the header of `{file}` is damaged: {reason}")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise bad("a name occurs twice")
        return out

    try:
        entries = json.loads(header[8:].decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise bad(f"not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise bad("not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("`__metadata__` is not an object of texts")
    out = {name: _entry(name, entry, bad, len(header)) for name, entry in entries.items()}
    position = len(header)
    for name, (_, _, start, stop) in sorted(out.items(), key=lambda item: item[1][2:]):
        if start != position:
            raise bad(f"entry `{name}` starts at byte {start}, expected {position}")
        position = stop
    if position != file_bytes:
        raise DamagedError(f"`{file}` is damaged: expected {position} bytes, found {file_bytes}", kind="truncated")
    return out


_CODES = {dtype.safetensors: dtype.itemsize for dtype in DTYPES.values() if dtype.safetensors is not None}


def _entry(name: str, entry: Any, bad: Any, base: int) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"entry `{name}` has other fields than dtype, shape, data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else [-1]
    if type(code) is not str or code not in _CODES or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise bad(f"entry `{name}` is not a tensor")
    if len(shape) > TENSOR_DIMS_MAX + 1:
        raise bad(f"entry `{name}` has {len(shape)} dims")
    volume = _CODES[code]
    for n in shape:
        volume *= n
    if volume != span[1] - span[0]:
        raise bad(f"entry `{name}` has {span[1] - span[0]} bytes, its shape needs {volume}")
    return code, tuple(shape), base + span[0], base + span[1]
