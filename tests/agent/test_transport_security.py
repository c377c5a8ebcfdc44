"""Not a byte and no name for those who cannot prove that they belong to the run; nothing is taken twice.

Method: an agent in a process of its own and clients that lie, by hand-made messages where the real client would not; TLS with
certificates that are missing, of another authority, expired, or of another name. Goes with the faults 81, 82 and 83 of the list.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from ckpt.agent.transport import Credentials, Key, Peer, Tls, wire
from ckpt.agent.transport.credentials import Transcript
from ckpt.agent.transport.sessions import CHALLENGE_S, REPLAY_WINDOW, Sessions
from ckpt.errors import InvalidInputError, PeerError
from tests.agent.agents import IMAGE, NBYTES, OPTIONS, PARITY, RUN, SECRET, Agent, content, credentials
from tests.agent.certificates import Authority
from tests.agent.faulty_link import FaultyLink

FAST = dataclasses.replace(OPTIONS, peer_connect_s=2.0)
NONCE = "ab" * 32


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with Agent() as started:
        yield started


def told(call: Any) -> dict[str, str]:
    """What an agent said when it refused a hand-made message."""
    with pytest.raises(flight.FlightError) as caught:
        list(call())
    found = json.loads(caught.value.extra_info or b"{}")
    assert set(found) <= {"kind", "message"}
    return found


def act(agent: Agent, kind: str, body: bytes) -> Any:
    client = flight.FlightClient(f"grpc+tcp://{agent.address}")
    return lambda: client.do_action(flight.Action(kind, body), flight.FlightCallOptions(timeout=10))


def hello(**changes: Any) -> dict[str, Any]:
    return {"protocol": [1, 1], "run_id": RUN, "member": "liar", "nonce": NONCE, **changes}


# The handshake


def test_every_method_is_refused_without_a_session_and_the_holder_is_not_asked(agent: Agent) -> None:
    before = agent.state()["asked"]
    client = flight.FlightClient(f"grpc+tcp://{agent.address}")
    options = flight.FlightCallOptions(timeout=10)
    ticket = flight.Ticket(b"\0" * 48 + wire.canonical({"key": IMAGE.fields(), "start": 0, "stop": 10}))
    descriptor = flight.FlightDescriptor.for_path("x")

    def put() -> None:
        writer, _ = client.do_put(descriptor, pa.schema([("a", pa.int8())]), options)
        writer.close()

    def exchange() -> None:
        writer, reader = client.do_exchange(descriptor, options)
        writer.done_writing()
        reader.read_all()

    attempts = [
        lambda: client.do_get(ticket, options).read_all(),
        lambda: list(client.do_action(flight.Action(wire.CALL, b"\0" * 100), options)),
        lambda: list(client.list_flights(options=options)),
        lambda: client.get_flight_info(descriptor, options),
        lambda: client.get_schema(descriptor, options),
        lambda: client.list_actions(options),
        put,
        exchange,
    ]
    for attempt in attempts:
        with pytest.raises((flight.FlightError, NotImplementedError, pa.ArrowException)):
            attempt()
    assert agent.state()["asked"] == before


def test_client_with_another_secret_turns_away_and_is_turned_away(agent: Agent) -> None:
    other = credentials("client", secret=secrets.token_bytes(32))
    with pytest.raises(PeerError) as caught:
        Peer(agent.address, other, FAST).call("echo", {}, deadline_s=5)
    assert caught.value.kind == "peer-untrusted"
    said = json.loads(next(iter(act(agent, wire.HELLO, wire.canonical(hello()))())).body.to_pybytes())
    proof = {"version": 1, "member": "liar", "client_nonce": NONCE, "server_nonce": said["nonce"]}
    for lie in ("00" * 32, said["proof"], "", None, 5):  # the server's own proof, sent back, is none for the client
        assert told(act(agent, wire.PROVE, wire.canonical({**proof, "proof": lie})))["kind"] == "peer-refused"


def test_client_of_another_run_is_refused(agent: Agent) -> None:
    with pytest.raises(PeerError) as caught:
        Peer(agent.address, credentials(run_id="run-2"), FAST).call("echo", {}, deadline_s=5)
    assert (caught.value.kind, RUN in str(caught.value)) == ("peer-refused", False)


def test_peer_with_another_name_than_expected_is_not_trusted(agent: Agent) -> None:
    with pytest.raises(PeerError, match="'server', expected 'node-5'") as caught:
        Peer(agent.address, credentials(), FAST, member="node-5").call("echo", {}, deadline_s=5)
    assert caught.value.kind == "peer-untrusted"


@pytest.mark.parametrize(
    ("spoken", "kind"),
    [
        ([2, 9], "peer-wrong-version"),
        ([0, 0], "peer-wrong-version"),
        ([2, 1], "peer-wrong-version"),
        (None, "peer-damaged"),
    ],
)
def test_client_without_a_common_version_is_refused(agent: Agent, spoken: Any, kind: str) -> None:
    assert told(act(agent, wire.HELLO, wire.canonical(hello(protocol=spoken))))["kind"] == kind


def test_client_that_speaks_more_versions_gets_the_highest_common_one(agent: Agent) -> None:
    answer = next(iter(act(agent, wire.HELLO, wire.canonical(hello(protocol=[0, 7])))()))
    assert json.loads(answer.body.to_pybytes())["version"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 100,
        b"[" * 4000,
        b"[]",
        b"{}",
        b'{"protocol":[1,1]}',
        b"x" * 5000,
        wire.canonical(hello(nonce="zz" * 32)),
        wire.canonical(hello(member="m" * 257)),
        wire.canonical(hello(member=5)),
    ],
)
def test_bad_handshake_is_refused_by_kind(agent: Agent, body: bytes) -> None:
    assert told(act(agent, wire.HELLO, body))["kind"] == "peer-damaged"
    assert told(act(agent, wire.PROVE, body))["kind"] == "peer-damaged"


def test_random_bytes_on_the_port_are_closed_and_take_no_memory(agent: Agent) -> None:
    watcher = agent.peer(member="watcher")
    before = watcher.call("reset-peak", {}, deadline_s=10)["rss"]
    idle = [socket.create_connection(("127.0.0.1", agent.port), 5) for _ in range(50)]  # and some that say nothing
    for size in (1, 24, 4096, 1 << 20, 8 << 20):
        with socket.create_connection(("127.0.0.1", agent.port), 5) as end:
            end.settimeout(5)
            try:
                end.sendall(b"\xff" * 24 + os.urandom(size))
                while end.recv(65536):
                    pass
            except ConnectionError:
                pass  # closed is what it should be
    grown = watcher.call("state", {}, deadline_s=10)["peak"] - before
    assert agent.peer().call("echo", {"a": 1}, deadline_s=5) == {"a": 1}
    for end in idle:
        end.close()
    assert grown < 64 << 20, grown


def test_secret_is_neither_shown_nor_sent(agent: Agent) -> None:
    own = credentials()
    with FaultyLink(agent.port) as link:
        peer = agent.peer(address=link.address)
        peer.call("echo", {}, deadline_s=5)
        session = peer._session
        assert session is not None
        for sent in (SECRET, SECRET.hex().encode(), session.key, session.key.hex().encode()):
            assert sent not in bytes(link.seen)
    assert (SECRET.hex() in repr(own), repr(SECRET) in repr(own)) == (False, False)


@pytest.mark.parametrize("secret", [b"", b"x" * 31, b"x" * 33, "x" * 32])
def test_secret_of_another_size_is_refused_and_not_shown(secret: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Credentials(run_id=RUN, secret=secret, member="m")
    assert "xx" not in str(caught.value)


# Requests


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, **changes: Any) -> tuple[Sessions, dict[str, Any], bytes, bytes]:
    """Sessions of a server with one client in it; the client's proof, and id and key of its session."""
    sessions = Sessions(credentials("server"), session_s=100.0, clock=clock, **changes)
    said = sessions.hello(hello(), None)
    transcript = Transcript(
        version=1,
        mode="tcp",
        run_id=RUN,
        client="liar",
        server="server",
        client_nonce=NONCE,
        server_nonce=said["nonce"],
    )
    proof = {"version": 1, "member": "liar", "client_nonce": NONCE, "server_nonce": said["nonce"]}
    proof["proof"] = transcript.proof(SECRET, "client")
    sessions.prove(proof, None)
    return sessions, proof, transcript.session_id(SECRET), transcript.session_key(SECRET)


