"""A stream that is anything else than all chunks in order and the right trailer is an error.

Method: a server that shakes hands as it should and then sends what the test wrote down: every prefix, every chunk left out,
twice, swapped or of another type, and every wrong field of a trailer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from ckpt.agent.transport import Peer, wire
from ckpt.agent.transport.ring import Ring
from ckpt.agent.transport.server import SCHEMA, flight_error
from ckpt.agent.transport.sessions import Session, Sessions
from ckpt.errors import PeerError
from ckpt.kernels import crc32c
from tests.agent.agents import IMAGE, OPTIONS, PARITY, content, credentials

PARTS = [content(100, seed) for seed in range(3)]
WHOLE = b"".join(PARTS)
Message = tuple[bytes, bytes]  # bytes of the batch, what stands beside them


class Scripted(flight.FlightServerBase):  # type: ignore[misc]
    """Real handshakes, then the messages that `script` makes for a request."""

    def __init__(self) -> None:
        self.script: Callable[[Session, dict[str, Any]], list[Message]] = right
        self.schema = SCHEMA
        self.raises: str | None = None  # after the script
        self.asked = 0
        self._sessions = Sessions(credentials("server"), session_s=100.0, clock=lambda: 1.0)
        super().__init__("grpc+tcp://127.0.0.1:0")

    def do_action(self, context: Any, action: flight.Action) -> Iterator[flight.Result]:
        body = wire.parsed(action.body.to_pybytes(), what="it")
        answer = self._sessions.hello if action.type == wire.HELLO else self._sessions.prove
        yield flight.Result(wire.canonical(answer(body, None)))

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        session, body = self._sessions.open("get", ticket.ticket, None)
        self.asked += 1

        def batches() -> Iterator[tuple[pa.RecordBatch, bytes]]:
            for data, beside in self.script(session, body):
                column = pa.array(list(data), self.schema.field(0).type)
                yield pa.RecordBatch.from_arrays([column], schema=self.schema), beside
            if self.raises is not None:
                raise flight_error(self.raises, "it is over")

        return flight.GeneratorStream(self.schema, batches())


def chunks() -> list[Message]:
    return [(part, wire.chunk_head(100 * i, 100, crc32c(part))) for i, part in enumerate(PARTS)]


def end(session: Session, body: dict[str, Any], **changes: Any) -> Message:
    fields = {"counter": body["counter"], "key": IMAGE, "start": 0, "stop": 300, "crc": crc32c(WHOLE), **changes}
    return b"", wire.trailer(fields.pop("session_key", session.key), **fields)


def right(session: Session, body: dict[str, Any]) -> list[Message]:
    return [*chunks(), end(session, body)]


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.shutdown()


def kind_of(server: Scripted, script: Callable[[Session, dict[str, Any]], list[Message]]) -> str:
    server.script = script
    with pytest.raises(PeerError) as caught:
        pull(server)
    return caught.value.kind


def pull(server: Scripted) -> bytes:
    into = bytearray(300)
    peer = Peer(f"127.0.0.1:{server.port}", credentials(), OPTIONS, member="server")
    peer.pull(IMAGE, 0, 300, into=memoryview(into), deadline_s=10)
    return bytes(into)


def test_right_stream_is_taken(server: Scripted) -> None:
    server.script = right
    assert pull(server) == WHOLE


def test_stream_that_ends_cleanly_at_any_message_is_truncated(server: Scripted) -> None:
    kinds = [kind_of(server, lambda s, b, n=n: right(s, b)[:n]) for n in range(4)]
    assert kinds == ["peer-truncated"] * 4


@pytest.mark.parametrize(
    ("first", "asked", "kind"), [(0, 2, "peer-no-session"), (1, 1, "peer-truncated"), (2, 1, "peer-truncated")]
)
def test_a_session_that_is_lost_is_asked_for_again_only_before_the_first_chunk(
    server: Scripted, first: int, asked: int, kind: str
) -> None:
    """Or a ring would get the first chunks twice, and its reader take them for the next ones."""
    peer = Peer(f"127.0.0.1:{server.port}", credentials(), OPTIONS, member="server")
    ring = Ring(chunk_bytes=100, depth=8)
    server.script, server.raises, server.asked = lambda s, b: right(s, b)[:first], "peer-no-session", 0
    try:
        with pytest.raises(PeerError) as caught:
            peer.pull_through(IMAGE, 0, 300, ring, deadline_s=10)
    finally:
        server.raises = None
    assert (caught.value.kind, server.asked) == (kind, asked)
    for part in PARTS[:first]:
        assert ring.take(ends_at=0.0).tobytes() == part
        ring.give_back()
    with pytest.raises(PeerError):
        ring.take(ends_at=0.0)


def test_a_damaged_chunk_never_reaches_the_reader_of_a_ring(server: Scripted) -> None:
    peer = Peer(f"127.0.0.1:{server.port}", credentials(), OPTIONS, member="server")
    ring = Ring(chunk_bytes=100, depth=8)
    wrong = (PARTS[1][:50] + bytes([PARTS[1][50] ^ 8]) + PARTS[1][51:], chunks()[1][1])
    server.script = lambda s, b: [chunks()[0], wrong, chunks()[2], end(s, b)]
    with pytest.raises(PeerError) as caught:
        peer.pull_through(IMAGE, 0, 300, ring, deadline_s=10)
    assert caught.value.kind == "peer-damaged"
    assert ring.take(ends_at=0.0).tobytes() == PARTS[0]
    ring.give_back()
    with pytest.raises(PeerError, match="is damaged"):
        ring.take(ends_at=0.0)


def test_trailer_after_too_few_chunks_is_truncated(server: Scripted) -> None:
    kinds = [kind_of(server, lambda s, b, n=n: [*chunks()[:n], end(s, b)]) for n in range(3)]
    assert kinds == ["peer-truncated"] * 3


def test_chunks_left_out_twice_or_swapped_are_damage(server: Scripted) -> None:
    orders = [(1, 2), (0, 2), (0, 0, 1, 2), (0, 1, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (0, 1, 2, 2)]
    kinds = [kind_of(server, lambda s, b, o=o: [*[chunks()[i] for i in o], end(s, b)]) for o in orders]
    assert kinds == ["peer-damaged"] * len(orders)


def test_chunk_with_any_bit_changed_is_damage(server: Scripted) -> None:
    kinds = set()
    for bit in range(0, 800, 7):
        changed = bytearray(PARTS[1])
        changed[bit // 8] ^= 1 << bit % 8
        spoilt = [chunks()[0], (bytes(changed), chunks()[1][1]), chunks()[2]]
        kinds.add(kind_of(server, lambda s, b, m=spoilt: [*m, end(s, b)]))
    assert kinds == {"peer-damaged"}


@pytest.mark.parametrize(
    "beside", [b"", b"CKC1", b"XXXX" + bytes(20), wire.chunk_head(0, 99, crc32c(PARTS[0])), wire.chunk_head(1, 100, 0)]
)
def test_chunk_with_another_head_is_damage(server: Scripted, beside: bytes) -> None:
    assert kind_of(server, lambda s, b: [(PARTS[0], beside), *chunks()[1:], end(s, b)]) == "peer-damaged"


@pytest.mark.parametrize(
    "change",
    [
        {"crc": 0},
        {"key": PARITY},
        {"start": 1},
        {"stop": 299},
        {"counter": 999},
        {"session_key": b"x" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_trailer_with_a_wrong_field_is_damage(server: Scripted, change: dict[str, Any]) -> None:
    assert kind_of(server, lambda s, b: [*chunks(), end(s, b, **change)]) == "peer-damaged"


def test_trailer_cut_anywhere_is_damage(server: Scripted) -> None:
    kinds = {kind_of(server, lambda s, b, n=n: [*chunks(), (b"", end(s, b)[1][:n])]) for n in range(5, 100, 9)}
    assert kinds == {"peer-damaged"}


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.utf8()])
def test_batches_of_another_type_are_damage(server: Scripted, kind: pa.DataType) -> None:
    server.schema = pa.schema([pa.field("bytes", kind)])
    try:
        empty = b"" if kind == pa.utf8() else b"\1" * 100
        head = wire.chunk_head(0, 100, crc32c(b"\1" * 100))
        assert kind_of(server, lambda s, b: [(empty, head), end(s, b)]) == "peer-damaged"
    finally:
        server.schema = SCHEMA


def test_message_larger_than_a_chunk_may_be_is_not_taken_in(server: Scripted) -> None:
    large = bytes(4 << 20)
    head = wire.chunk_head(0, len(large), crc32c(large))
    assert kind_of(server, lambda s, b: [(large, head), end(s, b)]) in ("peer-damaged", "peer-unreachable")
