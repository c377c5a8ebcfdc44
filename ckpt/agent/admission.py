"""Whose agent this is: which trainer may use it, and until when it waits for one.

In: who connects and what they say of themselves. Out: a session, or AgentError with the reason. Rules:

- another user, another run, another rank: refused, always;
- protocol: the same major number, and minor numbers at most one apart; the lower one is spoken, fields unknown to it passed over;
- an epoch lower than the newest seen: refused (`stale-epoch`): a restarted job is not to be disturbed by what is left of the old;
- another world size: refused in the same epoch (`other-world`), welcome in a higher one: images keep the world that wrote them;
- a second trainer while the process of the first lives: refused (`held`): both would have the memory mapped;
- who only looks renews nothing; who reads what the agent holds may ask it to stay for a while (`hold`).

Any thread may call.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckpt.agent.identity import PROTOCOL, Identity
from ckpt.agent.owner import Owner
from ckpt.agent.wire import Peer
from ckpt.errors import AgentError, VersionError


@dataclass(eq=False, kw_only=True)
class Session:
    """One connection that said hello. Changed by the thread that serves it."""

    peer: Peer
    role: str
    epoch: int
    world: int
    minor: int  # of the protocol that both speak
    connection: socket.socket
    owner: Owner | None = None  # the process; None where it cannot be seen from here
    pidfd: int = -1
    is_detached: bool = False  # it said that it uses the memory no more

    @property
    def is_trainer(self) -> bool:
        """Whether it may change anything."""
        return self.role == "trainer"


class Admission:
    """Who is connected."""

    def __init__(
        self,
        identity: Identity,
        *,
        epoch: int,
        lease_s: float,
        on_epoch: Callable[[int], None],
        on_trainer: Callable[[Session], None],
        on_loss: Callable[[Session], None],
    ) -> None:
        """
        Args:
            epoch: the newest that an earlier agent of this rank saw; -1 for none.
            on_epoch: makes a newer one durable, before it counts.
            on_trainer: a trainer has come.
            on_loss: it has gone; what it was writing is nothing.
        """
        self._identity, self.world, self.epoch = identity, identity.world, epoch
        self._lease_s, self._since = lease_s, time.monotonic()
        self._held_until = 0.0  # of `time.monotonic`
        self._on_epoch, self._on_trainer, self._on_loss = on_epoch, on_trainer, on_loss
        self._lock = threading.RLock()
        self._trainer: Session | None = None  # connected
        self._holder: Session | None = None  # may have the memory mapped, connected or not

    @property
    def trainer_pid(self) -> int | None:
        """Of the trainer that is connected."""
        with self._lock:
            return self._trainer.peer.pid if self._trainer is not None else None

    @property
    def lease_left_s(self) -> float:
        """Until the agent ends; the whole lease while a trainer is connected."""
        with self._lock:
            if self._trainer is not None:
                return self._lease_s
            now = time.monotonic()
            return max(0.0, self._lease_s - (now - self._since), self._held_until - now)

    def hold(self, seconds: float) -> float:
        """Do not let the lease end for so long, as somebody reads; seconds that are left of it."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)
            return self.lease_left_s

    def check_user(self, peer: Peer) -> None:
        """AgentError `other-user` for everybody but the agent's own user, root included."""
        if peer.uid != os.geteuid():
            raise AgentError(f"this agent is of user {os.geteuid()}; user {peer.uid} is refused", kind="other-user")

    def check_current(self, session: Session) -> None:
        """AgentError unless it is the trainer."""
        if not session.is_trainer:
            raise AgentError("an observer may only look", kind="observer")
        with self._lock:
            if session is not self._trainer:
                raise AgentError("another connection of this trainer has taken over", kind="stale-epoch")

    def admit(self, peer: Peer, said: dict[str, Any], connection: socket.socket) -> tuple[Session, dict[str, Any]]:
        """The session, and the answer to hello."""
        session = Session(
            peer=peer,
            role="observer" if said.get("role") == "observer" else "trainer",
            epoch=_integer(said, "epoch"),
            world=_integer(said, "world"),
            minor=_common_minor(said.get("protocol")),
            connection=connection,
        )
        self._check_identity(said)
        if session.is_trainer:
            self._admit_trainer(session)
        mine = self._identity
        return session, {
            "pid": os.getpid(),
            "run_id": mine.run_id.hex,
            "rank": mine.rank,
            "world": mine.world,
            "incarnation": mine.incarnation,
            "epoch": self.epoch,
            "protocol": [PROTOCOL[0], session.minor],
        }

    def leave(self, session: Session) -> None:
        """The connection is over."""
        with self._lock:
            if session is self._trainer:
                self._release(session)
            if session is self._holder and session.is_detached:
                self._holder = None
            if session.pidfd >= 0:
                os.close(session.pidfd)
                session.pidfd = -1

    def _admit_trainer(self, session: Session) -> None:
        with self._lock:
            if session.epoch < self.epoch:
                raise AgentError(
                    f"a trainer of epoch {session.epoch} is refused: one of epoch {self.epoch} was here",
                    kind="stale-epoch",
                )
            if session.epoch == self.epoch and session.world != self.world:
                raise AgentError(
                    f"a trainer of world size {session.world} is refused: epoch {self.epoch} has {self.world} ranks",
                    kind="other-world",
                    hints=("a job that restarts with another world size needs a higher epoch",),
                )
            self._check_holder(session)
            if session.epoch > self.epoch:
                self._on_epoch(session.epoch)
            if self._trainer is not None:
                self._release(self._trainer)
            session.owner = Owner.of(session.peer.pid) if session.peer.pid else None
            session.pidfd = _pidfd(session.peer.pid)
            self.epoch, self.world = session.epoch, session.world
            self._trainer = self._holder = session
            self._on_trainer(session)

    def _check_holder(self, session: Session) -> None:
        holder = self._holder
        if holder is None or holder.owner is None or holder.peer.pid == session.peer.pid or not holder.owner.is_alive:
            return
        raise AgentError(
            f"the trainer of epoch {holder.epoch}, pid {holder.peer.pid}, lives and has the memory of rank "
            f"{self._identity.rank} mapped; pid {session.peer.pid} is refused",
            kind="held",
            hints=(f"end process {holder.peer.pid}; its images stay",),
        )

    def _release(self, session: Session) -> None:
        """Nothing that it was writing counts any more."""
        self._trainer, self._since = None, time.monotonic()
        try:
            session.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is over already
        self._on_loss(session)

    def _check_identity(self, said: dict[str, Any]) -> None:
        run_id, mine = said.get("run_id"), self._identity
        if run_id != mine.run_id.hex:
            raise AgentError(f"this agent is of run {mine.run_id}; run {_shown(run_id)} is refused", kind="other-run")
        if said.get("rank") != mine.rank:
            raise AgentError(
                f"this agent is of rank {mine.rank}; rank {said.get('rank')!r} is refused", kind="other-rank"
            )


def _common_minor(said: Any) -> int:
    is_pair = isinstance(said, list) and len(said) == 2 and all(type(number) is int for number in said)
    if not is_pair or said[0] != PROTOCOL[0] or abs(said[1] - PROTOCOL[1]) > 1:
        text = ".".join(map(str, said)) if is_pair else repr(said)
        raise VersionError(
            f"trainer and agent speak different protocols: {text} and {PROTOCOL[0]}.{PROTOCOL[1]}",
            kind="other-protocol",
            hints=("end the agent of the other version: ckpt agent stop",),
        )
    return min(int(said[1]), PROTOCOL[1])


def _integer(said: dict[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise AgentError(f"`{name}` of hello must be a number from 0, found {value!r}", kind="bad-frame")
    return value


def _shown(run_id: Any) -> str:
    try:
        return str(uuid.UUID(hex=run_id))
    except (TypeError, ValueError, AttributeError):
        return repr(run_id)


def _pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 where there is none to have."""
    try:
        return os.pidfd_open(pid) if pid else -1
    except OSError:
        return -1