def kind_of(call: Any) -> str:
    with pytest.raises(PeerError) as caught:
        call()
    return caught.value.kind


def test_request_is_taken_once_in_any_order() -> None:
    sessions, _, session_id, key = opened(Clock())
    requests = {n: session_id + wire.seal(key, "get", {"counter": n}) for n in (1, 2, 3, 5000)}
    for number in (2, 1, 3):
        assert sessions.open("get", requests[number], None)[1]["counter"] == number
    for number in (1, 2, 3):
        assert kind_of(lambda n=number: sessions.open("get", requests[n], None)) == "peer-replayed"
    sessions.open("get", requests[5000], None)
    old = session_id + wire.seal(key, "get", {"counter": 5000 - REPLAY_WINDOW})
    assert kind_of(lambda: sessions.open("get", old, None)) == "peer-replayed"


def test_request_with_any_bit_changed_or_cut_anywhere_is_refused() -> None:
    sessions, _, session_id, key = opened(Clock())
    request = session_id + wire.seal(key, "get", {"counter": 1, "start": 0, "stop": 10})
    taken = []
    for bit in range(8 * len(request)):
        changed = bytearray(request)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            taken.append(sessions.open("get", bytes(changed), None))
        except PeerError:
            pass
    for cut in range(len(request)):
        try:
            taken.append(sessions.open("get", request[:cut], None))
        except PeerError:
            pass
    assert taken == []
    assert kind_of(lambda: sessions.open("call", request, None)) == "peer-damaged"  # made for another method
    sessions.open("get", request, None)


