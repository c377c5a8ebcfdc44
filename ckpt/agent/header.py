"""The header of a segment: what its bytes are, whose, and whether they count.

In: records. Out: bytes, and back. Pure. Two copies, each with a sequence number and a checksum: a writer changes only the older
one, so that a crash at any byte leaves the old header or the new one. Layout: docs/reference/agent.md.
"""

from __future__ import annotations

import enum
import struct
import uuid
from dataclasses import dataclass

from ckpt.agent.identity import Identity
from ckpt.agent.owner import Owner
from ckpt.config import AGENT_ATTEMPT_BYTES_MAX
from ckpt.errors import DamagedError, InvalidInputError, VersionError
from ckpt.kernels import crc32c

MAGIC = b"CKPTSEG\n"
VERSION = 1
HEADER_BYTES = 64 * 1024  # before the payload: a multiple of every page size, so that the payload can be mapped alone
COPY_BYTES = 4096  # from one copy to the next

_BODY = struct.Struct(f"<8sHHHHQ16sIIQQIIQ16sQQq{AGENT_ATTEMPT_BYTES_MAX}sQQI")
_CRC = struct.Struct("<I")
_HAS_CRC = 1  # in the flags


class State(enum.IntEnum):
    """What the payload is worth."""

    EMPTY = 0  # nothing
    WRITING = 1  # a trainer is at it
    SEALED = 2  # an image, complete
    PROTECTED = 3  # and its group can make it again


COMPLETE = (State.SEALED, State.PROTECTED)


@dataclass(frozen=True, kw_only=True)
class Header:
    """One segment."""

    state: State
    sequence: int  # of changes of the header
    run_id: uuid.UUID
    rank: int
    world: int  # of the trainer that wrote the payload
    incarnation: int  # of the agent that changed the header last
    epoch: int  # of the trainer that wrote the payload
    owner: Owner  # the agent that holds the segment
    alive_ns: int  # since the boot of the owner: when it said last that it lives
    generation: int  # counts the images of this rank, 0 for none
    step: int  # -1 for none
    attempt: str
    capacity_bytes: int  # of the payload
    image_bytes: int  # of them used
    image_crc: int | None = None  # CRC-32C of the image

    def __post_init__(self) -> None:
        if not 0 <= self.image_bytes <= self.capacity_bytes:
            raise InvalidInputError(f"an image of {self.image_bytes} bytes in a segment of {self.capacity_bytes}")
        if len(self.attempt.encode()) > AGENT_ATTEMPT_BYTES_MAX or "\0" in self.attempt:
            raise InvalidInputError(f"attempt id {self.attempt!r} is over {AGENT_ATTEMPT_BYTES_MAX} bytes or has zeros")
        if not -1 <= self.step < 1 << 63 or not 0 <= self.epoch < 1 << 63:
            raise InvalidInputError(f"step {self.step} or epoch {self.epoch} is out of range")

    @property
    def is_complete(self) -> bool:
        """Whether the payload is an image."""
        return self.state in COMPLETE

    def belongs_to(self, identity: Identity) -> bool:
        """Whether it is of the same run and rank; the world may have been another one."""
        return (self.run_id, self.rank) == (identity.run_id, identity.rank)


def pack(header: Header) -> bytes:
    """One copy."""
    body = _BODY.pack(
        MAGIC,
        VERSION,
        _BODY.size,
        header.state,
        _HAS_CRC if header.image_crc is not None else 0,
        header.sequence,
        header.run_id.bytes,
        header.rank,
        header.world,
        header.incarnation,
        header.epoch,
        header.owner.pid,
        0,
        header.owner.start_ticks,
        header.owner.boot_id.bytes,
        header.alive_ns,
        header.generation,
        header.step,
        header.attempt.encode(),
        header.capacity_bytes,
        header.image_bytes,
        header.image_crc or 0,
    )
    return body + _CRC.pack(crc32c(body))


PACKED_BYTES = _BODY.size + _CRC.size
assert PACKED_BYTES <= COPY_BYTES and 2 * COPY_BYTES <= HEADER_BYTES


def unpack_copy(data: bytes) -> Header | None:
    """One copy; None when it is torn or was never written. VersionError when a newer program wrote it."""
    body = data[: _BODY.size]
    if len(data) < PACKED_BYTES or body[:8] != MAGIC:
        return None
    if (version := int.from_bytes(body[8:10], "little")) > VERSION:
        raise VersionError(f"a segment of version {version}, this program reads up to {VERSION}", kind="newer-segment")
    if _CRC.unpack_from(data, _BODY.size)[0] != crc32c(body):
        return None
    (_, _, _, state, flags, sequence, run_id, rank, world, incarnation, epoch, pid, _, ticks, boot, *rest) = (
        _BODY.unpack(body)
    )
    alive_ns, generation, step, attempt, capacity_bytes, image_bytes, crc = rest
    return Header(
        state=State(state),
        sequence=sequence,
        run_id=uuid.UUID(bytes=run_id),
        rank=rank,
        world=world,
        incarnation=incarnation,
        epoch=epoch,
        owner=Owner(pid=pid, start_ticks=ticks, boot_id=uuid.UUID(bytes=boot)),
        alive_ns=alive_ns,
        generation=generation,
        step=step,
        attempt=attempt.rstrip(b"\0").decode(),
        capacity_bytes=capacity_bytes,
        image_bytes=image_bytes,
        image_crc=crc if flags & _HAS_CRC else None,
    )


def place_of(sequence: int) -> int:
    """Where the copy of this sequence number lies in the segment: the next one lies in the other place."""
    return sequence % 2 * COPY_BYTES


def unpack(data: bytes) -> Header:
    """The newest whole header of the first `HEADER_BYTES` of a segment. DamagedError when there is none."""
    copies = [unpack_copy(data[place : place + PACKED_BYTES]) for place in (0, COPY_BYTES)]
    whole = [copy for copy in copies if copy is not None]
    if not whole:
        raise DamagedError("no whole header", kind="no-header")
    return max(whole, key=lambda copy: copy.sequence)
