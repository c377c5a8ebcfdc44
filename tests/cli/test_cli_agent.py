"""`ckpt agent` runs, lists and ends agents, and gives back what dead ones left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.agent.identity import Identity, places, run_id_of
from ckpt.agent.local import Client
from ckpt.agent.owner import Owner
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import from_environment
from tests.cli.conftest import Program, check_schema


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Agents of this test only."""
    runtime = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="ckpt-test-", dir="/dev/shm"))
    for name, value in {"RUNTIME_FOLDER": runtime, "MEMORY_FOLDER": memory, "RESERVE_BYTES": 0, "LEASE_S": 30}.items():
        monkeypatch.setenv(f"CKPT_AGENT_{name}", str(value))
    yield memory
    left = [path.name for path in memory.rglob("*.seg")]
    shutil.rmtree(memory)
    shutil.rmtree(runtime)
    assert left == []


def started(url: str, rank: int) -> Client:
    client = start_or_adopt(Identity(run_id=run_id_of(url), rank=rank, world=2), from_environment())
    for mapped in client.reserve(4096):
        mapped.close()
    client.seal(client.begin(7, "a" * 16), 4096)
    return client


def test_status_tells_agents_and_what_they_hold_and_what_dead_ones_left(program: Program) -> None:
    clients = [started("s3://bucket/run", rank) for rank in (0, 1)]
    pids = [client.agent["pid"] for client in clients]
    os.kill(pids[1], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Owner.of(pids[1]) is not None and time.monotonic() < deadline:
        time.sleep(0.01)

    found = program("agent", "status", "s3://bucket/run", "--json").document
    elsewhere = program("agent", "status", "s3://bucket/other", "--json").document
    table = program("agent", "status").out
    refused = program("agent", "stop", "s3://bucket/run", "--json")
    unsure = program("agent", "stop", "s3://bucket/run", "--yes", "--json")
    stopped = program("agent", "stop", "--all", "--yes", "--force", "--json").document

    (agent,) = found["agents"]
    sealed = [(one["step"], one["state"], one["image_bytes"]) for one in agent["segments"] if one["step"] >= 0]
    assert (agent["pid"], agent["rank"], agent["trainer_pid"], sealed) == (
        pids[0],
        0,
        os.getpid(),
        [(7, "SEALED", 4096)],
    )
    assert agent["pss_bytes"] > 1 << 20
    assert sorted(left["step"] for left in found["leftovers"]) == [-1, 7]
    assert (elsewhere["agents"], elsewhere["leftovers"]) == ([], [])
    assert "7 sealed 4.0 KiB" in table and "1 agent" in table
    assert refused.code == 2
    assert unsure.code == 3 and unsure.document["failed"][0]["kind"] == "trainer-there"
    assert stopped["num_stopped"] == 1 and Owner.of(pids[0]) is None
    for client in clients:
        client.close()


def test_run_is_an_agent_in_the_foreground(program: Program) -> None:
    url, options = "s3://bucket/front", from_environment()
    identity = Identity(run_id=run_id_of(url), rank=0, world=1)
    command = [sys.executable, "-m", "ckpt", "agent", "run", url, "--rank", "0", "--world", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        deadline = time.monotonic() + 60
        while not places(identity, options).socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        client = start_or_adopt(identity, options)
        is_it = client.agent["pid"] == agent.pid
        lean = "torch" not in Path(f"/proc/{agent.pid}/maps").read_text()
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        client.close()
        stopped = program("agent", "stop", url, "--yes")
        out, _ = agent.communicate(timeout=20)
    assert is_it and stopped.code == 0 and agent.returncode == 0
    check_schema(json.loads(out), "agent")
    check_schema(json.loads(second.stderr), "error")
    assert json.loads(out)["reason"] == "stop was asked for" and lean
    assert second.returncode == 12 and str(agent.pid) in second.stderr


@pytest.mark.parametrize("arguments", [("run", "url"), ("stop",), ("stop", "url", "--all"), ("dance",)])
def test_wrong_usage_is_told(program: Program, arguments: tuple[str, ...]) -> None:
    assert program("agent", *arguments).code == 2
