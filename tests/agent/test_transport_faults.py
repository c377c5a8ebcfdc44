"""Whatever happens to the other side or to the link, a pull ends in time with the right bytes or a named error.

Method: agents in processes of their own that are killed, stopped and started again, and a TCP link that cuts at every byte, flips
every byte, goes silent and crawls. Goes with the faults 78, 79, 81 and 85 of the list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ckpt.agent.transport import Peer
from ckpt.agent.transport.errand import Errand, Overdue
from ckpt.errors import PeerError
from tests.agent.agents import CHUNK, IMAGE, NBYTES, OPTIONS, TREE, Agent, content
from tests.agent.faulty_link import FaultyLink

SLACK_S = 50.0  # on a busy machine, on top of what the options say; who waits for the deadline of the pull is seen
BROKEN = {"peer-truncated", "peer-unreachable", "peer-damaged"}
SMALL = dataclasses.replace(OPTIONS, peer_chunk_bytes=64)
SMALL_NBYTES = 150  # three chunks
LANES = 6


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with Agent() as started:
        yield started


def pull(peer: Peer, nbytes: int = NBYTES, *, deadline_s: float = 100.0) -> bytes:
    into = bytearray(nbytes)
    peer.pull(IMAGE, 0, nbytes, into=memoryview(into), deadline_s=deadline_s)
    return bytes(into)


def failure(peer: Peer, nbytes: int = NBYTES, *, deadline_s: float = 100.0) -> tuple[str, float]:
    """Kind of the error of a pull, and the seconds it took."""
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        pull(peer, nbytes, deadline_s=deadline_s)
    return caught.value.kind, time.monotonic() - start


def greet(peer: Peer) -> None:
    """Connect, however short its deadlines are on this machine."""
    for _ in range(20):
        with contextlib.suppress(PeerError):
            peer.call("echo", {}, deadline_s=60)
            return
    raise AssertionError("no connection")


def at_every_byte(agent: Agent, fault: str, progress_s: float) -> list[str]:
    """What became of a small transfer with a fault at each byte that the agent sends for it: a kind, or `right` or `wrong`.

    Each lane has a link and a client of its own, because most of the time is waiting for deadlines.
    """
    expected = content(NBYTES)[:SMALL_NBYTES]
    options = dataclasses.replace(SMALL, peer_progress_s=progress_s)
    with FaultyLink(agent.port) as link:
        peer = agent.peer(options=SMALL, address=link.address)
        peer.call("echo", {}, deadline_s=60)
        link.arm()
        assert pull(peer, SMALL_NBYTES) == expected
        whole = link.passed

    def lane(number: int) -> list[str]:
        found = []
        with FaultyLink(agent.port) as link:
            peer = agent.peer(options=options, address=link.address)
            for at in range(number, whole, LANES):
                link.arm()
                greet(peer)
                link.arm(**{fault: at})
                try:
                    found.append("right" if pull(peer, SMALL_NBYTES) == expected else "wrong")
                except PeerError as error:
                    found.append(error.kind)
                link.hang_up()
                peer.close()
        return found

    with ThreadPoolExecutor(LANES) as pool:
        return [outcome for found in pool.map(lane, range(LANES)) for outcome in found]


def test_transfer_cut_at_every_byte_gives_the_right_bytes_or_an_error(agent: Agent) -> None:
    outcomes = Counter(at_every_byte(agent, "cut_at", progress_s=10.0))
    assert set(outcomes) <= BROKEN | {"right"}, outcomes
    assert sum(outcomes[kind] for kind in BROKEN) > 3 * SMALL_NBYTES  # right: only the end of the stream was cut off


def test_byte_flipped_anywhere_never_gives_wrong_bytes(agent: Agent) -> None:
    outcomes = Counter(at_every_byte(agent, "flip_at", progress_s=0.4))  # much of it is waiting for that
    assert outcomes["wrong"] == 0
    assert outcomes["peer-damaged"] >= SMALL_NBYTES, outcomes


def test_sender_killed_midway_leaves_an_error(agent: Agent) -> None:
    with Agent() as other, FaultyLink(other.port) as link:
        peer = other.peer(address=link.address)
        peer.call("echo", {}, deadline_s=60)
        link.arm(bytes_per_s=2_000_000)
        threading.Timer(0.3, other.process.kill).start()
        kind, seconds = failure(peer)
    assert (kind in BROKEN, seconds < SLACK_S) == (True, True), (kind, seconds)


def test_stopped_sender_costs_the_progress_deadline_and_works_again_when_it_goes_on() -> None:
    with Agent() as other:
        peer = other.peer()
        peer.call("echo", {}, deadline_s=60)
        other.signal(signal.SIGSTOP)
        before = failure(peer)
        fresh = failure(other.peer(options=dataclasses.replace(OPTIONS, peer_connect_s=1.0)))
        other.signal(signal.SIGCONT)
        assert pull(peer) == content(NBYTES)
    assert (before[0], fresh[0]) == ("peer-stalled", "peer-unreachable")
    assert max(before[1], fresh[1]) < OPTIONS.peer_progress_s + SLACK_S


@pytest.mark.parametrize("stop_at", [0, 1000, CHUNK, 1_000_000])
def test_half_open_link_costs_the_progress_deadline(agent: Agent, stop_at: int) -> None:
    with FaultyLink(agent.port) as link:
        peer = agent.peer(address=link.address)
        peer.call("echo", {}, deadline_s=60)
        link.arm(stop_at=stop_at)
        kind, seconds = failure(peer)
    assert (kind, seconds < OPTIONS.peer_progress_s + SLACK_S) == ("peer-stalled", True), seconds


def test_deadline_of_a_pull_holds_while_chunks_still_come(agent: Agent) -> None:
    with FaultyLink(agent.port) as link:
        peer = agent.peer(address=link.address)
        peer.call("echo", {}, deadline_s=60)
        link.arm(bytes_per_s=400_000)  # a chunk in a sixth of a second, all of them in eight
        kind, seconds = failure(peer, deadline_s=1.5)
    assert (kind, seconds < 1.5 + SLACK_S) == ("peer-late", True), seconds


def test_peer_at_1_kb_per_second_is_given_up_and_others_are_not_harmed(agent: Agent) -> None:
    with Agent() as other, FaultyLink(other.port) as link:
        slow, fast = other.peer(address=link.address), agent.peer()
        slow.call("echo", {}, deadline_s=60)
        link.arm(bytes_per_s=1000)
        found: list[tuple[str, float]] = []
        thread = threading.Thread(target=lambda: found.append(failure(slow)))
        thread.start()
        start = time.monotonic()
        good = [pull(fast) for _ in range(3)]
        fast_s = time.monotonic() - start
        thread.join()
    assert good == [content(NBYTES)] * 3
    assert (found[0][0], found[0][1] < OPTIONS.peer_progress_s + SLACK_S) == ("peer-stalled", True)
    assert fast_s < SLACK_S


def test_restarted_agent_is_found_again_and_takes_a_new_session() -> None:
    first = Agent()
    peer = first.peer()
    assert pull(peer) == content(NBYTES)
    first.stop()
    gone = failure(peer)
    with Agent(port=first.port):
        assert pull(peer) == content(NBYTES)
    assert (gone[0], gone[1] < SLACK_S) == ("peer-unreachable", True)


def test_agent_restarted_behind_a_link_that_stays_up_is_asked_again(agent: Agent) -> None:
    """The connection lives, the session does not: what a restart between two calls looks like."""
    peer = agent.peer()
    peer.call("echo", {}, deadline_s=60)
    session = peer._session
    assert session is not None
    peer._session = dataclasses.replace(session, id=b"\0" * 16)
    assert pull(peer) == content(NBYTES)


def test_port_where_nobody_answers_is_unreachable_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts by backlog, never says a word
        options = dataclasses.replace(OPTIONS, peer_connect_s=0.5)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(PeerError) as caught:
            Agent.peer(_At(address), options=options).call("echo", {}, deadline_s=10)  # type: ignore[arg-type]
    assert (caught.value.kind, time.monotonic() - start < 0.5 + SLACK_S) == ("peer-unreachable", True)


class _At:
    def __init__(self, address: str) -> None:
        self.address = address


def test_peer_that_answers_garbage_is_an_error_in_time() -> None:
    for garbage in (b"\0" * 4096, bytes(range(256)) * 16, b"HTTP/1.1 200 OK\r\n\r\n", b"\xff" * 100_000):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=_say, args=(listener, garbage), daemon=True).start()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            options = dataclasses.replace(OPTIONS, peer_connect_s=1.0)
            kind, seconds = failure(Agent.peer(_At(address), options=options))  # type: ignore[arg-type]
        assert (kind in BROKEN, seconds < 1.0 + SLACK_S) == (True, True), (kind, seconds)


def _say(listener: socket.socket, garbage: bytes) -> None:
    ends = []
    try:
        while True:
            ends.append(listener.accept()[0])
            ends[-1].sendall(garbage)
    except OSError:
        for end in ends:
            end.close()


def test_stopped_client_holds_a_stream_no_longer_than_its_deadline() -> None:
    code = (
        "import sys; from tests.agent.agents import *; "
        "a = Agent.peer(type('At', (), {'address': sys.argv[1]}), options=dataclasses.replace(OPTIONS, peer_progress_s=60)); "
        "a.call('echo', {}, deadline_s=5); print('ready', flush=True); "
        "a.pull(IMAGE, 0, 64 << 20, into=memoryview(bytearray(64 << 20)), deadline_s=3)"
    )
    with Agent(nbytes=64 << 20) as big, FaultyLink(big.port) as link:
        command = [sys.executable, "-c", code, link.address]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=TREE)
        try:
            assert client.stdout is not None and client.stdout.readline() == "ready\n"
            _until(lambda: big.state()["streams"] == 1)
            client.send_signal(signal.SIGSTOP)
            _until(lambda: big.state()["streams"] == 0, within_s=3 + SLACK_S)
        finally:
            client.kill()
            client.wait()
            assert client.stdout is not None
            client.stdout.close()


def test_killed_client_frees_its_stream_at_once() -> None:
    with Agent(nbytes=64 << 20) as big, FaultyLink(big.port) as link:
        peer = big.peer(address=link.address)
        peer.call("echo", {}, deadline_s=60)
        link.arm(bytes_per_s=1_000_000)
        thread = threading.Thread(target=lambda: failure(peer, 64 << 20))
        thread.start()
        _until(lambda: big.state()["streams"] == 1)
        link.hang_up()
        _until(lambda: big.state()["streams"] == 0)
        thread.join()


def test_streams_over_the_cap_of_a_peer_are_refused_and_other_peers_are_served() -> None:
    with Agent(nbytes=64 << 20, options={"peer_streams_each_max": 2, "peer_streams_max": 3}) as big:
        link = FaultyLink(big.port)
        slow = big.peer(address=link.address, options=dataclasses.replace(OPTIONS, peer_progress_s=20))
        slow.call("echo", {}, deadline_s=60)
        link.arm(bytes_per_s=1_000_000)
        threads = [threading.Thread(target=lambda: failure(slow, 64 << 20)) for _ in range(2)]
        for thread in threads:
            thread.start()
        _until(lambda: big.state()["streams"] == 2)
        with pytest.raises(PeerError) as caught:
            pull(big.peer(), 100)
        same_peer = caught.value
        other_peer = pull(big.peer(member="another"), 100)
        link.close()
        for thread in threads:
            thread.join()
        _until(lambda: big.state()["streams"] == 0)
        after = pull(big.peer(), 100)
    assert (same_peer.kind, same_peer.retryable) == ("peer-busy", True)
    assert other_peer == after == content(64 << 20)[:100]


def test_given_up_call_writes_no_more_after_its_caller_left() -> None:
    told, wrote, refused = threading.Event(), threading.Event(), threading.Event()

    def work(errand: Errand[int]) -> int:
        told.wait(10)
        try:
            with errand.writing():
                wrote.set()
        except Overdue:
            refused.set()
        return 0

    with pytest.raises(Overdue, match="stalled"):
        Errand(work, name="test").run(progress_s=0.05, ends_at=time.monotonic() + 10)
    told.set()
    assert (refused.wait(10), wrote.is_set()) == (True, False)


def _until(true: Any, *, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
