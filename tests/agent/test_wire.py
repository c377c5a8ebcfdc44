"""Messages arrive whole or as an error, and no descriptor is kept of one that is refused."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from ckpt.agent import wire
from ckpt.config import AGENT_MESSAGE_FDS_MAX
from ckpt.errors import AgentError

LIMIT = 1 << 16
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def soon() -> float:
    return time.monotonic() + 2.0


def frame(body: bytes) -> bytes:
    return wire.MAGIC + struct.pack("<I", len(body)) + body


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_message_and_its_descriptors_come_through(pair: Pair) -> None:
    read_fd, write_fd = os.pipe()
    body = {"id": 1, "text": "ä\0\n", "numbers": [1, 2.5, None]}
    wire.send(pair[0], body, fds=[write_fd], deadline=soon(), bytes_max=LIMIT)
    message = wire.receive(pair[1], deadline=soon(), bytes_max=LIMIT)
    assert message is not None and message.body == body
    assert not os.get_inheritable(message.fds[0])
    os.write(message.fds[0], b"here")
    assert os.read(read_fd, 10) == b"here"
    message.close_fds()
    os.close(read_fd)
    os.close(write_fd)


def test_a_sender_that_dies_at_any_byte_is_told_from_one_that_closed_between_messages() -> None:
    data = frame(b'{"id":1}')
    found = []
    for cut in range(len(data) + 1):
        left, right = socket.socketpair()
        left.sendall(data[:cut])
        left.close()
        try:
            message = wire.receive(right, deadline=soon(), bytes_max=LIMIT)
            found.append("none" if message is None else "message")
        except AgentError as error:
            found.append(error.kind)
        right.close()
    assert found == ["none"] + ["agent-gone"] * (len(data) - 1) + ["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        wire.MAGIC + struct.pack("<I", LIMIT + 1),
        wire.MAGIC + struct.pack("<I", (1 << 32) - 1),
        frame(b""),
        frame(b"[1]"),
        frame(b"{"),
        frame(b'{"a":NaN}'),
        frame(b"\xff\xfe"),
        frame(b"[" * 50_000),
    ],
    ids=["http", "zeros", "over the limit", "4 GiB", "empty", "a list", "torn", "NaN", "not UTF-8", "nested"],
)
def test_what_is_no_message_is_refused_and_its_descriptors_closed(pair: Pair, data: bytes) -> None:
    before = open_fds()
    null = os.open(os.devnull, os.O_RDONLY)
    pair[0].sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null]))])
    os.close(null)
    with pytest.raises(AgentError) as refused:
        wire.receive(pair[1], deadline=soon(), bytes_max=LIMIT)
    assert (refused.value.kind, open_fds()) == ("bad-frame", before)


def test_more_descriptors_than_allowed_are_refused_and_none_is_kept(pair: Pair) -> None:
    before = open_fds()
    null = os.open(os.devnull, os.O_RDONLY)
    many = array.array("i", [null] * (AGENT_MESSAGE_FDS_MAX + 5))
    pair[0].sendmsg([frame(b'{"id":1}')], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
    os.close(null)
    with pytest.raises(AgentError) as refused:
        wire.receive(pair[1], deadline=soon(), bytes_max=LIMIT)
    assert (refused.value.kind, open_fds()) == ("bad-frame", before)


def test_one_that_never_sends_and_one_that_never_reads_cost_a_deadline(pair: Pair) -> None:
    start_s = time.monotonic()
    with pytest.raises(AgentError) as silent:
        wire.receive(pair[0], deadline=start_s + 0.2, bytes_max=LIMIT)
    pair[1].sendall(frame(b'{"id":1}')[:-1])
    with pytest.raises(AgentError) as half:
        wire.receive(pair[0], deadline=start_s + 0.4, bytes_max=LIMIT)
    big = {"text": "x" * (8 << 20)}
    with pytest.raises(AgentError) as deaf:
        wire.send(pair[0], big, deadline=start_s + 0.6, bytes_max=16 << 20)
    assert {silent.value.kind, half.value.kind, deaf.value.kind} == {"timeout"}


def test_a_message_over_the_limit_is_not_sent(pair: Pair) -> None:
    with pytest.raises(AgentError) as refused:
        wire.send(pair[0], {"text": "x" * LIMIT}, deadline=soon(), bytes_max=LIMIT)
    wire.send(pair[0], {"id": 2}, deadline=soon(), bytes_max=LIMIT)
    message = wire.receive(pair[1], deadline=soon(), bytes_max=LIMIT)
    assert refused.value.kind == "too-long" and message is not None and message.body == json.loads('{"id": 2}')
