"""Whether there is memory for what is asked, before it is taken.

In: bytes, options, what the system says. Out: the figures, or BudgetError with all of them. Takes no memory itself, and does not
hold any for the caller: two agents that ask at once are kept apart by allocating (segments.py), which fails cleanly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from ckpt.config import AGENT_BESIDE_BYTES, Options
from ckpt.errors import BudgetError

_UNLIMITED = 1 << 60  # a limit above that is none


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is free, in bytes."""

    host_bytes: int  # that the host could give without swapping
    cgroup_bytes: int | None  # below the tightest limit of the control groups of this process; None: no limit
    folder_bytes: int  # on the file system of the segments
    folder: str

    @property
    def free_bytes(self) -> int:
        """Host memory that this process can have."""
        return self.host_bytes if self.cgroup_bytes is None else min(self.host_bytes, self.cgroup_bytes)


def look(folder: Path) -> Memory:
    """What is free now.

    Args:
        folder: exists.
    """
    found = os.statvfs(folder)
    return Memory(
        host_bytes=psutil.virtual_memory().available,
        cgroup_bytes=cgroup_free_bytes(),
        folder_bytes=found.f_bavail * found.f_frsize,
        folder=str(folder),
    )


def check(need_bytes: int, memory: Memory, options: Options) -> None:
    """BudgetError unless `need_bytes` fit into the folder, and into host memory with what an agent takes beside and the reserve.

    Some of what it takes beside is taken already, so that this asks for a little too much rather than too little.
    """
    reserve = options.agent_reserve_bytes
    if need_bytes + AGENT_BESIDE_BYTES + reserve <= memory.free_bytes and need_bytes <= memory.folder_bytes:
        return
    cgroup = "no limit" if memory.cgroup_bytes is None else f"{memory.cgroup_bytes:,} bytes left"
    hints = [
        "save less per rank (more ranks), or give the job more memory",
        "CKPT_AGENT_RESERVE_BYTES is what is left free",
    ]
    if need_bytes > memory.folder_bytes:
        hints.insert(
            0, f"enlarge `{memory.folder}` (containers: --shm-size, an emptyDir of medium Memory with a size limit)"
        )
    raise BudgetError(
        f"no memory for snapshots: needed {need_bytes:,} bytes, {AGENT_BESIDE_BYTES:,} for the agent itself and {reserve:,} in "
        f"reserve; found {memory.host_bytes:,} available on the host, control group: {cgroup}, "
        f"{memory.folder_bytes:,} free in `{memory.folder}`",
        hints=tuple(hints),
    )


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes below the tightest memory limit of this process's control groups and those around them; None without any."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _free(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _free(
                root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )
    return min(found, default=None)


def _free(base: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Of a group and of all that it lies in. In a container the path may be that outside: then its root is the group."""
    parts = [part for part in path.split("/") if part and part != ".."]
    out = []
    for depth in range(len(parts) + 1):
        folder = base.joinpath(*parts[:depth])
        limit_bytes, usage_bytes = _number(folder / limit), _number(folder / usage)
        if limit_bytes is None or usage_bytes is None or limit_bytes >= _UNLIMITED:
            continue
        out.append(max(0, limit_bytes - usage_bytes + _of_stat(folder / "memory.stat", reclaimable)))
    return out


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or the word `max`
        return None


def _of_stat(path: Path, name: str) -> int:
    try:
        rows = dict(line.split(None, 1) for line in path.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(name, 0))
