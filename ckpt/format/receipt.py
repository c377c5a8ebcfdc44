"""A writer's receipt: what it stored in one attempt, for the committer.

In: `Receipt`. Out: its bytes, and back, checked. Pure. Receipts live only between a rank's writes and the commit; they are
not part of the stored format.

Bytes: u32 CRC-32C of the rest, u32 length of the JSON head, head, then the arrays that the head names.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import DamagedError
from ckpt.format.manifest import ReferenceRecord
from ckpt.format.spec import TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import BoxTable, Int64Array


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """The structure of one writer's image: changes only when the rank's state changes its structure."""

    specs: list[TensorSpec]
    rows: BoxTable  # `tensor` indexes `specs`
    offsets: Int64Array  # [N] bytes from the start of the file
    nbytes: Int64Array  # [N]
    header_bytes: int
    header_crc32c: int
    references: tuple[ReferenceRecord, ...] = ()  # images of earlier attempts that hold some of the rows; sorted
    holder: NDArray[np.int32] | None = (
        None  # [N] which of `references` holds the row, -1: this image; None: this image holds all
    )


@dataclass(frozen=True, kw_only=True)
class ObjectRow:
    """One object of one rank, and where it lies."""

    name: str
    kind: str
    rank: int  # of the job that saved: whose object it is
    writer: int  # number of the image that holds the bytes; after a reshard another than `rank`
    dp_rank: int
    dp_size: int
    digest: str  # of the padded bytes
    byte_offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one rank stored."""

    rank: int
    world: int
    step: int
    attempt: str
    structure: str  # digest of the image table; equal digests mean equal tables
    file: str
    file_bytes: int
    block_bytes: int
    checksums: NDArray[np.uint32]  # per block, fragment after fragment
    objects: list[ObjectRow]
    image: ImageTable | None  # None: the committer knows the table of this structure already
    digests: NDArray[np.uint8] | None = None  # [N, 32] SHA-256 of each fragment; None: not taken
    extra: dict[str, Any] = field(default_factory=dict)  # JSON: what only some writers know (layout, user metadata)


def pack(receipt: Receipt) -> bytes:
    """The receipt as bytes."""
    arrays: dict[str, NDArray[Any]] = {"checksums": receipt.checksums.astype("<u4")}
    head: dict[str, Any] = {
        **{k: getattr(receipt, k) for k in _PLAIN},
        "objects": [vars(row) for row in receipt.objects],
    }
    if receipt.digests is not None:
        arrays["digests"] = np.ascontiguousarray(receipt.digests)
    if receipt.image is not None:
        image = receipt.image
        head["image"] = {"header_bytes": image.header_bytes, "header_crc32c": image.header_crc32c}
        head["specs"] = [[s.name, s.role, s.dtype, list(s.shape), list(s.aliases)] for s in image.specs]
        arrays |= {
            "tensor": image.rows.tensor.astype("<i4"),
            "box_offsets": image.rows.offsets.astype("<i8"),
            "box_lengths": image.rows.lengths.astype("<i8"),
            "offsets": image.offsets.astype("<i8"),
            "nbytes": image.nbytes.astype("<i8"),
        }
        if image.holder is not None:
            head["references"] = [vars(reference) for reference in image.references]
            arrays["holder"] = image.holder.astype("<i4")
    head["arrays"] = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps(head, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text + b"".join(array.tobytes() for array in arrays.values())
    return struct.pack("<I", crc32c(body)) + body


_PLAIN = ("rank", "world", "step", "attempt", "structure", "file", "file_bytes", "block_bytes", "extra")


def unpack(data: bytes, *, name: str) -> Receipt:
    """A receipt from its bytes; DamagedError if they are not what `pack` gave."""
    if len(data) < 8 or struct.unpack("<I", data[:4])[0] != crc32c(data[4:]):
        raise DamagedError(f"receipt `{name}` is damaged")
    size = struct.unpack("<I", data[4:8])[0]
    head = json.loads(data[8 : 8 + size])
    arrays: dict[str, NDArray[Any]] = {}
    position = 8 + size
    for key, dtype, shape in head["arrays"]:
        count = int(np.prod(shape, dtype=np.int64))
        arrays[key] = np.frombuffer(data, dtype, count, position).reshape(shape)
        position += arrays[key].nbytes
    image = None
    if "image" in head:
        rows = BoxTable(tensor=arrays["tensor"], offsets=arrays["box_offsets"], lengths=arrays["box_lengths"])
        specs = [
            TensorSpec(name=n, role=r, dtype=d, shape=tuple(s), aliases=tuple(a)) for n, r, d, s, a in head["specs"]
        ]
        image = ImageTable(
            specs=specs,
            rows=rows,
            offsets=arrays["offsets"],
            nbytes=arrays["nbytes"],
            references=tuple(ReferenceRecord(**one) for one in head.get("references", [])),
            holder=arrays.get("holder"),
            **head["image"],
        )
    return Receipt(
        **{k: head[k] for k in _PLAIN},
        checksums=arrays["checksums"],
        objects=[ObjectRow(**row) for row in head["objects"]],
        image=image,
        digests=arrays.get("digests"),
    )


def with_image(receipt: Receipt, image: ImageTable) -> Receipt:
    """The receipt with the image table that its structure stands for."""
    return replace(receipt, image=image)
