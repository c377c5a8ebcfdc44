"""What an agent holds arrives bit for bit, whoever serves it, in chunks of any size; and calls carry messages.

Method: an agent in a process of its own, on loopback, and its bytes known beforehand.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ckpt.agent.transport import Key, Range, Server
from ckpt.errors import CheckpointError, InvalidInputError, PeerError
from ckpt.kernels import crc32c
from tests.agent.agents import CHUNK, IMAGE, NBYTES, OPTIONS, PARITY, Agent, Memory, content, credentials


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with Agent() as started:
        yield started


EDGES = [
    (0, NBYTES),
    (0, 0),
    (NBYTES, NBYTES),
    (0, 1),
    (NBYTES - 1, NBYTES),
    (0, CHUNK - 1),
    (0, CHUNK),
    (0, CHUNK + 1),
    (CHUNK - 1, 2 * CHUNK + 1),
    (12345, 2 * CHUNK + 12345),
    (12345, 2 * CHUNK + 12344),
]


@pytest.mark.parametrize(("key", "seed"), [(IMAGE, 0), (PARITY, 1)])
def test_every_range_arrives_bit_for_bit_with_its_checksum(agent: Agent, key: Key, seed: int) -> None:
    peer, whole = agent.peer(), content(NBYTES, seed)
    for start, stop in EDGES:
        into = bytearray(stop - start)
        crc = peer.pull(key, start, stop, into=memoryview(into), deadline_s=20)
        assert (into == whole[start:stop], crc) == (True, crc32c(whole[start:stop])), (start, stop)


def test_many_ranges_arrive_each_in_its_place(agent: Agent) -> None:
    whole, into = content(NBYTES), bytearray(NBYTES)
    cuts = [0, 5, CHUNK, 3 * CHUNK + 7, 1_000_000, 1_000_000, 2_500_000, NBYTES]
    pairs = list(zip(cuts[:-1], cuts[1:], strict=True))
    view = memoryview(into)
    ranges = [Range(key=IMAGE, start=start, stop=stop, into=view[start:stop]) for start, stop in pairs]
    found = agent.peer().pull_many(ranges, deadline_s=20)
    assert (bytes(into), found) == (whole, [crc32c(whole[start:stop]) for start, stop in pairs])


def test_bytes_in_flight_of_many_ranges_stay_within_the_option(agent: Agent) -> None:
    options = dataclasses.replace(OPTIONS, peer_pull_bytes_max=4 * CHUNK)  # two streams of two chunks
    peer, most, done = agent.peer(options=options), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, agent.state()["streams"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    into = memoryview(bytearray(NBYTES))
    peer.pull_many([Range(key=IMAGE, start=0, stop=NBYTES, into=into)] * 20, deadline_s=30)
    done.set()
    watcher.join()
    assert 1 <= most <= 2


def test_one_failing_range_of_many_fails_the_call(agent: Agent) -> None:
    into = memoryview(bytearray(NBYTES))
    ranges = [Range(key=IMAGE, start=0, stop=NBYTES, into=into)] * 5
    absent = dataclasses.replace(IMAGE, step=8)
    ranges.insert(2, Range(key=absent, start=0, stop=10, into=into[:10]))
    with pytest.raises(PeerError) as caught:
        agent.peer().pull_many(ranges, deadline_s=20)
    assert caught.value.kind == "peer-not-held"


@pytest.mark.parametrize(
    "change", [{"step": 8}, {"attempt": "a2"}, {"rank": 1}, {"run_id": "run-2"}], ids=lambda change: next(iter(change))
)
def test_other_step_attempt_rank_or_run_is_not_held(agent: Agent, change: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as caught:
        agent.peer().pull(dataclasses.replace(IMAGE, **change), 0, 1, into=memoryview(bytearray(1)), deadline_s=10)
    assert caught.value.kind == "peer-not-held"


def test_range_beyond_what_is_held_is_refused_with_figures(agent: Agent) -> None:
    with pytest.raises(PeerError, match=str(NBYTES)) as caught:
        agent.peer().pull(IMAGE, 5, NBYTES + 1, into=memoryview(bytearray(NBYTES - 4)), deadline_s=10)
    assert caught.value.kind == "bad-range"


@pytest.mark.parametrize("into", [bytearray(9), bytearray(11), bytes(10)], ids=["small", "large", "read-only"])
def test_memory_that_cannot_take_the_range_is_refused_here(agent: Agent, into: Any) -> None:
    with pytest.raises(InvalidInputError):
        agent.peer().pull(IMAGE, 0, 10, into=memoryview(into), deadline_s=10)


def test_pull_of_memory_freed_meanwhile_has_no_trailer() -> None:
    with Agent() as agent:
        peer = agent.peer()
        peer.call("forget", {}, deadline_s=10)
        with pytest.raises(PeerError) as caught:
            peer.pull(IMAGE, 0, NBYTES, into=memoryview(bytearray(NBYTES)), deadline_s=10)
        assert caught.value.kind == "peer-not-held"


def test_call_carries_messages_of_any_content(agent: Agent) -> None:
    payload = {"text": 'ä\0\n"', "list": [1, -(1 << 70), 0.1, None, True, {}], "deep": {"a": {"b": [[]]}}}
    assert agent.peer().call("echo", payload, deadline_s=10) == payload


def test_call_of_any_size_up_to_the_limit_and_none_above(agent: Agent) -> None:
    peer, fits = agent.peer(), {"x": "y" * 1_000_000}
    assert peer.call("echo", fits, deadline_s=10) == fits
    with pytest.raises(InvalidInputError, match="the limit is"):
        peer.call("echo", {"x": "y" * (1 << 20)}, deadline_s=10)


def test_errors_of_a_holder_are_told_by_kind_and_bugs_without_details(agent: Agent) -> None:
    with pytest.raises(CheckpointError, match="no, for a reason") as refused:
        agent.peer().call("refuse", {}, deadline_s=10)
    with pytest.raises(PeerError) as crashed:
        agent.peer().call("crash", {}, deadline_s=10)
    assert (refused.value.kind, crashed.value.kind) == ("some-kind", "peer-failed")
    assert "inner secret" not in str(crashed.value)


def test_call_that_takes_too_long_is_late(agent: Agent) -> None:
    with pytest.raises(PeerError) as caught:
        agent.peer().call("sleep", {"s": 3}, deadline_s=0.3)
    assert caught.value.kind == "peer-late"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_interfaces_are_served_only_when_told_so(host: str) -> None:
    with pytest.raises(InvalidInputError, match="one interface"):
        Server(Memory(1), credentials("server"), host=host)


def test_server_answers_on_the_given_address_only(agent: Agent) -> None:
    with pytest.raises(PeerError) as caught:
        agent.peer(address=f"127.0.0.2:{agent.port}").call("echo", {}, deadline_s=5)
    assert caught.value.kind == "peer-unreachable"


def test_port_in_use_is_refused_and_never_shared(agent: Agent) -> None:
    with pytest.raises(PeerError, match="cannot serve") as caught:
        Server(Memory(1), credentials("server"), host="127.0.0.1", port=agent.port)
    assert caught.value.kind == "peer-unreachable"


def test_proxy_of_the_environment_is_not_used(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert agent.peer().call("echo", {"a": 1}, deadline_s=5) == {"a": 1}


def test_server_closes_twice_and_lets_its_port_go() -> None:
    server = Server(Memory(1), credentials("server"), host="127.0.0.1")
    server.close()
    server.close()
    Server(Memory(1), credentials("server"), host="127.0.0.1", port=server.port).close()


def test_memory_of_both_ends_does_not_grow_with_the_transfer() -> None:
    nbytes = 256 << 20
    with Agent(nbytes=nbytes) as agent:
        peer = agent.peer(options=dataclasses.replace(OPTIONS, peer_chunk_bytes=4 << 20, peer_progress_s=20))
        into = memoryview(bytearray(nbytes))
        peer.pull(IMAGE, 0, nbytes, into=into, deadline_s=60)
        before = peer.call("reset-peak", {}, deadline_s=10)["rss"]
        own = Memory(1)
        own_before = own.call("reset-peak", {})["rss"]
        peer.pull(IMAGE, 0, nbytes, into=into, deadline_s=60)
        grown = peer.call("state", {}, deadline_s=10)["peak"] - before
        own.server = Server(own, credentials("x"), host="127.0.0.1")
        with own.server:
            own_grown = own.call("state", {})["peak"] - own_before
        assert (grown < 64 << 20, own_grown < 128 << 20) == (True, True), (grown, own_grown)
