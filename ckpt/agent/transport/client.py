"""Pull ranges of what another agent holds into memory of ours, and exchange small control messages with it.

In: an address, credentials, keys and ranges, the memory to fill. Out: CRC-32C checksums of what was verified, or a `PeerError`;
then the memory that was to be filled is void. Never waits past the deadlines it was given, never writes to the memory after it
returned, never takes the end of a stream for its whole.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
from numpy.typing import NDArray

from ckpt.agent.transport import wire
from ckpt.agent.transport.credentials import Credentials, Transcript
from ckpt.agent.transport.errand import Errand, Overdue
from ckpt.agent.transport.failures import peer_error
from ckpt.agent.transport.ring import Ring
from ckpt.agent.transport.wire import Key
from ckpt.config import PEER_MESSAGE_BYTES_MAX, PEER_MESSAGE_OVERHEAD_BYTES, Options
from ckpt.errors import InvalidInputError, PeerError
from ckpt.kernels import crc32c, crc32c_combine, pack

Value = TypeVar("Value")

_GRACE_S = 0.5  # gRPC's deadline comes after ours, which says why
_FRAME_BYTES = 1 << 20  # of HTTP/2; the default of 16 KiB costs a tenth more CPU
_CHUNKS_PER_STREAM = 2  # in memory at a time: one that arrives, one that is put in place
_CHUNKS_AHEAD = 1  # that gRPC may take in while one is put in place; more cost memory and brought nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Range:
    """One range to pull."""

    key: Key
    start: int  # bytes of what the peer holds under `key`
    stop: int  # exclusive
    into: memoryview  # writable, stop - start bytes


@dataclass(frozen=True, kw_only=True)
class _Session:
    id: bytes
    key: bytes


class Peer:
    """Another agent, as seen from here. Connects when it is first used, and again when that is needed.

    Any thread may call any method. Not for use in forked children.

    Args:
        address: `host:port`, as `Server.address` says it.
        credentials: of this member.
        member: the name that the peer must prove to have; with TLS its certificate must carry it. None: any member of
            the run, and with TLS the host of `address`.
    """

    def __init__(
        self, address: str, credentials: Credentials, options: Options | None = None, *, member: str | None = None
    ) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise InvalidInputError(f"the address of a peer is host:port, found {address!r}")
        self.address = address
        self._credentials = credentials
        self._options = options or Options()
        self._member = member
        self._tls = None if credentials.tls is None else credentials.tls.read()
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of the next four
        self._client: flight.FlightClient | None = None
        self._session: _Session | None = None
        self._counter = 0
        self._running: set[Errand[Any]] = set()
        self._connecting = threading.Lock()  # one handshake at a time

    def pull(self, key: Key, start: int, stop: int, *, into: memoryview, deadline_s: float) -> int:
        """Fill `into` with bytes [start, stop) of `key`; their CRC-32C, as the peer's trailer and our own sum agree.

        Raises:
            PeerError: by kind `peer-unreachable`, `peer-stalled` (no chunk for `peer_progress_s`), `peer-late` (past
                `deadline_s`), `peer-truncated`, `peer-damaged`, `peer-refused`, `peer-untrusted`, `peer-wrong-version`,
                `peer-busy`, `peer-not-held`, `peer-failed`. Then all of `into` is void.
        """
        wanted = Range(key=key, start=start, stop=stop, into=into)
        return self._pull(key, start, _target(wanted), time.monotonic() + deadline_s, _Stop())

    def pull_through(self, key: Key, start: int, stop: int, ring: Ring, *, deadline_s: float) -> int:
        """As `pull`, chunk by chunk through `ring`, while another thread reads that. An error is the reader's, too."""
        try:
            return self._pull(key, start, _Through(ring, stop - start), time.monotonic() + deadline_s, _Stop())
        except BaseException as error:
            ring.fail(error)
            raise

    def pull_many(self, ranges: Sequence[Range], *, deadline_s: float) -> list[int]:
        """The CRC-32C of each range, several in flight within `peer_pull_bytes_max`. On an error all of them are void."""
        ends_at, stop = time.monotonic() + deadline_s, _Stop()
        targets = [_target(wanted) for wanted in ranges]
        room = self._options.peer_pull_bytes_max // (_CHUNKS_PER_STREAM * self._options.peer_chunk_bytes)
        lanes = max(1, min(room, self._options.peer_streams_each_max, len(ranges)))

        def one(wanted: Range, target: _Target) -> int:
            try:
                return self._pull(wanted.key, wanted.start, target, ends_at, stop)
            except BaseException:
                stop.set()  # the others as well: what they bring is void
                raise

        with ThreadPoolExecutor(lanes, thread_name_prefix="ckpt-peer-lane") as pool:
            futures = [pool.submit(one, wanted, target) for wanted, target in zip(ranges, targets, strict=True)]
            try:
                errors = [future.exception() for future in futures]
            except BaseException:
                stop.set()
                raise
        first = next((error for error in errors if error is not None and not _was_stopped(error)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def call(self, name: str, payload: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The peer's answer to a control message. The peer sees it at most once; after an error, perhaps once."""
        ends_at = time.monotonic() + deadline_s

        def talk(client: flight.FlightClient, session: _Session) -> dict[str, Any]:
            counter = self._next_number()
            body = {"counter": counter, "name": name, "payload": payload}
            request = session.id + wire.seal(session.key, "call", body)
            data = self._action(client, wire.CALL, request, deadline_s, ends_at)
            answered = wire.unseal(session.key, "answer", data, what=f"the answer of {self.address}")
            if answered.get("counter") != counter or not isinstance(answered.get("answer"), dict):
                raise PeerError(f"{self.address} answered another message", kind="peer-damaged")
            answer: dict[str, Any] = answered["answer"]
            return answer

        return self._with_session(talk, ends_at)

    def close(self) -> None:
        """Let go of the connection, and end what is under way on it (`peer-stopped`). The next use makes a new one."""
        with self._lock:
            self._client, self._session = None, None
            running = list(self._running)
        for errand in running:
            errand.stop("stopped")

    # Sessions

    def _with_session(self, talk: Callable[[flight.FlightClient, _Session], Value], ends_at: float) -> Value:
        """`talk(client, session)`, once more with a fresh session when the peer no longer knows ours."""
        if os.getpid() != self._pid:
            raise InvalidInputError("this Peer was made before a fork; gRPC works only in the process that made it")
        for attempt in (1, 2):
            client, session = self._connected(ends_at)
            try:
                return talk(client, session)
            except PeerError as error:
                if error.kind in ("peer-unreachable", "peer-stalled", "peer-truncated", "peer-no-session"):
                    self._drop(client)  # gRPC would wait before it connects again
                if error.kind != "peer-no-session" or attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _drop(self, client: flight.FlightClient) -> None:
        with self._lock:
            if self._client is client:
                self._client, self._session = None, None

    def _next_number(self) -> int:
        with self._lock:
            self._counter += 1
            return self._counter

    def _connected(self, ends_at: float) -> tuple[flight.FlightClient, _Session]:
        found = self._current()
        if found is not None:
            return found
        if not self._connecting.acquire(timeout=max(0.0, ends_at - time.monotonic())):
            raise PeerError(f"no connection to {self.address} in time", kind="peer-unreachable")
        try:
            found = self._current()
            if found is None:
                client = self._new_client()
                found = client, self._shake_hands(client, min(ends_at, time.monotonic() + self._options.peer_connect_s))
                with self._lock:
                    self._client, self._session = found
            return found
        finally:
            self._connecting.release()

    def _current(self) -> tuple[flight.FlightClient, _Session] | None:
        with self._lock:
            if self._client is None or self._session is None:
                return None
            return self._client, self._session

    def _new_client(self) -> flight.FlightClient:
        tls: dict[str, Any] = {}
        if self._tls is not None:
            ca, cert, key = self._tls
            tls = {"tls_root_certs": ca, "cert_chain": cert, "private_key": key}
            if self._member is not None:
                tls["override_hostname"] = self._member
        try:
            return flight.FlightClient(
                f"{'grpc+tls' if tls else 'grpc+tcp'}://{self.address}",
                generic_options=[
                    ("grpc.use_local_subchannel_pool", 1),  # or the wait after a failure is shared by all clients
                    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is not meant for agents
                    ("grpc.max_receive_message_length", self._message_bytes_max()),
                    ("grpc.http2.bdp_probe", 0),  # or gRPC reads ahead as far as it likes: 240 MiB were seen
                    ("grpc.http2.lookahead_bytes", _CHUNKS_AHEAD * self._options.peer_chunk_bytes),
                    ("grpc.http2.max_frame_size", _FRAME_BYTES),
                ],
                **tls,
            )
        except (pa.ArrowException, OSError) as error:
            raise peer_error(error, self.address, started=False) from error

    def _message_bytes_max(self) -> int:
        return max(self._options.peer_chunk_bytes, PEER_MESSAGE_BYTES_MAX) + PEER_MESSAGE_OVERHEAD_BYTES

    def _shake_hands(self, client: flight.FlightClient, ends_at: float) -> _Session:
        """Prove to each other that both know the secret; see ckpt.agent.transport.sessions for the other side."""
        own, nonce, limit_s = self._credentials, secrets.token_hex(32), self._options.peer_connect_s
        hello = {"protocol": list(wire.PROTOCOLS), "run_id": own.run_id, "member": own.member, "nonce": nonce}
        try:
            said = self._shake(client, wire.HELLO, hello, limit_s, ends_at)
            transcript = self._transcript(said, nonce)
            proof = {
                "version": transcript.version,
                "member": own.member,
                "client_nonce": nonce,
                "server_nonce": transcript.server_nonce,
                "proof": transcript.proof(own.secret, "client"),
            }
            opened = self._shake(client, wire.PROVE, proof, limit_s, ends_at)
        except PeerError as error:
            if error.kind in ("peer-stalled", "peer-late"):
                message = f"{self.address} did not answer within {limit_s:g} s"
                raise PeerError(message, kind="peer-unreachable") from error
            raise
        session_id = transcript.session_id(own.secret)
        if opened.get("session") != session_id.hex():
            raise PeerError(f"{self.address} opened another session", kind="peer-damaged")
        return _Session(id=session_id, key=transcript.session_key(own.secret))

    def _shake(
        self, client: flight.FlightClient, kind: str, body: dict[str, Any], limit_s: float, ends_at: float
    ) -> dict[str, Any]:
        data = self._action(client, kind, wire.canonical(body), limit_s, ends_at)
        return wire.parsed(data, what=f"the handshake of {self.address}")

    def _transcript(self, said: dict[str, Any], nonce: str) -> Transcript:
        """What the server said to our hello, once its proof is good."""
        own, (low, high) = self._credentials, wire.PROTOCOLS
        version, server, server_nonce = said.get("version"), said.get("member"), said.get("nonce")
        if not isinstance(server, str) or not isinstance(server_nonce, str) or not wire.is_count(version):
            raise PeerError(f"{self.address} answered no handshake", kind="peer-damaged")
        if not low <= version <= high:
            raise PeerError(f"{self.address} chose version {version}", kind="peer-wrong-version")
        transcript = Transcript(
            version=version,
            mode=own.mode,
            run_id=own.run_id,
            client=own.member,
            server=server,
            client_nonce=nonce,
            server_nonce=server_nonce,
        )
        if not transcript.proves(own.secret, "server", said.get("proof")):
            raise PeerError(f"{self.address} cannot prove that it belongs to the run", kind="peer-untrusted")
        if self._member is not None and server != self._member:
            raise PeerError(f"{self.address} is {server!r}, expected {self._member!r}", kind="peer-untrusted")
        return transcript

    # Talking

    def _action(self, client: flight.FlightClient, kind: str, body: bytes, limit_s: float, ends_at: float) -> bytes:
        """The one result of an action."""

        def work(_: Errand[bytes]) -> bytes:
            try:
                results = client.do_action(flight.Action(kind, body), _call_options(ends_at))
                found: list[bytes] = [result.body.to_pybytes() for result in _at_most(results, 2)]
            except (pa.ArrowException, OSError) as error:
                raise peer_error(error, self.address, started=False) from error
            if len(found) != 1:
                raise PeerError(f"{self.address} gave {len(found)} results, expected 1", kind="peer-damaged")
            return found[0]

        return self._bounded(Errand(work, name="ckpt-peer-call"), progress_s=limit_s, ends_at=ends_at)

    def _pull(self, key: Key, start: int, target: _Target, ends_at: float, stop: _Stop) -> int:
        def talk(client: flight.FlightClient, session: _Session) -> int:
            counter = self._next_number()
            body = {
                "counter": counter,
                "key": key.fields(),
                "start": start,
                "stop": start + target.nbytes,
                "chunk_bytes": target.chunk_bytes or self._options.peer_chunk_bytes,
                "deadline_s": max(0.001, ends_at - time.monotonic()),
            }
            ticket = flight.Ticket(session.id + wire.seal(session.key, "get", body))
            transfer = _Transfer(
                client=client, ticket=ticket, session=session, key=key, start=start, target=target, counter=counter,
                address=self.address, ends_at=ends_at,
            )  # fmt: skip
            errand = Errand(transfer.run, name="ckpt-peer-pull")
            stop.also(errand)
            return self._bounded(errand, progress_s=self._options.peer_progress_s, ends_at=ends_at)

        return self._with_session(talk, ends_at)

    def _bounded(self, errand: Errand[Value], *, progress_s: float, ends_at: float) -> Value:
        started = time.monotonic()
        with self._lock:
            self._running.add(errand)
        try:
            return errand.run(progress_s=progress_s, ends_at=ends_at)
        except Overdue as overdue:
            spent = time.monotonic() - started
            messages = {
                "stalled": f"{self.address} made no progress for {progress_s:g} s",
                "late": f"{self.address} was not done after {spent:.1f} s",
            }
            message = messages.get(overdue.why, f"a transfer from {self.address} was given up")
            raise PeerError(message, kind=f"peer-{overdue.why}") from None
        finally:
            with self._lock:
                self._running.discard(errand)


class _Stop:
    """Ends all transfers of one call together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errands: list[Errand[Any]] = []
        self._stopped = False

    def also(self, errand: Errand[Any]) -> None:
        with self._lock:
            self._errands.append(errand)
            if self._stopped:
                errand.stop("stopped")

    def set(self) -> None:
        with self._lock:
            self._stopped = True
            for errand in self._errands:
                errand.stop("stopped")


class _Target(Protocol):
    """What a transfer fills."""

    nbytes: int
    chunk_bytes: int | None  # of every chunk but the last; None: as the options say, and whatever comes

    def wait_for_room(self, errand: Errand[Any]) -> None:
        """Until the next chunk may come."""

    def fits(self, at: int, nbytes: int) -> bool:
        """Whether there is a chunk of this size at byte `at`."""

    def put(self, at: int, source: NDArray[np.uint8], errand: Errand[Any]) -> int:
        """Put a chunk in its place, unless it stays where it is; the CRC-32C of what is there."""

    def landed(self, source: NDArray[np.uint8]) -> None:
        """The chunk put last is what was sent."""


class _Whole:
    """All of a range at once, in memory of the caller's."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory, self.nbytes = memory, len(memory)
        self.chunk_bytes: int | None = None

    def wait_for_room(self, errand: Errand[Any]) -> None:
        pass

    def fits(self, at: int, nbytes: int) -> bool:
        return 0 < nbytes <= self.nbytes - at

    def put(self, at: int, source: NDArray[np.uint8], errand: Errand[Any]) -> int:
        with errand.writing():
            return _copy(source, self._memory[at : at + len(source)])

    def landed(self, source: NDArray[np.uint8]) -> None:
        pass


class _Through:
    """Chunk after chunk through a ring, where it stays in the memory in which it came."""

    def __init__(self, ring: Ring, nbytes: int) -> None:
        self._ring, self.nbytes = ring, nbytes
        self.chunk_bytes: int | None = ring.chunk_bytes

    def wait_for_room(self, errand: Errand[Any]) -> None:
        self._ring.wait_for_room(errand.beat)

    def fits(self, at: int, nbytes: int) -> bool:
        return 0 < nbytes == min(self._ring.chunk_bytes, self.nbytes - at)

    def put(self, at: int, source: NDArray[np.uint8], errand: Errand[Any]) -> int:
        return crc32c(source)

    def landed(self, source: NDArray[np.uint8]) -> None:
        self._ring.land(source)


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    """One stream of chunks, on the thread of an errand."""

    client: flight.FlightClient
    ticket: flight.Ticket
    session: _Session
    key: Key
    start: int
    target: _Target
    counter: int
    address: str
    ends_at: float

    def run(self, errand: Errand[int]) -> int:
        """The CRC-32C of all bytes, after the trailer said the same."""
        reader, started = None, False
        try:
            reader = self.client.do_get(self.ticket, _call_options(self.ends_at))
            errand.on_cancel(reader.cancel)
            at = crc = 0
            while True:
                self.target.wait_for_room(errand)
                chunk = reader.read_chunk()
                head = chunk.app_metadata.to_pybytes() if chunk.app_metadata is not None else b""
                if wire.is_trailer(head):
                    return self._checked(head, at, crc)
                part = self._land(errand, chunk.data, head, at)
                del chunk  # or it would lie in memory until the next one is whole
                crc, at, started = crc32c_combine(crc, part[1], part[0]), at + part[0], True
                errand.beat()
        except StopIteration:
            raise PeerError(f"{self.address} ended a transfer without its trailer", kind="peer-truncated") from None
        except (pa.ArrowException, OSError) as error:
            raise peer_error(error, self.address, started=started) from error
        finally:
            if reader is not None:
                reader.cancel()

    def _land(self, errand: Errand[int], batch: pa.RecordBatch, head: bytes, at: int) -> tuple[int, int]:
        """Put one chunk in place and check it on the way: (bytes, CRC-32C)."""
        told, source = wire.read_chunk_head(head), _bytes_of(batch)
        is_next = source is not None and told is not None and told[:2] == (at, len(source))
        if source is None or told is None or not is_next or not self.target.fits(at, len(source)):
            raise PeerError(f"{self.address} sent something else than chunk at byte {at}", kind="peer-damaged")
        crc = self.target.put(at, source, errand)
        if crc != told[2]:
            raise PeerError(
                f"chunk at byte {at} of the {self.key} from {self.address} is damaged: "
                f"expected crc32c {told[2]:08x}, found {crc:08x}",
                kind="peer-damaged",
            )
        self.target.landed(source)
        return len(source), crc

    def _checked(self, head: bytes, at: int, crc: int) -> int:
        nbytes = self.target.nbytes
        expected = wire.trailer(
            self.session.key, counter=self.counter, key=self.key, start=self.start, stop=self.start + nbytes, crc=crc
        )
        if at != nbytes:
            raise PeerError(f"{self.address} ended a transfer after {at} of {nbytes} bytes", kind="peer-truncated")
        if not secrets.compare_digest(head, expected):
            raise PeerError(f"the trailer of the {self.key} from {self.address} is wrong", kind="peer-damaged")
        return crc


def _target(wanted: Range) -> _Whole:
    view = np.frombuffer(wanted.into, np.uint8)
    if not view.flags.writeable or len(view) != wanted.stop - wanted.start or wanted.start < 0:
        raise InvalidInputError(
            f"bytes [{wanted.start}, {wanted.stop}) need writable memory of their size, found {len(view)} bytes"
        )
    return _Whole(view)


def _call_options(ends_at: float) -> flight.FlightCallOptions:
    return flight.FlightCallOptions(timeout=max(0.0, ends_at - time.monotonic()) + _GRACE_S)


def _at_most(results: Any, count: int) -> list[Any]:
    found: list[Any] = []
    for result in results:
        found.append(result)
        if len(found) == count:
            break
    return found


def _was_stopped(error: BaseException) -> bool:
    return isinstance(error, PeerError) and error.kind == "peer-stopped"


def _bytes_of(batch: pa.RecordBatch | None) -> NDArray[np.uint8] | None:
    """The memory of the one column of bytes, or None when it is anything else."""
    if batch is None or batch.num_columns != 1 or batch.schema.field(0).type != pa.uint8():
        return None
    column = batch.column(0)
    data = column.buffers()[1]
    if column.offset or column.null_count or data is None or data.size < len(column):
        return None
    return np.frombuffer(data, np.uint8, len(column))


def _copy(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> int:
    """Copy, and the CRC-32C of what was written, in one pass."""
    nbytes, address = len(source), source.ctypes.data
    sums = pack(
        target,
        source=np.array([address], np.uint64),
        source_limit=np.array([address + nbytes], np.uint64),
        position=np.zeros(1, np.int64),
        lengths=np.array([[nbytes]], np.int64),
        source_strides=np.ones((1, 1), np.int64),
        itemsize=np.ones(1, np.int64),
        segment_starts=np.zeros(1, np.int64),
        segment_stops=np.array([nbytes], np.int64),
    )
    return int(sums[0])
