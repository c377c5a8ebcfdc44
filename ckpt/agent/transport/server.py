"""Serve ranges of what an agent holds, and answer its control messages, over Arrow Flight.

In: a `Holder`, credentials, one address to bind to. Out: chunks straight from the holder's memory, each with its checksum, and a
trailer. Not a byte and no name leaves before the client proved that it knows the run's secret. Never takes bytes in.
gRPC does not come up in a process that was forked after gRPC was used: start agents with exec.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.flight as flight

from ckpt.agent.transport import wire
from ckpt.agent.transport.credentials import Credentials
from ckpt.agent.transport.gate import Gate
from ckpt.agent.transport.sessions import Session, Sessions
from ckpt.agent.transport.wire import Key
from ckpt.config import PEER_CHUNK_BYTES_LIMIT, PEER_HANDSHAKE_BYTES_MAX, PEER_MESSAGE_BYTES_MAX, Options
from ckpt.errors import CheckpointError, InvalidInputError, PeerError
from ckpt.kernels import crc32c, crc32c_combine

SCHEMA = pa.schema([pa.field("bytes", pa.uint8(), nullable=False)])


class Holder(Protocol):
    """What the rest of an agent gives to its server. Called from many threads."""

    def held(self, key: Key) -> memoryview | None:
        """The bytes of `key` while they are whole and will not change, else None.

        The same memory for the same key. It may only be used for something else after `held` has begun to answer
        None; a stream that was under way then ends without its trailer. Its memory stays referenced until that stream
        ends.
        """

    # Where there is one: `checksum(key, start, stop) -> int | None`, the CRC-32C that these bytes had when they were complete,
    # so that what has changed since is found by whoever gets it. Else it is taken as they are sent.

    def call(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The answer to a control message. A `CheckpointError` is told to the caller, kind and message."""


