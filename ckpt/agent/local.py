"""The trainer's end of the socket to its own agent.

In: an identity and an epoch. Out: answers of the agent, and its shared memory mapped here. One request at a time, each with a
deadline; after an error in the connection itself every call says so, and the caller connects again. Any thread may call. A child
that was forked has neither the connection nor the memory.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckpt.agent import wire
from ckpt.agent.header import HEADER_BYTES
from ckpt.agent.identity import PROTOCOL, Identity
from ckpt.config import Options
from ckpt.errors import AgentError, CheckpointError, DamagedError, InvalidInputError

Role = Literal["trainer", "observer"]
_TOUCH_BYTES_PER_S_MIN = 50e6  # of a first touch: 0.2 to 1.4 GB/s were measured
_CLOSED = "the connection to the agent is closed"


@dataclass(frozen=True, kw_only=True)
class Described:
    """A segment as the agent tells it."""

    name: str
    state: str
    generation: int
    step: int
    attempt: str
    epoch: int
    world: int
    capacity_bytes: int
    image_bytes: int
    image_crc: int | None
    populate_s: float

    @staticmethod
    def of(document: dict[str, Any]) -> Described:
        """From the agent's answer; fields of newer agents are passed over."""
        return Described(**{name: document[name] for name in Described.__dataclass_fields__})


class Mapped:
    """The payload of a segment in this process: the very pages that the agent holds. Not inherited by forked children.

    The memory stays valid when the agent dies; the next agent passes the same pages (`is_same` tells).
    """

    def __init__(self, fd: int, described: Described) -> None:
        """
        Args:
            fd: of the segment; taken, also when this raises.
        """
        self.name = described.name
        try:
            found = os.fstat(fd)
            if found.st_size != HEADER_BYTES + described.capacity_bytes:
                raise DamagedError(
                    f"segment `{self.name}` has another size: expected {HEADER_BYTES + described.capacity_bytes} bytes, "
                    f"found {found.st_size}",
                    kind="wrong-size",
                )
            self._file = (found.st_dev, found.st_ino)
            self._map = mmap.mmap(fd, described.capacity_bytes, offset=HEADER_BYTES)
        finally:
            os.close(fd)
        self._map.madvise(mmap.MADV_DONTFORK)
        self._map.madvise(mmap.MADV_DONTDUMP)

    @property
    def memory(self) -> mmap.mmap:
        """The bytes, writable: `np.frombuffer(mapped.memory, np.uint8)` is an array over them."""
        return self._map

    def is_same(self, other: Mapped) -> bool:
        """Whether the two are the same pages."""
        return self._file == other._file

    def close(self) -> None:
        """Unmap. BufferError while an array lies over it. May be called twice."""
        self._map.close()


