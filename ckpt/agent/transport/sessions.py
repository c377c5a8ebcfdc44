"""The server's side of handshakes, and which requests it takes for genuine.

In: bodies of messages, the clock. Out: answers, or the session and body of a genuine request; a `PeerError` otherwise. Keeps
nothing for those who have not proved that they know the secret. Thread safe. Never does I/O.

A request is taken once: its number in the session was not seen before and is not far behind the highest seen.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckpt.agent.transport import wire
from ckpt.agent.transport.credentials import Credentials, Transcript
from ckpt.config import PEER_SESSIONS_MAX
from ckpt.errors import PeerError

CHALLENGE_S = 30.0  # a challenge is answered within
REPLAY_WINDOW = 4096  # requests of a session that may overtake each other
_NONCE_CHARS = 64  # 32 bytes in hexadecimal


@dataclass(kw_only=True, eq=False)
class Session:
    """One client that proved itself. Guarded by the lock of `Sessions`."""

    key: bytes = field(repr=False)
    member: str
    used_at: float
    highest: int = 0  # number of a request
    seen: set[int] = field(default_factory=set)


class Sessions:
    """Handshakes and sessions of one server.

    Args:
        credentials: of this member.
        session_s: a session that was not used for so long is forgotten.
        admits: which members may talk; None: all who know the secret.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        session_s: float,
        clock: Callable[[], float],
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        self._credentials = credentials
        self._session_s = session_s
        self._clock = clock
        self._admits = admits
        self._cookie_key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def hello(self, body: dict[str, Any], identity: str | None) -> dict[str, Any]:
        """Answer to a client that opens a handshake. `identity`: the name in its certificate, with TLS."""
        version = agreed_version(body.get("protocol"))
        client, nonce = body.get("member"), body.get("nonce")
        if not isinstance(client, str) or not 0 < len(client) <= wire.NAME_CHARS_MAX or not _is_nonce(nonce):
            raise PeerError("a handshake without a member or a nonce", kind="peer-damaged")
        if body.get("run_id") != self._credentials.run_id:
            raise PeerError("this agent belongs to another run", kind="peer-refused")
        self._check_member(client, identity)
        head = secrets.token_hex(8) + format(int(self._clock() * 1000), "016x")
        transcript = self._transcript(version, client, str(nonce), head + self._cookie(head, client, str(nonce)))
        return {
            "version": version,
            "member": self._credentials.member,
            "nonce": transcript.server_nonce,
            "proof": transcript.proof(self._credentials.secret, "server"),
        }

    def prove(self, body: dict[str, Any], identity: str | None) -> dict[str, Any]:
        """Open a session for a client that knows the secret. Twice the same proof opens one session."""
        version = agreed_version([body.get("version")] * 2)
        client, nonce, own = body.get("member"), body.get("client_nonce"), body.get("server_nonce")
        if not isinstance(client, str) or not _is_nonce(nonce) or not _is_nonce(own):
            raise PeerError("a proof without a member or a nonce", kind="peer-damaged")
        head, cookie = str(own)[:32], str(own)[32:]
        age = self._clock() - int(head[16:], 16) / 1000
        expected = self._cookie(head, client, str(nonce))
        if not hmac.compare_digest(cookie.encode(), expected.encode()) or not -1 <= age <= CHALLENGE_S:
            raise PeerError("a proof for no challenge of this agent", kind="peer-no-session")
        transcript = self._transcript(version, client, str(nonce), str(own))
        if not transcript.proves(self._credentials.secret, "client", body.get("proof")):
            raise PeerError("the proof is not that of a member of this run", kind="peer-refused")
        self._check_member(client, identity)
        session_id = transcript.session_id(self._credentials.secret)
        with self._lock:
            self._forget_old()
            if session_id not in self._sessions:
                key = transcript.session_key(self._credentials.secret)
                self._sessions[session_id] = Session(key=key, member=client, used_at=self._clock())
        return {"session": session_id.hex()}

    def open(self, label: str, request: bytes, identity: str | None) -> tuple[Session, dict[str, Any]]:
        """The session and body of a genuine request; its number counts as used from here on."""
        session_id, sealed = request[: wire.SESSION_BYTES], request[wire.SESSION_BYTES :]
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise PeerError("no such session; prove yourself first", kind="peer-no-session")
        body = wire.unseal(session.key, label, sealed, what="a request")
        self._check_member(session.member, identity)
        counter = body.get("counter")
        with self._lock:
            _use_number(session, counter)
            session.used_at = self._clock()
            if session_id in self._sessions:
                self._sessions.move_to_end(session_id)
        return session, body

    def _check_member(self, member: str, identity: str | None) -> None:
        if self._credentials.tls is not None and identity != member:
            raise PeerError(f"the certificate is not that of member {member!r}", kind="peer-refused")
        if self._admits is not None and not self._admits(member):
            raise PeerError(f"{member!r} is no member here", kind="peer-refused")

    def _cookie(self, head: str, client: str, nonce: str) -> str:
        return wire.mac(self._cookie_key, "cookie", wire.canonical([head, client, nonce])).hex()[:32]

    def _transcript(self, version: int, client: str, client_nonce: str, server_nonce: str) -> Transcript:
        own = self._credentials
        return Transcript(
            version=version,
            mode=own.mode,
            run_id=own.run_id,
            client=client,
            server=own.member,
            client_nonce=client_nonce,
            server_nonce=server_nonce,
        )

    def _forget_old(self) -> None:
        now = self._clock()
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if now - oldest.used_at <= self._session_s and len(self._sessions) < PEER_SESSIONS_MAX:
                return
            self._sessions.popitem(last=False)


def agreed_version(spoken: object) -> int:
    """The highest version that both sides speak. PeerError (`peer-wrong-version`) when there is none."""
    low, high = wire.PROTOCOLS
    if not isinstance(spoken, list) or len(spoken) != 2 or not all(wire.is_count(value) for value in spoken):
        raise PeerError("a handshake without versions", kind="peer-damaged")
    version = min(high, spoken[1])
    if version < max(low, spoken[0]):
        raise PeerError(
            f"no common version: this agent speaks {low} to {high}, the other {spoken[0]} to {spoken[1]}",
            kind="peer-wrong-version",
        )
    return int(version)


def _use_number(session: Session, counter: object) -> None:
    if not wire.is_count(counter) or counter in session.seen or counter <= session.highest - REPLAY_WINDOW:
        raise PeerError("a request that came before", kind="peer-replayed")
    session.seen.add(counter)
    session.highest = max(session.highest, counter)
    if len(session.seen) > 2 * REPLAY_WINDOW:
        session.seen = {number for number in session.seen if number > session.highest - REPLAY_WINDOW}


def _is_nonce(value: object) -> bool:
    return isinstance(value, str) and len(value) == _NONCE_CHARS and set(value) <= set("0123456789abcdef")
