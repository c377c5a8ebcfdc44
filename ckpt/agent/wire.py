"""Messages on the socket between a trainer and its own agent.

In: a connected Unix stream socket, JSON documents, descriptors. Out: the same at the other end, whole or an error. A frame is the
magic `CKPA`, the length of the body (4 bytes, little-endian) and the body, JSON in UTF-8; descriptors come with its first byte.
Never waits beyond its deadline, never holds more than the limit, never keeps descriptors of a message that it refuses.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ckpt import errors
from ckpt.config import AGENT_MESSAGE_FDS_MAX
from ckpt.errors import AgentError, CheckpointError

MAGIC = b"CKPA"
_HEAD = struct.Struct("<4sI")
_CREDENTIALS = struct.Struct("3i")
_FD_BYTES = array.array("i").itemsize


@dataclass(frozen=True, kw_only=True)
class Message:
    """One frame, and the descriptors that came with it, which the receiver closes."""

    body: dict[str, Any]
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        """Close what nobody took. A descriptor that is taken is removed from `fds`."""
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who connected, as the kernel says."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end as it was when it connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return Peer(pid=pid, uid=uid)


def send(
    connection: socket.socket, body: dict[str, Any], *, fds: Sequence[int] = (), deadline: float, bytes_max: int
) -> None:
    """Send one message until `deadline` (of `time.monotonic`). AgentError: `agent-gone`, `timeout`, `too-long`."""
    data = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > bytes_max:
        raise AgentError(f"a message of {len(data):,} bytes, at most {bytes_max:,} are allowed", kind="too-long")
    if len(fds) > AGENT_MESSAGE_FDS_MAX:
        raise AgentError(
            f"{len(fds)} descriptors in a message, at most {AGENT_MESSAGE_FDS_MAX} are allowed", kind="too-long"
        )
    frame = memoryview(_HEAD.pack(MAGIC, len(data)) + data)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with _translated(connection):
        while frame:
            _set_timeout(connection, deadline)
            frame = frame[connection.sendmsg([frame], rights) :]
            rights = []


def receive(connection: socket.socket, *, deadline: float, bytes_max: int) -> Message | None:
    """One message; None when the other end closed between two. AgentError: `agent-gone`, `timeout`, `bad-frame`."""
    fds: list[int] = []
    try:
        head = _read(connection, _HEAD.size, deadline, fds)
        if not head:
            return None
        magic, nbytes = _HEAD.unpack(head)
        if magic != MAGIC:
            _refuse(f"expected a frame, found bytes {head[:4]!r}")
        if nbytes > bytes_max:
            _refuse(f"a frame of {nbytes:,} bytes, at most {bytes_max:,} are allowed")
        data = _read(connection, nbytes, deadline, fds)
        if len(data) < nbytes:
            raise AgentError("the other end closed in the middle of a message", kind="agent-gone")
        return Message(body=_parse(data), fds=fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _read(connection: socket.socket, nbytes: int, deadline: float, fds: list[int]) -> bytes:
    """So many bytes; none at all when the other end closed before the first. Descriptors go to `fds` at once."""
    out = bytearray()
    with _translated(connection):
        while len(out) < nbytes:
            _set_timeout(connection, deadline)
            data, rights, flags, _ = connection.recvmsg(
                nbytes - len(out), socket.CMSG_SPACE(AGENT_MESSAGE_FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, content in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(array.array("i", content[: len(content) // _FD_BYTES * _FD_BYTES]))
            if flags & socket.MSG_CTRUNC or len(fds) > AGENT_MESSAGE_FDS_MAX:
                _refuse(f"over {AGENT_MESSAGE_FDS_MAX} descriptors in a message")
            if not data:
                if out:
                    raise AgentError("the other end closed in the middle of a message", kind="agent-gone")
                break
            out += data
    return bytes(out)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise AgentError(f"a frame that is not JSON: {error}", kind="bad-frame") from None
    if not isinstance(body, dict):
        _refuse(f"a frame must hold an object, found {type(body).__name__}")
    return body


def _refuse(what: str) -> NoReturn:
    raise AgentError(f"not a message of ckpt: {what}", kind="bad-frame")


def _set_timeout(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


@contextlib.contextmanager
def _translated(connection: socket.socket) -> Any:
    try:
        yield
    except TimeoutError:
        raise AgentError("no message came through before the deadline", kind="timeout") from None
    except OSError as error:
        raise AgentError(f"the other end is gone: {error.strerror or error}", kind="agent-gone") from error


def described(error: CheckpointError) -> dict[str, Any]:
    """An error as JSON; `rebuilt` reads it."""
    return {"class": type(error).__name__, "kind": error.kind, "message": error.message, "hints": list(error.hints)}


def rebuilt(error: dict[str, Any]) -> CheckpointError:
    """The error that the agent raised; of a class that this program does not know, the base."""
    found = getattr(errors, str(error.get("class")), None)
    cls = found if isinstance(found, type) and issubclass(found, CheckpointError) else CheckpointError
    hints = tuple(map(str, error.get("hints") or ()))
    return cls(str(error.get("message")), kind=str(error.get("kind")), hints=hints)
