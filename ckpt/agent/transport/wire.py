"""What stands in the messages between agents, and how each is checked before it is looked at.

In: records, keys of authentication, bytes from the network. Out: bytes, or records that hold what they must. Pure: no I/O, no
clock, no randomness. Never parses more than a stated number of bytes, never trusts a length that it did not check.

    request  session (16) | HMAC-SHA256 (32) | JSON     in a ticket (pull) or an action (call)
    answer   HMAC-SHA256 (32) | JSON                    of a call
    chunk    "CKC1" | offset u64 | nbytes u64 | CRC-32C u32     beside the bytes of each batch, little-endian
    trailer  "CKT1" | HMAC-SHA256 (32) | JSON           beside an empty batch, last; without it the transfer is void
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from dataclasses import dataclass
from typing import Any, TypeGuard

from ckpt.config import PEER_MESSAGE_BYTES_MAX
from ckpt.errors import InvalidInputError, PeerError

PROTOCOLS = (1, 1)  # lowest and highest version of this protocol that is spoken here
SESSION_BYTES = 16
MAC_BYTES = 32
NAME_CHARS_MAX = 256  # of a run, a member, an attempt

HELLO, PROVE, CALL = "ckpt.hello", "ckpt.prove", "ckpt.call"  # types of actions

_CHUNK = struct.Struct("<4sQQI")
_CHUNK_MAGIC = b"CKC1"
_TRAILER_MAGIC = b"CKT1"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What an agent holds: the image of a rank, or one row of parity of a stripe."""

    run_id: str
    step: int
    attempt: str  # under which the step was written; two attempts never mix
    kind: str  # image, parity
    rank: int | None = None  # of an image
    group: int | None = None  # of parity, like the next two
    stripe: int | None = None
    row: int | None = None

    def __post_init__(self) -> None:
        places = {"image": ("rank",), "parity": ("group", "stripe", "row")}
        if self.kind not in places:
            raise InvalidInputError(f"`kind` of a key must be image or parity, found {self.kind!r}")
        for name in ("run_id", "attempt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARS_MAX:
                raise InvalidInputError(f"`{name}` of a key must be 1 to {NAME_CHARS_MAX} characters, found {value!r}")
        for name in ("step", "rank", "group", "stripe", "row"):
            wanted, value = name == "step" or name in places[self.kind], getattr(self, name)
            if wanted and not is_count(value):
                raise InvalidInputError(f"`{name}` of {self.kind} must be a whole number from 0 on, found {value!r}")
            if not wanted and value is not None:
                raise InvalidInputError(f"{self.kind} has no `{name}`, found {value!r}")

    def __str__(self) -> str:
        image, parity = f"rank {self.rank}", f"group {self.group} stripe {self.stripe} row {self.row}"
        place = image if self.kind == "image" else parity
        return f"{self.kind} of {place}, step {self.step}, attempt {self.attempt}"

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        names = ("rank",) if self.kind == "image" else ("group", "stripe", "row")
        return {name: getattr(self, name) for name in ("run_id", "step", "attempt", "kind", *names)}

    @classmethod
    def of(cls, fields: object) -> Key:
        """The key of `fields`, from the network. InvalidInputError when it is none."""
        if not isinstance(fields, dict) or not set(fields) <= set(cls.__dataclass_fields__):
            raise InvalidInputError("a key is a set of named fields")
        try:
            return cls(**fields)
        except TypeError as error:
            raise InvalidInputError(f"a key lacks a field: {error}") from None

    def digest(self) -> str:
        """SHA-256 of the fields, so that bytes of one key never pass for those of another."""
        return hashlib.sha256(canonical(self.fields())).hexdigest()


def is_count(value: object) -> TypeGuard[int]:
    """A whole number from 0 on; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_seconds(value: object) -> TypeGuard[float]:
    """A time that is positive and ends."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def canonical(body: object) -> bytes:
    """JSON, the same bytes for the same content."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parsed(data: bytes, *, what: str, bytes_max: int = PEER_MESSAGE_BYTES_MAX) -> dict[str, Any]:
    """The JSON object in `data`. PeerError (`peer-damaged`) when it is none or too long."""
    if len(data) > bytes_max:
        raise PeerError(f"{what} has {len(data)} bytes, the limit is {bytes_max}", kind="peer-damaged")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):  # undecodable text is a ValueError too
        raise PeerError(f"{what} is not JSON", kind="peer-damaged") from None
    if not isinstance(body, dict):
        raise PeerError(f"{what} is not a JSON object", kind="peer-damaged")
    return body


def mac(key: bytes, label: str, data: bytes) -> bytes:
    """HMAC-SHA256 of `data` for one use, named by `label`, so that no message passes for another kind of message."""
    return hmac.new(key, label.encode() + b"\0" + data, hashlib.sha256).digest()


def seal(key: bytes, label: str, body: dict[str, Any]) -> bytes:
    """MAC and JSON. InvalidInputError when the body is longer than a message may be."""
    data = canonical(body)
    if len(data) > PEER_MESSAGE_BYTES_MAX:
        raise InvalidInputError(f"a message to a peer has {len(data)} bytes, the limit is {PEER_MESSAGE_BYTES_MAX}")
    return mac(key, label, data) + data


def unseal(key: bytes, label: str, sealed: bytes, *, what: str) -> dict[str, Any]:
    """The body of what `seal` made with the same key and label. PeerError (`peer-damaged`) for anything else."""
    if len(sealed) > MAC_BYTES + PEER_MESSAGE_BYTES_MAX:
        raise PeerError(f"{what} has {len(sealed)} bytes, more than a message may have", kind="peer-damaged")
    data = sealed[MAC_BYTES:]
    if not hmac.compare_digest(sealed[:MAC_BYTES], mac(key, label, data)):
        raise PeerError(f"{what} does not carry the code of its session", kind="peer-damaged")
    return parsed(data, what=what)


def chunk_head(offset: int, nbytes: int, crc: int) -> bytes:
    """What stands beside a chunk; `offset` counts from the start of the range that was asked for."""
    return _CHUNK.pack(_CHUNK_MAGIC, offset, nbytes, crc)


def read_chunk_head(data: bytes) -> tuple[int, int, int] | None:
    """(offset, nbytes, CRC-32C), or None when this is no chunk."""
    if len(data) != _CHUNK.size or not data.startswith(_CHUNK_MAGIC):
        return None
    _, offset, nbytes, crc = _CHUNK.unpack(data)
    return offset, nbytes, crc


def trailer(session_key: bytes, *, counter: int, key: Key, start: int, stop: int, crc: int) -> bytes:
    """What ends a whole transfer: whose bytes they are, how many, and their CRC-32C."""
    body = {
        "counter": counter,
        "key": key.digest(),
        "start": start,
        "stop": stop,
        "nbytes": stop - start,
        "crc32c": crc,
    }
    return _TRAILER_MAGIC + seal(session_key, "trailer", body)


def is_trailer(data: bytes) -> bool:
    """Whether this says that it is a trailer; whether it is the right one is seen by comparing."""
    return data.startswith(_TRAILER_MAGIC)
