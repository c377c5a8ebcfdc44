"""The agent's end of the local socket: who may talk to it, what they may ask, and until when it waits for a trainer.

In: connections. Out: answers, by a table of methods that other parts add to. One thread per connection, so that a long request of
one does not keep the others; handlers must bear that. Talks to its own user only. The trainer of another run or rank, an older
one than it has seen, and a second one while the first lives are refused.
"""

from __future__ import annotations

import select
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckpt.agent import wire
from ckpt.agent.admission import Admission, Session
from ckpt.agent.log import AgentLog
from ckpt.agent.wire import Message
from ckpt.config import Options
from ckpt.errors import AgentError, CheckpointError, InvalidInputError

_SERVER_TIMEOUT_S_MAX = 86400.0  # no request may ask for longer


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request."""

    method: str
    params: dict[str, Any]
    session: Session
    deadline: float  # of `time.monotonic`: then the other end has given up
    fds: list[int] = field(default_factory=list)  # that came with it; those left in the list are closed

    def integer(self, name: str, *, low: int = 0, high: int = (1 << 63) - 1) -> int:
        """A parameter."""
        value = self.params.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidInputError(
                f"`{name}` of {self.method} must be {low} to {high}, found {value!r}", kind="bad-params"
            )
        return value

    def text(self, name: str) -> str:
        """A parameter."""
        value = self.params.get(name)
        if not isinstance(value, str):
            raise InvalidInputError(f"`{name}` of {self.method} must be a text, found {value!r}", kind="bad-params")
        return value


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer that passes descriptors, which are closed here once they are sent."""

    result: dict[str, Any]
    fds: list[int]


Handler = Callable[[Call], "dict[str, Any] | Reply"]