class Client:
    """A connection to an agent. Made by `connect`; `close()` may be called twice."""

    def __init__(self, connection: socket.socket, identity: Identity, options: Options) -> None:
        self.identity, self._options = identity, options
        self._connection: socket.socket | None = connection
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._pid = os.getpid()
        self._agent_pid = wire.peer_of(connection).pid
        self.agent: dict[str, Any] = {}  # what the agent said of itself: pid, incarnation, epoch, protocol
        _clients.add(self)

    @property
    def is_open(self) -> bool:
        """Whether the agent can still be asked: False after an error in the connection, and after `close`."""
        return self._connection is not None

    def hello(self, *, epoch: int, role: Role, timeout_s: float | None = None) -> None:
        """Say who this is; AgentError with the reason where the agent wants somebody else."""
        mine = {"run_id": self.identity.run_id.hex, "rank": self.identity.rank, "world": self.identity.world}
        said = {**mine, "protocol": list(PROTOCOL), "epoch": epoch, "role": role}
        self.agent, _ = self.call("hello", said, timeout_s=timeout_s)

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> tuple[dict[str, Any], list[int]]:
        """Ask, and wait for the answer and the descriptors that come with it, which the caller closes.

        Raises:
            CheckpointError: of the class and kind that the agent raised.
            AgentError: `agent-gone`, `timeout`, `bad-frame`: the connection is closed then.
        """
        timeout_s = self._options.agent_call_timeout_s if timeout_s is None else timeout_s
        if os.getpid() != self._pid:
            raise InvalidInputError("the connection to the agent belongs to the process that made it", kind="forked")
        with self._lock:
            if self._connection is None:
                raise AgentError(_CLOSED, kind="agent-gone")
            try:
                message = self._exchange(self._connection, method, params or {}, fds, time.monotonic() + timeout_s)
            except BaseException:
                self._drop()  # an answer that comes late must not be taken for that of the next request
                raise
        if (error := message.body.get("error")) is not None:
            message.close_fds()
            raise wire.rebuilt(error)
        return message.body["result"], message.fds

    def _exchange(
        self, connection: socket.socket, method: str, params: dict[str, Any], fds: Sequence[int], deadline: float
    ) -> wire.Message:
        number, bytes_max = next(self._ids), self._options.agent_message_bytes_max
        body = {"id": number, "method": method, "params": params, "timeout_s": max(0.0, deadline - time.monotonic())}
        try:
            wire.send(connection, body, fds=fds, deadline=deadline, bytes_max=bytes_max)
        except AgentError as error:
            if error.kind != "agent-gone":  # else it may have said why before it closed
                raise
        message = wire.receive(connection, deadline=deadline, bytes_max=bytes_max)
        if message is None:
            raise AgentError("the agent closed the connection", kind="agent-gone")
        if message.body.get("id") not in (number, None) or not ("result" in message.body) ^ ("error" in message.body):
            message.close_fds()
            raise AgentError(f"an answer to another request: {message.body.get('id')}, not {number}", kind="bad-frame")
        return message

    # What a trainer asks of its memory.

    def reserve(self, image_bytes: int, *, timeout_s: float | None = None) -> list[Mapped]:
        """Room for two images of so many bytes, touched and mapped here; what the agent holds already is used again.

        Raises:
            BudgetError: there is no memory for that; nothing was taken.
        """
        if timeout_s is None:
            timeout_s = self._options.agent_call_timeout_s + 2 * image_bytes / _TOUCH_BYTES_PER_S_MIN
        result, fds = self.call("reserve", {"image_bytes": image_bytes}, timeout_s=timeout_s)
        return _map_all(result, fds)

    def attach(self) -> list[Mapped]:
        """Map what the agent holds, the images of an earlier trainer among it."""
        return _map_all(*self.call("attach"))

    def segments(self) -> list[Described]:
        """What the agent holds."""
        return [Described.of(one) for one in self.status()["segments"]]

    def begin(self, step: int, attempt: str) -> Described:
        """The segment to write the image of `step` into; AgentError `busy` while none is free."""
        return Described.of(self.call("begin", {"step": step, "attempt": attempt})[0])

    def seal(
        self, began: Described, image_bytes: int, *, image_crc: int | None = None, timeout_s: float | None = None
    ) -> Described:
        """The image is complete. Without a checksum the agent takes it."""
        params = {
            "name": began.name,
            "generation": began.generation,
            "image_bytes": image_bytes,
            "image_crc": image_crc,
        }
        return Described.of(self.call("seal", params, timeout_s=timeout_s)[0])

    def abandon(self, began: Described) -> None:
        """The image will not be completed."""
        self.call("abandon", {"name": began.name, "generation": began.generation})

    def ping(self) -> float:
        """Renew the lease; seconds that are left of it."""
        return float(self.call("ping")[0]["lease_left_s"])

    def status(self) -> dict[str, Any]:
        """What the agent is and holds; docs/reference/agent.md."""
        return self.call("status")[0]

    def stop(self) -> None:
        """End the agent. What it holds in memory is lost."""
        self.call("stop")

    def bye(self) -> None:
        """The job is over: end the agent, and close."""
        self.call("bye")
        self.close()

    @property
    def agent_pid(self) -> int:
        """The process that listens, as the kernel says; 0 where it cannot be seen from here."""
        return self._agent_pid

    def drop(self) -> None:
        """End the connection at once, whoever waits for an answer on it: `agent-gone` for them. Any thread."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._lock.acquire(timeout=1.0):
            try:
                self._drop()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Leave; the agent stays, until its lease is over. Memory that is still mapped must not be written any more."""
        with self._lock:
            if self._connection is not None and os.getpid() == self._pid:
                try:
                    self._exchange(self._connection, "detach", {}, (), time.monotonic() + 1.0).close_fds()
                except CheckpointError:
                    pass  # it is gone, or finds out by itself
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def connect(
    path: Path,
    identity: Identity,
    options: Options,
    *,
    epoch: int = 0,
    role: Role = "trainer",
    timeout_s: float | None = None,
) -> Client:
    """A connection to the agent that listens at `path`.

    Args:
        epoch: of the trainer, higher at each restart of the job; the agent refuses one that is lower than it has seen.
        role: `observer`: only looks; neither holds a lease nor is refused for its epoch.

    Raises:
        AgentError: `no-agent`: nobody listens there; or the agent's reason to refuse.
    """
    timeout_s = options.agent_call_timeout_s if timeout_s is None else timeout_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        raise AgentError(f"no agent listens at `{path}`", kind="no-agent") from None
    except TimeoutError:
        connection.close()
        raise AgentError(f"the agent at `{path}` did not answer in time", kind="timeout") from None
    except OSError as error:
        connection.close()
        raise AgentError(f"the agent at `{path}` cannot be reached: {error}", kind="agent-gone") from error
    if (uid := wire.peer_of(connection).uid) != os.geteuid():
        connection.close()
        raise AgentError(f"who listens at `{path}` is user {uid}, not {os.geteuid()}", kind="other-user")
    client = Client(connection, identity, options)
    try:
        client.hello(epoch=epoch, role=role, timeout_s=timeout_s)
    except BaseException:
        client._drop()
        raise
    return client


def _map_all(result: dict[str, Any], fds: list[int]) -> list[Mapped]:
    described = [Described.of(one) for one in result["segments"]]
    if len(described) != len(fds):
        while fds:
            os.close(fds.pop())
        raise AgentError(f"the agent told of {len(described)} segments and passed another number", kind="bad-frame")
    out: list[Mapped] = []
    try:
        for one in described:
            out.append(Mapped(fds.pop(0), one))
    except BaseException:
        for mapped in out:
            mapped.close()
        for fd in fds:
            os.close(fd)
        raise
    return out


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _leave_in_child() -> None:
    """A forked child must not keep the connection open: the agent would not see that the trainer is gone."""
    for client in list(_clients):
        client._drop()


os.register_at_fork(after_in_child=_leave_in_child)
