"""What one rank protects of a step, and how it lies in shared memory.

In: parts. Out: bytes, and back. Pure but for the memory it is given.

    blob      image | receipt size u64 | receipt | request (JSON)      what the group protects
    payload   blob | record (JSON) | size of the record u64            what a segment holds; the record is a card or says
                                                                       what parity is of (inventory.py)
"""

from __future__ import annotations

import json
import struct
from typing import Any

from ckpt.commit.complete import Request
from ckpt.config import AGENT_RECORD_BYTES_MAX
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.kernels import crc32c, crc32c_combine

_SIZE = struct.Struct("<Q")


def pack_rest(receipt: bytes, request: Request) -> bytes:
    """What follows the image in a blob. InvalidInputError when the request's metadata are no JSON."""
    body = {"step": request.step, "metrics": request.metrics, "metadata": request.metadata, "layout": request.layout}
    try:
        text = json.dumps(body)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"metrics and metadata must be JSON values: {error}") from error
    return _SIZE.pack(len(receipt)) + receipt + text.encode()


def unpack_rest(data: bytes, *, what: str) -> tuple[bytes, Request]:
    """(receipt, request) of what `pack_rest` made. DamagedError when it is something else."""
    if len(data) < _SIZE.size or (stop := _SIZE.size + _SIZE.unpack_from(data)[0]) > len(data):
        raise DamagedError(f"the receipt of {what} is cut short: {len(data)} bytes", kind="truncated")
    body = _parsed(data[stop:], what=f"the request of {what}")
    try:
        request = Request(
            step=int(body["step"]), metrics=body["metrics"], metadata=body["metadata"], layout=body["layout"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"the request of {what} lacks a part: {error}", kind="bad-record") from error
    return data[_SIZE.size : stop], request


def pack_record(fields: dict[str, Any]) -> bytes:
    """What ends a payload."""
    text = json.dumps(fields).encode()
    if len(text) > AGENT_RECORD_BYTES_MAX:
        raise InvalidInputError(f"a record of {len(text)} bytes, at most {AGENT_RECORD_BYTES_MAX} are possible")
    return text + _SIZE.pack(len(text))


def read_record(payload: memoryview, *, what: str) -> tuple[dict[str, Any], int]:
    """The record at the end of a payload, and how many bytes come before it."""
    nbytes = _SIZE.unpack_from(payload, len(payload) - _SIZE.size)[0] if len(payload) >= _SIZE.size else -1
    start = len(payload) - _SIZE.size - nbytes
    if not 0 <= nbytes <= AGENT_RECORD_BYTES_MAX or start < 0:
        raise DamagedError(f"{what} has no record at its end", kind="bad-record")
    return _parsed(bytes(payload[start : start + nbytes]), what=f"the record of {what}"), start


def end_payload(memory: memoryview, nbytes: int, crc: int, fields: dict[str, Any]) -> tuple[int, int]:
    """Put the record behind the first `nbytes`, whose checksum is `crc`; size and checksum of it all."""
    record = pack_record(fields)
    total = nbytes + len(record)
    if total > len(memory):
        raise InvalidInputError(f"no room for a record of {len(record)} bytes behind {nbytes:,} in {len(memory):,}")
    memory[nbytes:total] = record
    return total, crc32c_combine(crc, crc32c(record), len(record))


def _parsed(data: bytes, *, what: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError(f"{what} is not JSON", kind="bad-record") from None
    if not isinstance(body, dict):
        raise DamagedError(f"{what} is not a JSON object", kind="bad-record")
    return body