class Server:
    """Accepts connections until it is stopped. `run` on one thread; the rest may be called from any.

    Attributes:
        handlers: method -> what answers it. Complete before `run`.
        open_methods: those that an observer may call, too.
    """

    def __init__(self, listener: socket.socket, admission: Admission, options: Options, log: AgentLog) -> None:
        self.handlers: dict[str, Handler] = {}
        self.open_methods: set[str] = set()
        self._listener, self._admission, self._options, self._log = listener, admission, options, log
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._wake, self._waken = socket.socketpair()
        self._stop_reason = ""

    def stop(self, reason: str) -> None:
        """End `run` soon. The first reason counts. Also from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        try:
            self._waken.send(b"x", socket.MSG_DONTWAIT)
        except OSError:
            pass  # it is awake already, or over

    def run(self, *, every_s: float, tick: Callable[[], None]) -> str:
        """Serve until `stop`; why. Calls `tick` every so many seconds."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        next_tick = time.monotonic() + every_s
        while not self._stop_reason:
            ready = [fd for fd, _ in poll.poll(max(0.0, next_tick - time.monotonic()) * 1000)]
            if self._listener.fileno() in ready:
                self._accept()
            if time.monotonic() >= next_tick:
                tick()
                next_tick = time.monotonic() + every_s
        return self._stop_reason

    def close(self, deadline: float) -> None:
        """Take no more requests, let those that are being answered end until `deadline`."""
        self._listener.close()
        with self._lock:
            running = dict(self._threads)
        for connection in running.values():
            _shutdown(connection, socket.SHUT_RD)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection in running.values():
            _shutdown(connection, socket.SHUT_RDWR)
        self._wake.close()
        self._waken.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, say: who asks sees its deadline
            self._log.tell("accept-failed", error=str(error))
            time.sleep(0.05)
            return
        thread = threading.Thread(target=self._serve, args=(connection,), name="ckpt-agent-connection", daemon=True)
        with self._lock:
            full = len(self._threads) >= self._options.agent_connections_max
            if not full:
                self._threads[thread] = connection
        if full:
            self._log.tell("refused", kind="too-many-connections")
            connection.close()
            return
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        session: Session | None = None
        try:
            session = self._greet(connection)
            while session is not None and self._answer_next(connection, session):
                pass
        except AgentError as error:  # of the connection: there is nobody to tell, or no common language
            self._log.tell("connection-failed", kind=error.kind, error=error.message)
        finally:
            if session is not None:
                self._admission.leave(session)
            connection.close()
            with self._lock:
                self._threads.pop(threading.current_thread(), None)

    def _greet(self, connection: socket.socket) -> Session | None:
        """The first message says who comes. None: refused, or gone."""
        peer = wire.peer_of(connection)
        number: Any = None
        try:
            self._admission.check_user(peer)
            message = self._receive(connection)
            if message is None:
                return None
            number = message.body.get("id")
            message.close_fds()
            if message.body.get("method") != "hello":
                raise AgentError("the first message must be hello", kind="bad-frame")
            session, result = self._admission.admit(peer, message.body.get("params") or {}, connection)
        except CheckpointError as error:
            self._log.tell("refused", kind=error.kind, error=error.message, peer_pid=peer.pid, peer_uid=peer.uid)
            self._send(connection, {"id": number, "error": wire.described(error)})
            return None
        self._send(connection, {"id": number, "result": result})
        return session

    def _answer_next(self, connection: socket.socket, session: Session) -> bool:
        """Answer one request. False: the connection is over."""
        if not self._wait(connection, session):
            return False
        try:
            message = self._receive(connection)
        except AgentError as error:
            if error.kind == "bad-frame":
                self._send(connection, {"id": None, "error": wire.described(error)})
            raise
        if message is None:
            return False
        try:
            return self._answer(connection, session, message)
        finally:
            message.close_fds()

    def _wait(self, connection: socket.socket, session: Session) -> bool:
        """Until there is something to read; a trainer may take its time. False: the trainer has died.

        A child that it forked may hold the socket open, so its process is watched as well.
        """
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if session.pidfd >= 0:
            poll.register(session.pidfd, select.POLLIN)
        limit_ms = None if session.is_trainer else self._options.agent_call_timeout_s * 1000
        ready = [fd for fd, _ in poll.poll(limit_ms)]
        return connection.fileno() in ready

    def _answer(self, connection: socket.socket, session: Session, message: Message) -> bool:
        number, method, params = (message.body.get(name) for name in ("id", "method", "params"))
        reply, goes_on = Reply(result={}, fds=[]), True
        try:
            deadline = time.monotonic() + _timeout_of(message.body.get("timeout_s"))
            if method == "detach":
                session.is_detached = True
                self._admission.leave(session)  # before the answer: the next trainer may come at once
                goes_on = False
            else:
                handler = self._handler(method, session)
                call = Call(
                    method=str(method),
                    params=params if isinstance(params, dict) else {},
                    session=session,
                    deadline=deadline,
                    fds=message.fds,
                )
                found = handler(call)
                reply = found if isinstance(found, Reply) else Reply(result=found, fds=[])
            body: dict[str, Any] = {"id": number, "result": reply.result}
        except CheckpointError as error:
            body, goes_on = {"id": number, "error": wire.described(error)}, error.kind != "unknown-method"
        except Exception as error:  # noqa: BLE001 - a bug in a handler: told to both ends, and the agent lives on
            self._log.tell("bug", method=str(method), error=traceback.format_exc())
            bug = AgentError(f"a bug in the agent: {type(error).__name__}: {error}", kind="bug")
            body = {"id": number, "error": wire.described(bug)}
        try:
            self._send(connection, body, reply.fds)
        finally:
            Message(body={}, fds=reply.fds).close_fds()
        return goes_on

    def _handler(self, method: Any, session: Session) -> Handler:
        if not isinstance(method, str) or method not in self.handlers:
            raise AgentError(f"the agent has no method {method!r}", kind="unknown-method")
        if method not in self.open_methods:
            self._admission.check_current(session)
        return self.handlers[method]

    def _receive(self, connection: socket.socket) -> Message | None:
        deadline = time.monotonic() + self._options.agent_message_timeout_s
        return wire.receive(connection, deadline=deadline, bytes_max=self._options.agent_message_bytes_max)

    def _send(self, connection: socket.socket, body: dict[str, Any], fds: list[int] | None = None) -> None:
        deadline = time.monotonic() + self._options.agent_message_timeout_s
        wire.send(connection, body, fds=fds or (), deadline=deadline, bytes_max=self._options.agent_message_bytes_max)


def _timeout_of(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _SERVER_TIMEOUT_S_MAX:
        raise InvalidInputError(
            f"`timeout_s` must be 0 to {_SERVER_TIMEOUT_S_MAX:.0f}, found {value!r}", kind="bad-params"
        )
    return float(value)


def _shutdown(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:
        pass  # it is over already
