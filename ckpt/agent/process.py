"""The life of an agent: one process per rank that outlives its trainer.

In: an identity and options. Out: an exit code, when the job is over, the lease is, or somebody says stop. In this order: lock the
rank (1), learn from the agent before (2), stand back behind the training (3), take over what lies in memory (4), listen (5), say
so (6), serve (7); at the end close the socket, let others finish (8), and give back memory, files and the lock (9). Killed at any
point it leaves files that the next agent takes over or removes. Never imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ckpt.agent import methods, segments
from ckpt.agent.admission import Admission, Session
from ckpt.agent.identity import Identity, Places, memory_folder, parity_folder, places, private_folders, runtime_folders
from ckpt.agent.log import AgentLog
from ckpt.agent.memo import Memo, MemoFile
from ckpt.agent.server import Server
from ckpt.agent.slots import Slots
from ckpt.config import AGENT_LOG_KEEP_S, Options
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, first_line

_OOM_SCORE_ADJ = -500  # rather a process that has no snapshot
_KILL_AFTER_S = 5.0  # beyond the grace: then the end comes without waiting for anybody
_LISTEN_BACKLOG = 64


class Plugin(Protocol):
    """A part of the agent beside its memory: groups, transport, flushing."""

    def start(self, agent: Agent) -> None:
        """Add methods to `agent.server.handlers`; start threads."""

    def stop(self, deadline: float) -> None:
        """Finish until `deadline` (of `time.monotonic`), or abandon. Called once, before the memory goes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agent:
    """What a plugin gets to see."""

    identity: Identity  # with this incarnation
    options: Options
    places: Places
    server: Server
    admission: Admission
    slots: Slots
    log: AgentLog
    memo: MemoFile
    on_loss: list[Callable[[], None]]  # called when the trainer is gone; must not wait
    more_slots: list[Slots] = dataclasses.field(default_factory=list)  # of plugins; complete when `start` returns


def run(
    identity: Identity, options: Options, *, plugins: Sequence[Plugin] = (), on_ready: Callable[[], None] = lambda: None
) -> str:
    """Be the agent of a rank until the end; returns why it ended. Main thread only: takes SIGTERM and SIGINT.

    Raises:
        AlreadyExistsError: `agent-runs`: this run and rank have one; its pid is named.
    """
    while True:
        where = places(identity, options)
        with _locked(where) as is_ours:
            if is_ours:
                return _live(identity, options, where, plugins, on_ready)


