"""Nodes of one machine: each with folders of its own for its agent, so that one can be lost with all that it held.

In: names. Out: environments for ranks. A node is lost with its trainer, its agent and its shared memory; only processes that were
started here, or by ranks that were, are ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.agent import discover
from ckpt.agent.owner import Owner
from ckpt.config import Options
from tests.agent.conftest import until


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node."""

    name: str
    runtime: Path
    memory: Path
    failpoint: str = ""  # of its agent and trainer

    @property
    def environment(self) -> dict[str, str]:
        """Of a rank that runs there."""
        out = {
            "CKPT_NODE": self.name,
            "CKPT_AGENT_RUNTIME_FOLDER": str(self.runtime),
            "CKPT_AGENT_MEMORY_FOLDER": str(self.memory),
        }
        return {**out, "CKPT_FAILPOINT": self.failpoint} if self.failpoint else out

    @property
    def agents(self) -> list[int]:
        """Pids of the agents that live there."""
        options = Options(agent_runtime_folder=str(self.runtime), agent_memory_folder=str(self.memory))
        return [one.status["pid"] for one in discover.agents(options) if one.status]

    def kill_agents(self) -> None:
        """With SIGKILL; their memory stays."""
        for pid in self.agents:
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: Owner.of(pid) is None)

    def lose(self) -> None:
        """All of it, when its trainer is dead."""
        self.kill_agents()
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.runtime, ignore_errors=True)

    def segments(self) -> list[Path]:
        """Files of its shared memory: of images, then of parity."""
        return sorted(self.memory.rglob("*.seg"))


class Cluster:
    """Makes nodes."""

    def __init__(self, runtime: Path, memory: Path) -> None:
        self._runtime, self._memory = runtime, memory
        self.nodes: list[Node] = []

    def add(self, *, failpoint: str = "") -> Node:
        """A fresh node, nothing in its memory."""
        name = f"n{len(self.nodes)}"
        node = Node(name=name, runtime=self._runtime / name, memory=self._memory / name, failpoint=failpoint)
        node.runtime.mkdir(mode=0o700)
        node.memory.mkdir()
        self.nodes.append(node)
        return node


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Nodes that are gone at the end, with their agents."""
    runtime = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))  # short: a socket's path has 107 bytes
    memory = Path(tempfile.mkdtemp(prefix="ckpt-test-", dir="/dev/shm"))
    made = Cluster(runtime, memory)
    try:
        yield made
    finally:
        for node in made.nodes:
            node.lose()
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