@pytest.mark.parametrize("counter", [None, -1, True, "1", 1.0, 1 << 63])
def test_request_without_a_number_is_refused(counter: Any) -> None:
    sessions, _, session_id, key = opened(Clock())
    request = session_id + wire.seal(key, "get", {"counter": counter})
    assert kind_of(lambda: sessions.open("get", request, None)) == "peer-replayed"


def test_proof_sent_twice_opens_one_session_and_keeps_its_numbers() -> None:
    sessions, proof, session_id, key = opened(Clock())
    request = session_id + wire.seal(key, "get", {"counter": 1})
    sessions.open("get", request, None)
    assert sessions.prove(proof, None) == {"session": session_id.hex()}
    assert kind_of(lambda: sessions.open("get", request, None)) == "peer-replayed"


def test_proof_that_comes_late_or_for_another_challenge_is_refused() -> None:
    clock = Clock()
    sessions, proof, _, _ = opened(clock)
    other = Sessions(credentials("server"), session_s=100.0, clock=clock)
    assert kind_of(lambda: other.prove(proof, None)) == "peer-no-session"
    clock.now += CHALLENGE_S + 1
    assert kind_of(lambda: sessions.prove(proof, None)) == "peer-no-session"


def test_session_not_used_for_long_is_forgotten_when_others_come() -> None:
    clock = Clock()
    sessions, _, session_id, key = opened(clock)
    clock.now += 101
    said = sessions.hello(hello(member="other"), None)
    transcript = Transcript(
        version=1,
        mode="tcp",
        run_id=RUN,
        client="other",
        server="server",
        client_nonce=NONCE,
        server_nonce=said["nonce"],
    )
    proof = {"version": 1, "member": "other", "client_nonce": NONCE, "server_nonce": said["nonce"]}
    sessions.prove({**proof, "proof": transcript.proof(SECRET, "client")}, None)
    request = session_id + wire.seal(key, "get", {"counter": 1})
    assert kind_of(lambda: sessions.open("get", request, None)) == "peer-no-session"


def test_member_that_is_not_admitted_any_more_is_refused() -> None:
    members = {"liar"}
    sessions, _, session_id, key = opened(Clock(), admits=lambda member: member in members)
    members.clear()
    request = session_id + wire.seal(key, "get", {"counter": 1})
    assert kind_of(lambda: sessions.open("get", request, None)) == "peer-refused"
    assert kind_of(lambda: sessions.hello(hello(), None)) == "peer-refused"


