"""Folders of its own for every test, trainers to kill, and a check that nothing is left in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt
from ckpt.agent import discover
from ckpt.agent.identity import Identity, memory_folder
from ckpt.agent.owner import Owner
from ckpt.config import Memory, Options

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., ckpt.Checkpointer]


@pytest.fixture
def options() -> Iterator[Options]:
    """Folders of this test; at its end no agent may live there and no shared memory be left."""
    runtime = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="ckpt-test-", dir="/dev/shm"))
    made = Options(
        agent_runtime_folder=str(runtime),
        agent_memory_folder=str(memory),
        agent_reserve_bytes=0,
        agent_lease_s=30.0,
        agent_heartbeat_s=0.2,
        agent_call_timeout_s=60.0,
        agent_stop_grace_s=5.0,
    )
    try:
        yield made
        agents = [one.status["pid"] for one in discover.agents(made) if one.status]
        left = [path.name for path in memory.rglob("*") if not path.is_dir()]
        for pid in agents:
            os.kill(pid, signal.SIGKILL)
        assert (agents, left) == ([], []), "agents or shared memory left behind"
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def folders(options: Options) -> Iterator[Options]:
    """As `options`; the agents of a test end with it."""
    yield options
    for found in discover.agents(options):
        discover.stop(found, options, force=True)


@pytest.fixture
def make(folders: Options, tmp_path: Path) -> Iterator[Make]:
    """Makes checkpointers of one run; whose process is to have died is left with `leave`."""
    made: list[ckpt.Checkpointer] = []

    def one(*, memory: Memory | None = None, **given: Any) -> ckpt.Checkpointer:
        given = {"every": 1000, "options": folders, **given}
        made.append(ckpt.Checkpointer(tmp_path / "run", memory=memory or Memory(every=1), **given))
        return made[-1]

    yield one
    for checkpointer in made:
        checkpointer._run.close(over=True)
    until(lambda: not list(Path(folders.agent_memory_folder or "").rglob("*.seg")))


def leave(checkpointer: ckpt.Checkpointer) -> None:
    """As a process that is killed, but for what it has begun."""
    checkpointer._run.leave()
    checkpointer._run.close()


@pytest.fixture
def identity() -> Identity:
    return Identity(run_id=uuid.uuid4(), rank=1, world=4)


class Trainer:
    """A trainer process (tests/workers/agent_trainer.py)."""

    def __init__(self, identity: Identity, options: Options) -> None:
        self.identity, self.options = identity, options
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.agent_trainer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, name: str, **params: Any) -> Any:
        """What it answers; an error as {"kind": ..., "message": ...}."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": name, **params}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["ok"] if "ok" in answer else answer["error"]

    def start(self, *, epoch: int = 0, **changes: Any) -> Any:
        given = {"run_id": self.identity.run_id.hex, "rank": self.identity.rank, "world": self.identity.world}
        return self.do("start", options=dataclasses.asdict(self.options), epoch=epoch, **{**given, **changes})

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


@pytest.fixture
def trainer(identity: Identity, options: Options) -> Iterator[Callable[[], Trainer]]:
    """Makes trainers of the test's identity; they are ended with the test, and its agents with them."""
    made: list[Trainer] = []

    def make() -> Trainer:
        made.append(Trainer(identity, options))
        return made[-1]

    yield make
    for one in made:
        one.kill()
    for found in discover.agents(options):
        discover.stop(found, options, force=True)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def kill_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: Owner.of(pid) is None)


def names_in_memory(options: Options) -> list[str]:
    folder = memory_folder(options)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
