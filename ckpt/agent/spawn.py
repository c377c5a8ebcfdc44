"""Find the agent of a rank, or start it so that nothing that ends the trainer ends it.

In: an identity, options, an epoch. Out: a connection. The agent is started with exec in a session of its own and leaves that for
another one, so it is in no process group that torchrun kills, has no terminal, and inherits no memory, no threads, no CUDA
context and no descriptors. Two that start at once: the lock decides, the other one connects to who won. What cannot be left is a
control group: where the scheduler kills that (docs/reference/agent.md), start the agent outside of it, with `ckpt agent run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ckpt
from ckpt.agent import wire
from ckpt.agent.identity import Identity, Places, make_private, places
from ckpt.agent.local import Client, connect
from ckpt.agent.log import tail
from ckpt.agent.owner import Owner
from ckpt.config import Options
from ckpt.errors import AgentError, CheckpointError

_log = logging.getLogger("ckpt")
_RETRY_S = 0.05  # between two looks for an agent that is about to come or to go
_DYING_S = 5.0  # that a killed trainer may take to give its memory back
_READY_BYTES_MAX = 65536
_TAIL_LINES = 10

# What the agent needs of the trainer's environment: to import, to find its folders, to write to a store. Nothing of the job's own
# (MASTER_ADDR, RANK, CUDA_..., OMP_...), which would be wrong after a restart.
_KEPT = frozenset(
    "PATH HOME USER LOGNAME LANG TZ TMPDIR PYTHONPATH PYTHONHOME VIRTUAL_ENV LD_LIBRARY_PATH XDG_RUNTIME_DIR SSL_CERT_FILE "
    "SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy".split()
)
_KEPT_PREFIXES = ("LC_", "CKPT_", "AWS_", "S3_", "FSSPEC_", "GOOGLE_", "AZURE_", "KUBERNETES_SERVICE_")


def start_or_adopt(identity: Identity, options: Options, *, epoch: int = 0) -> Client:
    """The agent of this run and rank, which is started if none lives; any thread of the trainer.

    One that does not answer within half of `agent_start_timeout_s` is killed; the next one takes over what it holds.

    Args:
        epoch: of the trainer, higher at each restart of the job.

    Raises:
        AgentError: it refuses this trainer, or it did not come up within `agent_start_timeout_s` (`not-started`).
    """
    where = places(identity, options)
    deadline = time.monotonic() + options.agent_start_timeout_s
    held_until = min(deadline, time.monotonic() + _DYING_S)
    silent_at = time.monotonic() + options.agent_start_timeout_s / 2
    while True:
        try:
            limit = silent_at if time.monotonic() < silent_at else deadline
            return connect(
                where.socket, identity, options, epoch=epoch, timeout_s=max(_RETRY_S, limit - time.monotonic())
            )
        except AgentError as error:
            if error.kind == "held" and time.monotonic() < held_until:
                time.sleep(_RETRY_S)
                continue
            if error.kind == "timeout" and time.monotonic() < deadline:
                _end_silent(where, identity)
            elif error.kind not in ("no-agent", "agent-gone"):
                raise
            last: CheckpointError = error
        try:
            start(identity, options, where, deadline=deadline)
            continue
        except CheckpointError as error:
            if error.kind != "agent-runs":
                raise
            last = error  # it won the race and does not listen yet, or it is about to end
        if time.monotonic() >= deadline:
            raise AgentError(
                f"the agent of rank {identity.rank} does not answer: {last.message}", kind="not-started"
            ) from last
        time.sleep(_RETRY_S)


def end(pid: int) -> None:
    """Kill an agent that does not answer. What it holds stays in memory, for the next one. AgentError `not-ended` if it lives."""
    owner = Owner.of(pid) if pid else None
    if owner is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _DYING_S
    while owner.is_alive:
        if time.monotonic() > deadline:
            raise AgentError(f"the agent, pid {pid}, does not answer and cannot be killed", kind="not-ended")
        time.sleep(_RETRY_S)


def _end_silent(where: Places, identity: Identity) -> None:
    """The process that holds the rank's lock and does not answer makes way, if it is an agent of this run and can be seen."""
    try:
        pid = int(where.lock.read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return
    if identity.run_id.hex.encode() not in command:
        return
    _log.warning("the agent of seat %d, pid %d, does not answer; another one takes its place", identity.rank, pid)
    end(pid)


def start(identity: Identity, options: Options, where: Places, *, deadline: float) -> int:
    """Start an agent and wait until it listens; its pid.

    Raises:
        AlreadyExistsError: `agent-runs`: there is one.
        AgentError: `not-started`, with the last lines that it wrote.
    """
    read_fd, write_fd = os.pipe()
    try:
        _exec(identity, options, where, write_fd)
        os.close(write_fd)
        write_fd = -1
        said = _read_line(read_fd, deadline)
    finally:
        os.close(read_fd)
        if write_fd >= 0:
            os.close(write_fd)
    if said is not None and "pid" in said:
        return int(said["pid"])
    if said is not None:
        raise wire.rebuilt(said)
    why = "ended" if time.monotonic() < deadline else "is not ready in time"
    lines = [f"  {line}" for line in (*tail(where.log, _TAIL_LINES), *tail(where.stderr, _TAIL_LINES))]
    raise AgentError("\n".join([f"the agent of rank {identity.rank} {why}; it said:", *lines]), kind="not-started")


def _exec(identity: Identity, options: Options, where: Places, ready_fd: int) -> None:
    """A child that execs the agent, which leaves it and lets it end: it is waited for here."""
    command = [sys.executable, "-P", "-m", "ckpt.agent", "--detach", "--ready-fd", str(ready_fd)]
    command += arguments(identity, options)
    stderr = _open_stderr(where)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            pass_fds=(ready_fd,),
        )
        child.wait()
    except OSError as error:
        raise AgentError(f"`{command[0]}` cannot be started: {error.strerror}", kind="not-started") from error
    finally:
        os.close(stderr)


