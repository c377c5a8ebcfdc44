"""torchrun kills its workers, and somebody kills torchrun: their agents live on, with what they hold.

Method: a real `torch.distributed.run` with two workers that save into their agents; then SIGKILL to torchrun and, as it does
itself, to its workers' process groups, or the death of one worker, after which torchrun kills the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ckpt.agent import discover
from ckpt.agent.identity import Identity
from ckpt.agent.owner import Owner
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import Options
from tests.agent.conftest import ROOT, until

NBYTES = 64 * 1024


def start_torchrun(folder: Path, run_id: uuid.UUID, options: Options) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    given = [str(folder), run_id.hex, json.dumps(dataclasses.asdict(options))]
    return subprocess.Popen(
        [*command, "tests.workers.agent_rank", *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def told(folder: Path) -> dict[int, dict[str, int]]:
    """What every rank wrote once it had saved."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {one["rank"]: one for one in found}


@pytest.mark.multirank
@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", ["torchrun and its groups", "torchrun alone", "one worker"])
def test_agents_outlive_what_torchrun_kills(options: Options, tmp_path: Path, victim: str) -> None:
    run_id = uuid.uuid4()
    torchrun = start_torchrun(tmp_path, run_id, options)
    try:
        until(lambda: len(told(tmp_path)) == 2, timeout_s=90.0)
        ranks = told(tmp_path)
        if victim == "one worker":
            os.kill(ranks[1]["pid"], signal.SIGKILL)
            torchrun.wait(60)
        else:
            os.kill(torchrun.pid, signal.SIGKILL)
            torchrun.wait()
            for one in ranks.values() if victim == "torchrun and its groups" else ():
                os.killpg(os.getpgid(one["pid"]), signal.SIGKILL)
        if victim == "torchrun alone":  # its workers are orphans now, and end in their own time
            for one in ranks.values():
                os.kill(one["pid"], signal.SIGKILL)
        until(lambda: all(Owner.of(one["pid"]) is None for one in ranks.values()), timeout_s=40.0)

        agents = {found.identity.rank: found for found in discover.agents(options)}
        alive = {
            rank: found.status["pid"] == ranks[rank]["agent_pid"] for rank, found in agents.items() if found.status
        }
        steps = {}
        for rank in (0, 1):
            client = start_or_adopt(Identity(run_id=run_id, rank=rank, world=2), options, epoch=1)
            mapped, described = client.attach(), client.segments()
            whole = [(one.step, bytes(m.memory[: one.image_bytes])) for one, m in zip(described, mapped, strict=True)]
            steps[rank] = [(step, data == bytes([rank + 1]) * NBYTES) for step, data in whole if step >= 0]
            client.bye()
        until(lambda: all(Owner.of(one["agent_pid"]) is None for one in ranks.values()))
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
            torchrun.wait()
    assert alive == {0: True, 1: True}
    assert steps == {0: [(7, True)], 1: [(7, True)]}