# Keys


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "secret"},
        {"kind": "parity"},
        {"rank": None},
        {"rank": -1},
        {"rank": True},
        {"rank": 0.0},
        {"step": "7"},
        {"group": 1},
        {"run_id": ""},
        {"attempt": "a" * 257},
        {"attempt": None},
        {"extra": 1},
    ],
)
def test_key_that_names_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Key.of({**IMAGE.fields(), **change})


def test_key_survives_the_way_through_json_and_digests_differ() -> None:
    keys = [IMAGE, PARITY, dataclasses.replace(IMAGE, step=8), dataclasses.replace(PARITY, stripe=0, row=2)]
    assert [Key.of(json.loads(wire.canonical(key.fields()))) for key in keys] == keys
    assert len({key.digest() for key in keys}) == len(keys)


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("pki")
    return Authority(folder, "ours"), Authority(folder, "theirs")


def paths(tls: Tls) -> dict[str, str]:
    return {"ca": str(tls.ca), "cert": str(tls.cert), "key": str(tls.key)}


def tls_peer(agent: Agent, tls: Tls | None, *, member: str = "client", expect: str = "server") -> Peer:
    return Peer(agent.address, credentials(member, tls), FAST, member=expect)


@pytest.fixture(scope="module")
def tls_agent(pki: tuple[Authority, Authority]) -> Iterator[Agent]:
    with Agent(tls=paths(pki[0].member("server"))) as started:
        yield started


def test_mutual_tls_serves_bit_for_bit_and_hides_what_it_sends(
    tls_agent: Agent, pki: tuple[Authority, Authority]
) -> None:
    into = bytearray(NBYTES)
    with FaultyLink(tls_agent.port) as link:
        peer = Peer(link.address, credentials("client", pki[0].member("client")), FAST, member="server")
        peer.pull(IMAGE, 0, NBYTES, into=memoryview(into), deadline_s=20)
        assert (bytes(into), content(NBYTES)[:64] in link.seen) == (content(NBYTES), False)


def test_clients_that_tls_turns_away_get_nothing(tls_agent: Agent, pki: tuple[Authority, Authority]) -> None:
    ours, theirs = pki
    good = tls_peer(tls_agent, ours.member("watcher"), member="watcher")
    before = good.call("state", {}, deadline_s=10)
    liars = {
        "no certificate": tls_peer(tls_agent, None),
        "another authority": tls_peer(tls_agent, theirs.member("client", trust=ours)),
        "expired": tls_peer(tls_agent, ours.member("client", days=-1)),
        "another name": tls_peer(tls_agent, ours.member("somebody")),
    }
    kinds = {name: kind_of(lambda p=peer: p.call("echo", {}, deadline_s=5)) for name, peer in liars.items()}
    after = good.call("state", {}, deadline_s=10)
    assert kinds["another name"] == "peer-refused"
    assert set(kinds.values()) <= {"peer-refused", "peer-unreachable"}, kinds
    assert after["asked"] == before["asked"]
    assert after["counts"].get("calls", 0) - before["counts"].get("calls", 0) <= 1  # the watcher's own


def test_servers_that_tls_does_not_trust_are_not_asked(pki: tuple[Authority, Authority]) -> None:
    ours, theirs = pki
    own = ours.member("client")
    for bad in (theirs.member("server", trust=ours), ours.member("server", days=-1), ours.member("elsewhere")):
        with Agent(tls=paths(bad)) as liar:
            assert kind_of(lambda a=liar: tls_peer(a, own).call("echo", {}, deadline_s=5)) == "peer-unreachable"


def test_client_with_tls_does_not_talk_to_a_server_without(agent: Agent, pki: tuple[Authority, Authority]) -> None:
    peer = tls_peer(agent, pki[0].member("client"))
    assert kind_of(lambda: peer.call("echo", {}, deadline_s=5)) == "peer-unreachable"


def test_missing_tls_file_is_named(tmp_path: Path) -> None:
    tls = Tls(ca=tmp_path / "ca.pem", cert=tmp_path / "c.pem", key=tmp_path / "k.pem")
    with pytest.raises(InvalidInputError, match="ca.pem"):
        Peer("127.0.0.1:1", credentials("client", tls))
