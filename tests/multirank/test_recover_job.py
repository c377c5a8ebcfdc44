"""A job of three ranks is killed, one of its nodes with all that it had: `ckpt recover --to` brings the step back, bit for bit.

Method: a real job under torchrun with an agent per rank, SIGKILL to all trainers and to one agent whose memory is removed; the
command runs on one of the nodes that are left, and one rank loads what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ckpt
from ckpt.agent import discover
from ckpt.agent.owner import Owner
from ckpt.config import Options
from tests.agent.conftest import ROOT, until
from tests.workers.recover_job import STEPS, environment, state_of, tensors

WORLD, LOST = 3, 1


@pytest.fixture
def folder() -> Iterator[Path]:
    """Folders of the nodes; their agents are ended with the test."""
    runtime, memory = (
        Path(tempfile.mkdtemp(prefix="ck", dir="/tmp")),
        Path(tempfile.mkdtemp(prefix="ckpt-test-", dir="/dev/shm")),
    )
    for rank in range(WORLD):
        (runtime / f"r{rank}").mkdir(mode=0o700)
        (memory / f"m{rank}").mkdir()
        (runtime / f"m{rank}").symlink_to(memory / f"m{rank}")
    yield runtime
    for rank in range(WORLD):
        options = options_of(runtime, rank)
        for found in discover.agents(options):
            discover.stop(found, options, force=True)
    left = [path.name for path in memory.rglob("*.seg")]
    shutil.rmtree(runtime)
    shutil.rmtree(memory)
    assert left == []


def options_of(folder: Path, rank: int) -> Options:
    given = environment(folder, rank)
    return Options(
        agent_runtime_folder=given["CKPT_AGENT_RUNTIME_FOLDER"], agent_memory_folder=given["CKPT_AGENT_MEMORY_FOLDER"]
    )


def recover(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckpt", "recover", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment(folder, 0)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.multirank
@pytest.mark.timeout(180)
def test_a_killed_job_with_a_lost_node_is_written_to_a_store_and_loads_on_one_rank(
    folder: Path, tmp_path: Path
) -> None:
    url = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), "-m"]
    job = subprocess.Popen(
        [*command, "tests.workers.recover_job", str(url), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        until(lambda: len(list(folder.glob("*.pid"))) == WORLD or job.poll() is not None, timeout_s=120.0)
        assert job.poll() is None
        pids = [int((folder / f"{rank}.pid").read_text()) for rank in range(WORLD)]
        os.kill(job.pid, signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        job.wait()
        (lost,) = discover.agents(options_of(folder, LOST))
        assert lost.status is not None
        os.kill(lost.status["pid"], signal.SIGKILL)
        until(lambda: Owner.of(lost.status["pid"]) is None)
        for path in (folder / f"m{LOST}").rglob("*.seg"):
            path.unlink()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()

    made = recover(folder, str(url), "--to", str(tmp_path / "out"), "--json")
    verified = subprocess.run(
        [sys.executable, "-m", "ckpt", "verify", str(tmp_path / "out")], cwd=ROOT, capture_output=True, check=False
    )
    state = state_of(list(range(WORLD)))
    loaded = ckpt.load(state, tmp_path / "out")

    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["written"]["decoded_ranks"] == [LOST]
    assert verified.returncode == 0
    found = tensors(state)
    expected = {name: array for rank in range(WORLD) for name, array in np.load(folder / f"{rank}.npz").items()}
    assert found.keys() == expected.keys() and loaded.step == STEPS
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
