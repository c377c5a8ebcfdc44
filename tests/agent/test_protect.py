"""Making parity: it is that of the whole blobs, and what lies in memory meanwhile does not grow with the group.

Method: a real server for each member and real transfers, in one process; chunks and transfers are counted as they come and go.
What gRPC takes beside them per transfer only a whole process can tell: `bench/agent_memory.py` measures it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt.agent import protect
from ckpt.agent.inventory import Card
from ckpt.agent.stripes import Stripes
from ckpt.agent.transport import Key, Peer, Server
from ckpt.agent.transport.ring import Ring
from ckpt.config import KIB, Options
from ckpt.kernels.erasure import code_blocks, code_for
from tests.agent.agents import RUN, content, credentials

CHUNK = 16 * KIB
OPTIONS = Options(peer_chunk_bytes=CHUNK, protect_streams_max=2)


class Blob:
    """A holder of one."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def held(self, key: Key) -> memoryview | None:
        return memoryview(self._data)

    def call(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("nobody calls")


class Counted:
    """How many there are of something, and how many there were at most."""

    def __init__(self) -> None:
        self._lock, self._now, self.most = threading.Lock(), 0, 0

    def add(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.most = max(self.most, self._now)


@pytest.mark.parametrize(("num", "parity"), [(2, 1), (4, 1), (4, 2), (8, 1), (8, 2)])
def test_what_a_member_has_in_memory_does_not_grow_with_its_group(
    num: int, parity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring_bytes, transfers = Counted(), Counted()

    class CountedRing(Ring):
        def land(self, chunk: NDArray[np.uint8]) -> None:
            ring_bytes.add(len(chunk))
            super().land(chunk)

        def give_back(self) -> None:
            ring_bytes.add(-len(self._chunks[0]))
            super().give_back()

    class CountedPeer(Peer):
        def pull_through(self, *args: Any, **kwargs: Any) -> int:
            transfers.add(1)
            try:
                return super().pull_through(*args, **kwargs)
            finally:
                transfers.add(-1)

    monkeypatch.setattr(protect, "Ring", CountedRing)
    blobs = [content(10 * num * CHUNK - 999 * rank, seed=rank) for rank in range(num)]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(Blob(blob), credentials(str(rank)), host="127.0.0.1"))
            for rank, blob in enumerate(blobs)
        ]
        peers = {rank: CountedPeer(one.address, credentials("me"), OPTIONS) for rank, one in enumerate(servers)}
        made = parity_of(num - 1, blobs, parity, peers)
    assert made == expected_parity(num - 1, blobs, parity)
    streams = min(num - parity, 2)
    assert transfers.most <= streams
    assert CHUNK <= ring_bytes.most <= streams * 2 * CHUNK


@pytest.mark.parametrize("chunk_bytes", [1000, 5000, 100_000])
def test_chunks_are_of_whole_pieces_whatever_the_options_say(chunk_bytes: int) -> None:
    """Of others nobody knows what they were when they were sealed."""
    asked: list[tuple[int, int]] = []

    class Known(Blob):
        def checksum(self, key: Key, start: int, stop: int) -> int | None:
            asked.append((start, stop))
            return None

    blobs = [content(100_001 - 999 * rank, seed=rank) for rank in range(3)]
    options = Options(peer_chunk_bytes=chunk_bytes)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(Known(blob), credentials(str(rank)), host="127.0.0.1"))
            for rank, blob in enumerate(blobs)
        ]
        peers = {rank: Peer(one.address, credentials("me"), options) for rank, one in enumerate(servers)}
        made = parity_of(2, blobs, 1, peers, options)
    assert made == expected_parity(2, blobs, 1)
    ends = {len(blob) for blob in blobs}
    assert len(asked) >= 2
    assert all(start % 4096 == 0 and (stop % 4096 == 0 or stop in ends) for start, stop in asked)


def parity_of(rank: int, blobs: list[bytes], parity: int, peers: dict[int, Any], options: Options = OPTIONS) -> bytes:
    members = tuple(range(len(blobs)))
    cards = tuple(
        Card(
            rank=one, world=len(blobs), step=1, attempt="a", image_bytes=len(blobs[one]), blob_bytes=len(blobs[one]), crc32c=0,
            members=members, parity=parity,
        )
        for one in members
    )  # fmt: skip
    memory = bytearray(stripes_of(blobs, parity).parity_nbytes)
    ends_at = time.monotonic() + 60
    protect.make_parity(cards, rank, peers, memoryview(memory), run_id=RUN, options=options, ends_at=ends_at)
    return bytes(memory)


def stripes_of(blobs: list[bytes], parity: int) -> Stripes:
    return Stripes(image_nbytes=tuple(map(len, blobs)), num_parity=parity)


def expected_parity(rank: int, blobs: list[bytes], parity: int) -> bytes:
    """Each row at once, out of whole blocks."""
    stripes = stripes_of(blobs, parity)
    rows, out = code_for(stripes.num_data, parity).parity_rows(), np.zeros(stripes.parity_nbytes, np.uint8)
    for target in stripes.parity_blocks(rank):
        data = [blobs[one.member][one.start : one.stop] for one in stripes.blocks(target.stripe) if not one.parity]
        row = target.piece - stripes.num_data
        code_blocks(data, [out[target.start : target.stop]], rows[row : row + 1])
    return out.tobytes()


def test_all_members_pull_evenly_from_all_at_any_time() -> None:
    stripes = Stripes(image_nbytes=(8000 * KIB,) * 8, num_parity=2)
    plans = [protect.encode_plan(stripes, member).steps for member in range(8)]
    asked: dict[int, Counter[int]] = {}
    for member, steps in enumerate(plans):
        for step in steps:
            for number, wave in enumerate(protect.waves(step, member, 8, 2)):
                asked.setdefault(number, Counter()).update(step.sources[one].member for one in wave)
    assert [sorted(one.values()) for one in asked.values()] == [[4] * 8] * 3
