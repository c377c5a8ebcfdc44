"""Who may talk: a secret of the run, with certificates or without, and the proofs that both sides know it.

In: 32 random bytes that the caller made and shared out. Out: proofs and session keys (HMAC-SHA256). The secret never crosses
the network and is never shown. Never does I/O but to read the files of certificates.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.agent.transport.wire import NAME_CHARS_MAX, canonical, mac
from ckpt.errors import InvalidInputError

SECRET_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files of mutual TLS, in PEM. The first subject alternative name of `cert` is the name of the member."""

    ca: Path  # who may sign the certificates of members
    cert: Path  # of this member, for both directions
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(CA, certificate, key). InvalidInputError when a file cannot be read."""
        try:
            ca, cert, key = (path.read_bytes() for path in (self.ca, self.cert, self.key))
        except OSError as error:
            raise InvalidInputError(f"cannot read a file of the TLS credentials: {error}") from error
        return ca, cert, key


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a member of a run needs to talk to the others. Without `tls` bytes cross the network in plain text."""

    run_id: str
    secret: bytes = field(repr=False)  # 32 random bytes, the same on all members, fresh for every run
    member: str  # name of this member; with TLS, the first subject alternative name of its certificate
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.secret, bytes) or len(self.secret) != SECRET_BYTES:
            raise InvalidInputError(f"the secret of a run is {SECRET_BYTES} random bytes")  # and never shown
        for name in ("run_id", "member"):
            if not 0 < len(getattr(self, name)) <= NAME_CHARS_MAX:
                raise InvalidInputError(f"`{name}` of credentials must be 1 to {NAME_CHARS_MAX} characters")

    @property
    def mode(self) -> str:
        """What the transport runs on: `tcp` or `tls`. Part of every proof, so that neither passes for the other."""
        return "tcp" if self.tls is None else "tls"


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What both sides saw of a handshake; a proof holds for exactly this."""

    version: int
    mode: str
    run_id: str
    client: str  # names of the members
    server: str
    client_nonce: str
    server_nonce: str

    def _bytes(self) -> bytes:
        return canonical([getattr(self, name) for name in self.__dataclass_fields__])

    def proof(self, secret: bytes, side: str) -> str:
        """That `side` (`client` or `server`) knows the secret."""
        return mac(secret, f"ckpt proof {side}", self._bytes()).hex()

    def proves(self, secret: bytes, side: str, proof: object) -> bool:
        """Whether `proof` is that of `side`."""
        return isinstance(proof, str) and hmac.compare_digest(proof.encode(), self.proof(secret, side).encode())

    def session_key(self, secret: bytes) -> bytes:
        """What signs the requests, answers and trailers of the session. Never sent."""
        return mac(secret, "ckpt session key", self._bytes())

    def session_id(self, secret: bytes) -> bytes:
        """Names the session: the same handshake, sent twice, opens one session."""
        return mac(secret, "ckpt session id", self._bytes())[:16]