def _live(
    identity: Identity, options: Options, where: Places, plugins: Sequence[Plugin], on_ready: Callable[[], None]
) -> str:
    before = Memo.read(where.state)
    incarnation = max(before.incarnation + 1, time.time_ns() // 10**6)
    identity = dataclasses.replace(identity, incarnation=incarnation)
    memo = MemoFile(where.state, dataclasses.replace(before, incarnation=incarnation))
    log = AgentLog(where.log)
    log.tell("started", run=str(identity.run_id), rank=identity.rank, world=identity.world, incarnation=incarnation)
    settle(options, log)
    folder = memory_folder(options)
    _refuse_twin(folder, identity)
    slots = Slots(folder, identity, options)
    on_loss: list[Callable[[], None]] = []
    admission = Admission(
        identity,
        epoch=before.epoch,
        lease_s=options.agent_lease_s,
        on_epoch=lambda epoch: memo.change(epoch=epoch),
        on_trainer=lambda one: log.tell("trainer-came", trainer_pid=one.peer.pid, epoch=one.epoch, world=one.world),
        on_loss=lambda one: _trainer_lost(one, slots, log, on_loss),
    )
    _take_over(folder, identity, slots, options, log)
    reason, started, is_over = "failed", list[Plugin](), False
    try:
        server = Server(_listen(where.socket), admission, options, log)
        agent = Agent(
            identity=identity, options=options, places=where, server=server, admission=admission, slots=slots, log=log,
            memo=memo, on_loss=on_loss,
        )  # fmt: skip
        methods.install(agent)
        with _signals(server):
            for plugin in plugins:
                started.append(plugin)
                plugin.start(agent)
            on_ready()
            reason = server.run(every_s=_tick_s(options), tick=_ticker(agent))
            is_over = True
            _end(agent, started, reason)
    finally:
        where.socket.unlink(missing_ok=True)
        if is_over:  # else the next agent takes over what lies in memory, and what this one knew
            slots.close()
            where.state.unlink(missing_ok=True)
        log.tell("ended", reason=reason)
    return reason


def _end(agent: Agent, plugins: Sequence[Plugin], reason: str) -> None:
    """Close the socket and let everybody finish, within the grace."""
    agent.log.tell("ending", reason=reason)
    grace_s = agent.options.agent_stop_grace_s
    deadline = time.monotonic() + grace_s
    last = threading.Timer(grace_s + _KILL_AFTER_S, _abandon, args=(agent,))
    last.daemon = True
    last.start()
    agent.places.socket.unlink(missing_ok=True)
    agent.server.close(deadline)
    for plugin in reversed(plugins):
        try:
            plugin.stop(deadline)
        except Exception as error:  # noqa: BLE001 - the others, and the memory, still want to be given back
            agent.log.tell("plugin-failed", plugin=type(plugin).__name__, error=first_line(error))
    last.cancel()


def _abandon(agent: Agent) -> None:
    """The grace is over and somebody does not finish: give everything back and go."""
    agent.log.tell("ended", reason="did not finish within the grace")
    for folder in (memory_folder(agent.options), parity_folder(agent.options)):
        for path in segments.listing(folder):
            with contextlib.suppress(CheckpointError):
                if segments.peek(path).owner.pid == os.getpid():
                    path.unlink(missing_ok=True)
    agent.places.state.unlink(missing_ok=True)
    os._exit(1)


def _tick_s(options: Options) -> float:
    return min(1.0, options.agent_heartbeat_s, options.agent_lease_s / 4)


def _ticker(agent: Agent) -> Callable[[], None]:
    """What the main thread does beside: renew the marks in memory, look at the lease."""
    next_touch = [0.0]

    def tick() -> None:
        now = time.monotonic()
        if now >= next_touch[0]:
            next_touch[0] = now + agent.options.agent_heartbeat_s
            for slots in (agent.slots, *agent.more_slots):
                slots.touch()
        if agent.admission.lease_left_s <= 0:
            agent.server.stop("the lease is over: no trainer came")

    return tick


def _trainer_lost(session: Session, slots: Slots, log: AgentLog, then: Iterable[Callable[[], None]]) -> None:
    lost = slots.abandon_writing()
    log.tell(
        "trainer-left",
        trainer_pid=session.peer.pid,
        epoch=session.epoch,
        detached=session.is_detached,
        abandoned_steps=[header.step for header in lost],
    )
    for one in then:
        one()


def _take_over(folder: Path, identity: Identity, slots: Slots, options: Options, log: AgentLog) -> None:
    """What dead agents left: ours to hold again, what nobody comes back for to remove."""
    swept = segments.sweep(
        folder, identity, lease_s=options.agent_lease_s, tell=lambda text: log.tell("leftover-not-read", text=text)
    )
    slots.take(swept.adopted)
    if swept.adopted or swept.removed or swept.given_up:
        log.tell(
            "swept",
            adopted=[
                {"name": one.name, "state": one.header.state.name, "step": one.header.step} for one in swept.adopted
            ],
            removed=[one.path.name for one in swept.removed],
            given_up=swept.given_up,
        )
    _remove_old_logs(options)


def _refuse_twin(folder: Path, identity: Identity) -> None:
    """An agent of the same rank that was started with another runtime folder holds another lock."""
    for header in segments.living(folder, identity):
        raise AlreadyExistsError(
            f"rank {identity.rank} of run {identity.run_id} has an agent, pid {header.owner.pid}, with another runtime folder",
            kind="agent-runs",
            hints=("set CKPT_AGENT_RUNTIME_FOLDER (or XDG_RUNTIME_DIR) to the same folder everywhere",),
        )


@contextlib.contextmanager
def _locked(where: Places) -> Iterator[bool]:
    """The lock of a rank, which names the holder's pid. False: the file was removed by an agent that ended; try again."""
    try:
        fd = os.open(where.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:  # the folder went with an agent that ended
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AlreadyExistsError(
                f"rank {where.rank} has an agent already, pid {pid} (lock `{where.lock}`)",
                kind="agent-runs",
                hints=("ckpt agent status", "ckpt agent stop URL --rank N"),
            ) from None
        if os.fstat(fd).st_nlink == 0:
            yield False
            return
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield True
        where.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            where.folder.rmdir()  # the log of an agent keeps it
    finally:
        os.close(fd)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a dead agent: the lock is ours
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(mask)
    listener.listen(_LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _signals(server: Server) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        server.stop(signal.Signals(number).name)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def settle(options: Options, log: AgentLog) -> None:
    """Leave the machine to the training: priority, processors, no core file. What the system refuses is logged."""

    def score() -> None:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), encoding="ascii")

    def cpus() -> None:
        if options.agent_cpus:
            os.sched_setaffinity(0, parse_cpus(options.agent_cpus))

    done: dict[str, Any] = {}
    for name, act in {
        "core": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        "oom_score_adj": score,
        "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, options.agent_nice),
        "cpus": cpus,
    }.items():
        try:
            act()
            done[name] = "set"
        except OSError as error:
            done[name] = f"refused: {error.strerror}"
    log.tell("settled", **done)


def parse_cpus(text: str) -> set[int]:
    """`0-3,8` as processors."""
    try:
        out: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("-")
            out |= set(range(int(first), int(last or first) + 1))
        if out:
            return out
    except ValueError:
        pass
    raise InvalidInputError(f"option `agent_cpus` must be like 0-3,8, found {text!r}")


def _remove_old_logs(options: Options) -> None:
    """Logs of agents that ended long ago, and their folders. Looks only into folders that are ours alone."""
    for runtime in runtime_folders(options):
        for folder in private_folders(runtime):
            with contextlib.suppress(OSError):
                old = [p for p in folder.glob("*.log*") if time.time() - p.lstat().st_mtime > AGENT_LOG_KEEP_S]
                for path in old:
                    path.unlink()
                    path.with_suffix(".err").unlink(missing_ok=True)
                if old:  # one without logs may just be made
                    folder.rmdir()  # stays while anything lies in it