class Server:
    """Serves one holder on one address, from the constructor on. `close` may be called twice.

    Args:
        holder: asked for memory and answers.
        credentials: of this member.
        host: the one interface to bind to, by name or address; all interfaces only with `any_interface`.
        port: 0: a free one, see `port`.
        admits: which members may talk; None: all who know the secret.

    Raises:
        InvalidInputError: all interfaces without being told so, or TLS files that cannot be used.
        PeerError: `peer-unreachable`: the address cannot be bound.
    """

    def __init__(
        self,
        holder: Holder,
        credentials: Credentials,
        *,
        host: str,
        port: int = 0,
        options: Options | None = None,
        any_interface: bool = False,
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        options = options or Options()
        address = bind_address(host, any_interface=any_interface)
        sessions = Sessions(credentials, session_s=options.peer_session_s, clock=time.monotonic, admits=admits)
        text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        tls: dict[str, Any] = {}
        if credentials.tls is not None:
            ca, cert, key = credentials.tls.read()
            tls = {"tls_certificates": [(cert, key)], "verify_client": True, "root_certificates": ca}
        scheme = "grpc+tls" if tls else "grpc+tcp"
        try:
            self._flight = _FlightServer(holder, sessions, options, location=f"{scheme}://{text}", **tls)
        except (pa.ArrowException, OSError) as error:
            raise PeerError(f"cannot serve on {text}: {error}", kind="peer-unreachable") from error
        self.host = address
        self.port: int = self._flight.port

    @property
    def address(self) -> str:
        """`host:port`, for `Peer`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def streams(self) -> int:
        """Transfers and calls under way."""
        return self._flight.streams.inside() + self._flight.calls.inside()

    def counts(self) -> dict[str, int]:
        """Since the start: `transfers` that were sent whole, `bytes` sent, `calls`, and refusals by kind."""
        return self._flight.counted()

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Take no more requests, end streams at their next chunk, wait for them up to `timeout_s`."""
        self._flight.closing = True
        ending = threading.Thread(target=self._flight.shutdown, name="ckpt-agent-shutdown", daemon=True)
        ending.start()  # it waits for every stream; one to a stopped peer ends by its own deadline
        ending.join(timeout_s)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """The methods that Flight calls, each on a thread of its own. All others are refused by Flight's own defaults."""

    def __init__(self, holder: Holder, sessions: Sessions, options: Options, **arguments: Any) -> None:
        self._holder = holder
        self._sessions = sessions
        self._options = options
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.closing = False
        each, all_of_them = options.peer_streams_each_max, options.peer_streams_max
        self.streams = Gate(per_peer_max=each, max_of_all=all_of_them)
        self.calls = Gate(per_peer_max=each, max_of_all=all_of_them)
        super().__init__(**arguments)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.GeneratorStream:
        with self._told():
            session, body = self._sessions.open("get", ticket.ticket, _identity(context))
            key, start, stop = Key.of(body.get("key")), body.get("start"), body.get("stop")
            chunk_bytes, deadline_s = body.get("chunk_bytes"), body.get("deadline_s")
            if not (wire.is_count(start) and wire.is_count(stop) and wire.is_seconds(deadline_s)):
                raise InvalidInputError("a pull needs `start`, `stop` and `deadline_s`")
            if not wire.is_count(chunk_bytes) or not 0 < chunk_bytes <= PEER_CHUNK_BYTES_LIMIT:
                raise InvalidInputError(f"`chunk_bytes` must be 1 to {PEER_CHUNK_BYTES_LIMIT}, found {chunk_bytes!r}")
            stream = _Stream(self, session, body, key, time.monotonic() + deadline_s)
            return flight.GeneratorStream(SCHEMA, stream)

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[flight.Result]:
        with self._told():
            if action.type == wire.CALL:
                return iter([flight.Result(self._answer(context, action.body))])
            answers = {wire.HELLO: self._sessions.hello, wire.PROVE: self._sessions.prove}
            if action.type not in answers:
                raise PeerError("no such action", kind="peer-refused")
            if action.body.size > PEER_HANDSHAKE_BYTES_MAX:
                raise PeerError("a handshake is too long", kind="peer-damaged")
            body = wire.parsed(action.body.to_pybytes(), what="a handshake", bytes_max=PEER_HANDSHAKE_BYTES_MAX)
            return iter([flight.Result(wire.canonical(answers[action.type](body, _identity(context))))])

    def memory(self, key: Key) -> memoryview:
        """What the holder has of `key` now."""
        view = self._holder.held(key)
        if view is None:
            raise PeerError(f"this agent does not hold the {key}", kind="peer-not-held")
        return view.cast("B")

    def checksum(self, key: Key, start: int, stop: int) -> int | None:
        """What the holder knows of these bytes."""
        known = getattr(self._holder, "checksum", None)
        return None if known is None else known(key, start, stop)

    def count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)

    def counted(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong inside reaches the client as a kind and a message, and nothing else of ours."""
        try:
            if self.closing:
                raise PeerError("this agent is closing", kind="peer-busy")
            yield
        except Exception as error:
            known = isinstance(error, CheckpointError)
            kind = error.kind if isinstance(error, CheckpointError) else "peer-failed"
            self.count(**{kind: 1})
            raise flight_error(kind, str(error) if known else f"the agent failed: {type(error).__name__}") from error

    told = _told

    def _answer(self, context: flight.ServerCallContext, request: pa.Buffer) -> bytes:
        if request.size > wire.SESSION_BYTES + wire.MAC_BYTES + PEER_MESSAGE_BYTES_MAX:
            raise PeerError("a message is too long", kind="peer-damaged")
        session, body = self._sessions.open("call", request.to_pybytes(), _identity(context))
        name, payload = body.get("name"), body.get("payload")
        if not isinstance(name, str) or not isinstance(payload, dict):
            raise InvalidInputError("a call needs `name` and `payload`")
        self.calls.enter(session.member)
        try:
            answer = self._holder.call(name, payload)
            self.count(calls=1)
            return wire.seal(session.key, "answer", {"counter": body["counter"], "answer": answer})
        finally:
            self.calls.leave(session.member)


class _Stream:
    """Batches of one transfer. Flight asks for the next when the last has gone; owned by the thread of the call.

    A class and not a generator: its place is given back even when Flight drops it before asking for the first batch.
    """

    def __init__(self, server: _FlightServer, session: Session, body: dict[str, Any], key: Key, ends_at: float) -> None:
        self._inside = False
        self._server = server
        self._session = session
        self._counter: int = body["counter"]
        self._key = key
        self._start: int = body["start"]
        self._stop: int = body["stop"]
        self._chunk_bytes: int = body["chunk_bytes"]
        self._ends_at = ends_at
        view = server.memory(key)
        if not self._start <= self._stop <= view.nbytes:
            raise InvalidInputError(
                f"bytes [{self._start}, {self._stop}) are not inside the {key}, which has {view.nbytes} bytes",
                kind="bad-range",
            )
        self._place = _place(view)
        self._view = view[self._start : self._stop]
        self._sent = 0
        self._crc = 0
        server.streams.enter(session.member)
        self._inside = True

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> tuple[pa.RecordBatch, bytes]:
        if not self._inside:
            raise StopIteration
        try:
            with self._server.told():
                if time.monotonic() > self._ends_at:
                    raise PeerError("the transfer is past its deadline", kind="peer-late")
                return self._chunk() if self._sent < self._view.nbytes else self._end()
        except BaseException:
            self._leave()
            raise

    def __del__(self) -> None:
        self._leave()

    def _chunk(self) -> tuple[pa.RecordBatch, bytes]:
        part = self._view[self._sent : self._sent + self._chunk_bytes]
        at = self._start + self._sent
        crc = self._server.checksum(self._key, at, at + part.nbytes)
        if crc is None:
            crc = crc32c(part)
        head = wire.chunk_head(self._sent, part.nbytes, crc)
        self._sent += part.nbytes
        self._crc = crc32c_combine(self._crc, crc, part.nbytes)
        return _batch(part), head

    def _end(self) -> tuple[pa.RecordBatch, bytes]:
        # The memory may have been given to another step meanwhile: then nothing says that the transfer is whole.
        if _place(self._server.memory(self._key)) != self._place:
            raise PeerError(f"this agent no longer holds the {self._key}", kind="peer-not-held")
        made = wire.trailer(
            self._session.key,
            counter=self._counter,
            key=self._key,
            start=self._start,
            stop=self._stop,
            crc=self._crc,
        )
        self._server.count(transfers=1, bytes=self._sent)
        self._leave()  # before the client can know, so that its next pull finds the place free
        return _batch(memoryview(b"")), made

    def _leave(self) -> None:
        if self._inside:
            self._inside = False
            self._server.streams.leave(self._session.member)


def bind_address(host: str, *, any_interface: bool) -> str:
    """The address of `host` to bind to. InvalidInputError for all interfaces unless `any_interface`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0] if host else ""
    except OSError as error:
        raise InvalidInputError(f"cannot resolve the interface {host!r} to bind to: {error}") from None
    if not found or (ipaddress.ip_address(str(found).split("%")[0]).is_unspecified and not any_interface):
        raise InvalidInputError(
            f"an agent binds to one interface, found {host!r}", hints=("pass `any_interface=True` to serve on all",)
        )
    return str(found)


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there. Flight itself would share the port with whoever does."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last one may linger
            probe.bind(place)
        return True
    except OSError:
        return False


def flight_error(kind: str, message: str) -> flight.FlightError:
    """An error that carries kind and message over the network."""
    classes = {
        "peer-busy": flight.FlightUnavailableError,
        "peer-refused": flight.FlightUnauthorizedError,
        "peer-no-session": flight.FlightUnauthenticatedError,
    }
    shown = message[:1000]
    return classes.get(kind, flight.FlightServerError)(shown, wire.canonical({"kind": kind, "message": shown}))


def _identity(context: flight.ServerCallContext) -> str | None:
    """The first subject alternative name of the client's verified certificate; with no TLS, nothing."""
    return bytes(context.peer_identity()).decode(errors="replace") or None


def _place(view: memoryview) -> tuple[int, int]:
    return (pa.py_buffer(view).address if view.nbytes else 0), view.nbytes


def _batch(part: memoryview) -> pa.RecordBatch:
    """`part` as a batch over the same memory."""
    column = pa.Array.from_buffers(pa.uint8(), part.nbytes, [None, pa.py_buffer(part)], null_count=0)
    return pa.RecordBatch.from_arrays([column], schema=SCHEMA)
