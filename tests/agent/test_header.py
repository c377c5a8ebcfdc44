"""A crash at any byte of a change of a header leaves the old header or the new one. Method: every cut point, both directions."""

from __future__ import annotations

import dataclasses
import uuid

import pytest

from ckpt.agent import header as headers
from ckpt.agent.header import HEADER_BYTES, Header, State
from ckpt.agent.owner import Owner
from ckpt.errors import DamagedError, InvalidInputError, VersionError

FIRST = Header(
    state=State.SEALED,
    sequence=41,
    run_id=uuid.UUID(int=7),
    rank=3,
    world=8,
    incarnation=1 << 40,
    epoch=2,
    owner=Owner(pid=4242, start_ticks=99, boot_id=uuid.UUID(int=1 << 100)),
    alive_ns=10**12,
    generation=17,
    step=1000,
    attempt="0123456789abcdef",
    capacity_bytes=1 << 30,
    image_bytes=12345,
    image_crc=0xDEADBEEF,
)
CHANGES = [
    {"state": State.PROTECTED},
    {"state": State.EMPTY, "step": -1, "attempt": "", "image_bytes": 0, "image_crc": None},
    {
        "state": State.WRITING,
        "generation": 18,
        "step": 1001,
        "attempt": "f" * 64,
        "epoch": 3,
        "world": 6,
        "image_crc": None,
    },
]


def segment_of(*written: Header) -> bytearray:
    out = bytearray(HEADER_BYTES)
    for header in written:
        place = headers.place_of(header.sequence)
        out[place : place + headers.PACKED_BYTES] = headers.pack(header)
    return out


def after(header: Header, **changes: object) -> Header:
    return dataclasses.replace(header, sequence=header.sequence + 1, **changes)


@pytest.mark.parametrize("before", [0, 1], ids=["one copy so far", "both copies in use"])
@pytest.mark.parametrize("changes", CHANGES, ids=["protect", "empty", "begin"])
def test_every_cut_of_a_change_leaves_the_old_header_or_the_new_one(before: int, changes: dict[str, object]) -> None:
    history = [FIRST, after(FIRST)][: before + 1]
    old, new = history[-1], after(history[-1], **changes)
    data, place = headers.pack(new), headers.place_of(new.sequence)
    wrong = []
    for cut in range(len(data) + 1):
        for name, span in {"from the front": slice(0, cut), "from the back": slice(cut, len(data))}.items():
            segment = segment_of(*history)
            segment[place + span.start : place + span.stop] = data[span]
            found = headers.unpack(bytes(segment))
            if found not in (old, new) or (span == slice(0, len(data)) and found != new):
                wrong.append((name, cut))
    assert wrong == []


def test_one_changed_bit_anywhere_in_the_newer_copy_is_found() -> None:
    old, new = FIRST, after(FIRST, state=State.PROTECTED)
    place = headers.place_of(new.sequence)
    found = []
    for bit in range(8 * headers.PACKED_BYTES):
        segment = segment_of(old, new)
        segment[place + bit // 8] ^= 1 << bit % 8
        try:
            found.append(headers.unpack(bytes(segment)) == old)
        except VersionError:
            found.append(bit // 8 in (8, 9))  # the version itself: a newer program's copy is not judged
    assert all(found)


def test_no_whole_copy_is_damage() -> None:
    with pytest.raises(DamagedError):
        headers.unpack(bytes(HEADER_BYTES))


def test_what_does_not_fit_is_refused() -> None:
    for changes in ({"attempt": "a" * 65}, {"attempt": "a\0"}, {"image_bytes": (1 << 30) + 1}, {"step": -2}):
        with pytest.raises(InvalidInputError):
            dataclasses.replace(FIRST, **changes)
