"""The drill's job: ranks on nodes of their own, all on this machine, and what can be done to them.

In: folders. Out: processes, and what they told. A node is a name, a runtime folder, a memory folder and a link by which others
reach its agent. One owner; everything is ended and removed by `close`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckpt.agent import segments
from ckpt.agent.header import HEADER_BYTES, Header
from ckpt.agent.identity import memory_folder, parity_folder, run_id_of
from ckpt.agent.owner import Owner
from ckpt.config import Options
from ckpt.errors import CheckpointError
from tests.agent.faulty_link import FaultyLink

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {
    "agent_reserve_bytes": "0",
    "agent_lease_s": "60",
    "agent_heartbeat_s": "0.5",
    "agent_call_timeout_s": "10",
    "agent_stop_grace_s": "3",
    "protect_timeout_s": "4",
    "pull_timeout_s": "10",
    "peer_connect_s": "2",
    "peer_progress_s": "2",
    "exchange_timeout_s": "20",
    "commit_timeout_s": "8",
    "outcome_grace_s": "4",
}


class Link(FaultyLink):
    """A link to an agent whose port is in a file, as the agent may be started anew."""

    def __init__(self, real: Path) -> None:
        self._real = real
        super().__init__(0)

    @property
    def _target(self) -> tuple[str, int]:
        try:
            host, _, port = self._real.read_text().rpartition(":")
        except FileNotFoundError:
            return "127.0.0.1", 1  # nobody listens
        return host, int(port)

    @_target.setter
    def _target(self, _: tuple[str, int]) -> None:
        pass


class Node:
    """One machine of the job, with one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank, self.name = rank, f"node-{rank}"
        self._base = folder
        self.runtime = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
        self.memory = Path(tempfile.mkdtemp(prefix="ckpt-drill-", dir="/dev/shm"))
        self.real = folder / f"{self.name}.address"
        self.link = Link(self.real)
        self.environment = {
            "CKPT_NODE": self.name,
            "CKPT_AGENT_RUNTIME_FOLDER": str(self.runtime),
            "CKPT_AGENT_MEMORY_FOLDER": str(self.memory),
        }
        self.pid = 0  # of the trainer

    @property
    def options(self) -> Options:
        return Options(agent_memory_folder=str(self.memory), agent_runtime_folder=str(self.runtime))

    def agent_pids(self) -> list[int]:
        """Agents that live here, by the locks that they hold."""
        found = []
        for path in self.runtime.glob("*/*.lock"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"ckpt.agent" in command and Owner.of(pid) is not None:
                    found.append(pid)
        return found

    def kill_trainer(self) -> None:
        kill(self.pid)
        self.pid = 0

    def kill_agent(self, number: signal.Signals = signal.SIGKILL) -> None:
        for pid in self.agent_pids():
            if number is signal.SIGKILL:
                kill(pid)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def lose(self) -> None:
        """The machine is gone, and another one with its name and nothing in it takes its place."""
        self.kill_trainer()
        self.kill_agent()
        self.link.hang_up()
        for folder in (self.memory, self.runtime):
            shutil.rmtree(folder, ignore_errors=True)
        self.memory.mkdir(mode=0o700)
        self.runtime.mkdir(mode=0o700)

    def held(self) -> list[tuple[Path, Header]]:
        """Segments of images and parity that are complete."""
        out = []
        for folder in (memory_folder(self.options), parity_folder(self.options)):
            for path in segments.listing(folder) if folder.is_dir() else ():
                with contextlib.suppress(CheckpointError):
                    header = segments.peek(path)
                    if header.is_complete:
                        out.append((path, header))
        return out

    def close(self) -> None:
        self.kill_trainer()
        self.kill_agent()
        self.link.close()
        for folder in (self.memory, self.runtime):
            shutil.rmtree(folder, ignore_errors=True)


def flip(path: Path, header: Header, at: int, bit: int) -> None:
    """Invert one bit of a complete segment's payload."""
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + at % max(1, header.image_bytes))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ (1 << bit)]))


