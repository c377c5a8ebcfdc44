"""What a pass of statistics found in one image, as bytes: how workers hand sums to each other through the store.

In: summaries by method and unit. Out: bytes, and back, checked. Pure. These records live only between the passes of a merge; they
are no part of the stored format.

Bytes: u32 CRC-32C of the rest, u32 length of the JSON head, head, then the arrays that the head names, compressed together (a
histogram is mostly zeros).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from ckpt.errors import DamagedError
from ckpt.kernels import crc32c
from ckpt.merge.method import Summary

Summaries = dict[tuple[int, str], Summary]  # by number of the method and unit


def pack(summaries: Mapping[tuple[int, str], Summary]) -> bytes:
    """The record as bytes."""
    head, data = [], []
    for (bound, unit), summary in summaries.items():
        for kind, arrays in (("sums", summary.sums), ("maxima", summary.maxima)):
            for name, array in arrays.items():
                flat = np.ascontiguousarray(array)
                head.append([bound, unit, kind, name, flat.dtype.str, list(flat.shape)])
                data.append(flat.tobytes())
    text = json.dumps(head, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text + zlib.compress(b"".join(data), 1)
    return struct.pack("<I", crc32c(body)) + body


def unpack(data: bytes, *, name: str) -> Summaries:
    """The summaries; DamagedError if the bytes are not what `pack` gave."""
    if len(data) < 8 or struct.unpack("<I", data[:4])[0] != crc32c(data[4:]):
        raise DamagedError(f"the record `{name}` of a merge is damaged")
    size = struct.unpack("<I", data[4:8])[0]
    raw = zlib.decompress(data[8 + size :])
    out: Summaries = {}
    at = 0
    for bound, unit, kind, key, dtype, shape in json.loads(data[8 : 8 + size]):
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(raw, dtype, count, at).reshape(shape).copy()
        at += array.nbytes
        getattr(out.setdefault((bound, unit), Summary()), kind)[key] = array
    return out