def _open_stderr(where: Places) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            return os.open(where.stderr, flags, 0o600)
        except FileNotFoundError:  # the folder went with the last agent in it
            make_private(where.folder.parent)
            make_private(where.folder)
        except OSError as error:
            raise AgentError(f"`{where.stderr}` cannot be written: {error.strerror}", kind="not-started") from error


def arguments(identity: Identity, options: Options) -> list[str]:
    """Of `python -m ckpt.agent`, for this identity and these options."""
    changed = {
        field.name: value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    }
    return [
        *("--run-id", identity.run_id.hex, "--rank", str(identity.rank), "--world", str(identity.world)),
        *("--options", json.dumps(changed)),
    ]


def _environment() -> dict[str, str]:
    out = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    folders = [os.path.abspath(folder) for folder in out.get("PYTHONPATH", "").split(os.pathsep) if folder]
    here = os.fspath(Path(ckpt.__file__).resolve().parents[1])
    if here not in (*site.getsitepackages(), site.getusersitepackages(), *folders):
        folders.append(here)
    # The agent needs NumPy for views only: its thread pools would be memory for nothing.
    out |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Messages of megabytes are allocated again and again. By default each gets fresh pages from the system, which took a quarter
    # of all processor time of a snapshot; and each further arena keeps free what others could use: with two, an agent of a group
    # of 8 had 350 MB instead of 270, and took as much processor time.
    out |= {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "134217728", "MALLOC_ARENA_MAX": "1"}
    out |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    return {**out, "PYTHONPATH": os.pathsep.join(folders)} if folders else out


def _read_line(fd: int, deadline: float) -> dict[str, Any] | None:
    """What the agent says of itself; None when it ends first, or the time does."""
    data, poll = b"", select.poll()
    poll.register(fd, select.POLLIN)
    while not data.endswith(b"\n") and len(data) < _READY_BYTES_MAX:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(fd, 4096)
        if not part:
            return None
        data += part
    said = json.loads(data)
    assert isinstance(said, dict)
    return said