class Job:
    """All ranks. `start` one life of it after the other."""

    def __init__(self, folder: Path, num_nodes: int, *, parity: int) -> None:
        self.folder, self.parity = folder, parity
        self.store = folder / "store"
        self.nodes = [Node(folder, rank) for rank in range(num_nodes)]
        self.lives = 0
        self._read = [0] * num_nodes  # bytes of the logs
        with (folder / "maker.err").open("w") as errors:
            self._maker = subprocess.Popen(
                [sys.executable, "-m", "tests.drill.trainer"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def run_id(self) -> str:
        return run_id_of(str(self.store)).hex

    def start(self, *, step_s: float, **limits: dict[int, str]) -> None:
        """Begin a life of the job: one trainer per node.

        Args:
            limits: option -> rank -> value, for this life.
        """
        self.lives += 1
        for node in self.nodes:
            extra = {name: values[node.rank] for name, values in limits.items() if node.rank in values}
            chosen = {f"CKPT_{name.upper()}": value for name, value in {**LIMITS, **extra}.items()}
            given = {
                "rank": node.rank,
                "world": len(self.nodes),
                "parity": self.parity,
                "url": str(self.store),
                "meet": str(self.folder / f"meet-{self.lives}"),
                "log": str(self._log(node.rank)),
                "output": str(self.folder / f"output-{node.rank}.txt"),
                "stop": str(self.folder / "stop"),
                "real": str(node.real),
                "link": node.link.address,
                "step_s": step_s,
                "environment": {**node.environment, **chosen},
            }
            assert self._maker.stdin is not None and self._maker.stdout is not None
            self._maker.stdin.write(json.dumps(given) + "\n")
            self._maker.stdin.flush()
            node.pid = int(self._maker.stdout.readline())

    def news(self) -> list[dict[str, Any]]:
        """What the trainers told since the last call, by rank."""
        out = []
        for node in self.nodes:
            path = self._log(node.rank)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._read[node.rank])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[node.rank] += len(whole)
            out += [json.loads(line) for line in whole.splitlines()]
        return out

    def stop(self) -> None:
        """Tell the trainers that the job is over."""
        (self.folder / "stop").touch()

    def kill_trainers(self) -> None:
        for node in self.nodes:
            node.kill_trainer()

    @contextlib.contextmanager
    def store_away(self) -> Iterator[None]:
        """The store's folder is gone meanwhile, and nobody can make another one."""
        self.store.mkdir(exist_ok=True)
        hidden = self.store.with_name("store.away")
        self.store.rename(hidden)
        self.store.write_text("not a folder")
        try:
            yield
        finally:
            self.store.unlink()
            hidden.rename(self.store)

    def texts(self, num_lines: int = 40) -> str:
        """The last words of everybody, for the message of a failure."""
        parts = []
        for node in self.nodes:
            paths = [self.folder / f"output-{node.rank}.txt", self._log(node.rank), *node.runtime.glob("*/*.log")]
            paths += list(node.runtime.glob("*/*.err"))
            for path in paths:
                if path.exists() and (lines := path.read_text(errors="replace").splitlines()[-num_lines:]):
                    parts.append("\n".join([f"--- {node.name}: {path.name}", *lines]))
        return "\n".join(parts)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        if self._maker.stdin is not None:
            self._maker.stdin.close()
        self._maker.kill()
        self._maker.wait()
        if self._maker.stdout is not None:
            self._maker.stdout.close()

    def _log(self, rank: int) -> Path:
        return self.folder / f"trainer-{rank}.jsonl"


def kill(pid: int) -> None:
    """End a process of ours, stopped or not, and wait until it is gone."""
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: Owner.of(pid) is None, 60.0, lambda: f"process {pid} does not end")


def wait_for(condition: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.005)
