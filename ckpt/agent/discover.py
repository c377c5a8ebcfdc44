"""Which agents of this user live on this host, and what dead ones left.

In: options. Out: records. Asks every agent for its state, as an observer: renews no lease and changes nothing.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ckpt.agent.identity import Identity, Places, private_folders, runtime_folders
from ckpt.agent.local import connect
from ckpt.agent.owner import Owner
from ckpt.config import Options
from ckpt.errors import AgentError, CheckpointError

_SOCKET = re.compile(r"([0-9]{5,9})\.sock")
_ASK_S = 5.0  # an agent that is stopped or stuck is told as that


@dataclass(frozen=True, kw_only=True)
class Found:
    """An agent that listens, or seems to."""

    identity: Identity  # its world is not known from outside: rank + 1
    places: Places
    status: dict[str, Any] | None  # None: it does not answer
    error: str = ""
    pss_bytes: int | None = None  # its memory, shared pages counted by share; None where the system does not tell


def agents(
    options: Options,
    *,
    run_id: uuid.UUID | None = None,
    rank: int | None = None,
    first_rank: int = 0,
    sizes: bool = True,
) -> list[Found]:
    """Those of this user, by run and rank.

    Args:
        run_id: of this run only.
        rank: this one only.
        first_rank: none below; nobody asks them.
        sizes: also tell `pss_bytes`, which takes some 10 ms of an agent with gigabytes.
    """
    found = []
    for where in _listening(options):
        identity = Identity(run_id=uuid.UUID(hex=where.folder.name), rank=where.rank, world=where.rank + 1)
        if run_id in (None, identity.run_id) and rank in (None, identity.rank) and identity.rank >= first_rank:
            one = _ask(identity, where, options, sizes=sizes)
            if one is not None:
                found.append(one)
    return sorted(found, key=lambda one: (one.identity.run_id.hex, one.identity.rank))


def stop(found: Found, options: Options, *, force: bool, clock: Callable[[], float] = time.monotonic) -> None:
    """End an agent, and wait until it is gone. AgentError `not-stopped` when it is not."""
    owner = Owner.of(found.status["pid"]) if found.status else None
    try:
        client = connect(found.places.socket, found.identity, options, role="observer", timeout_s=_ASK_S)
        try:
            owner = Owner.of(client.agent["pid"])
            client.call("stop", {"force": force})
        finally:
            client.close()
    except AgentError as error:
        if error.kind != "no-agent":  # else it is about to end by itself
            raise
    deadline = clock() + options.agent_stop_grace_s + 2 * _ASK_S
    while owner is not None and owner.is_alive:
        if clock() > deadline:
            raise AgentError(f"the agent, pid {owner.pid}, was told to stop and has not ended", kind="not-stopped")
        time.sleep(0.02)


def _listening(options: Options) -> list[Places]:
    return [
        Places(folder=folder, rank=int(match[1]))
        for runtime in runtime_folders(options)
        for folder in private_folders(runtime)
        for path in _inside(folder)
        if (match := _SOCKET.fullmatch(path.name))
    ]


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # it went with its last agent
        return []


def _ask(identity: Identity, where: Places, options: Options, *, sizes: bool) -> Found | None:
    """None: the socket of an agent that is dead."""
    try:
        client = connect(where.socket, identity, options, role="observer", timeout_s=_ASK_S)
        try:
            status = client.call("status", timeout_s=_ASK_S)[0]
        finally:
            client.close()
    except AgentError as error:
        return (
            None
            if error.kind == "no-agent"
            else Found(identity=identity, places=where, status=None, error=error.message)
        )
    except CheckpointError as error:
        return Found(identity=identity, places=where, status=None, error=error.message)
    pss_bytes = _pss_bytes(status["pid"]) if sizes else None
    return Found(identity=identity, places=where, status=status, pss_bytes=pss_bytes)


def _pss_bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except (psutil.Error, AttributeError):
        return None
