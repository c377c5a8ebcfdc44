"""Goal: `make demo-recovery` shows what it claims, and fails when it does not.

Method: the demo as its own process, on network namespaces where they can be made, and the short one on loopback addresses; its
checks with made-up results, each wrong in one way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.recovery.demo import Expected, Row, compare, judge
from examples.recovery.network import make_network
from examples.recovery.train import undisturbed

ROOT = Path(__file__).resolve().parents[2]
DEMO_S = 450.0  # about 125 on 2 idle cores, 45 of the short one


QUICK = [(None, 4), ("memory", 4), ("memory", 3)]
FULL = [*QUICK, ("memory", 4), ("memory", 4), ("store", 3)]


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(480)
@pytest.mark.parametrize(("network", "expected"), [("namespaces", FULL), ("loopback", QUICK)])
def test_demo_comes_back_each_time(tmp_path: Path, network: str, expected: list[tuple[str | None, int]]) -> None:
    command = [sys.executable, str(ROOT / "examples/recovery/demo.py"), "--out", str(tmp_path)]
    if network == "namespaces":
        made, what = make_network()
        made.close()
        if not what.startswith("network namespaces"):
            pytest.skip(what)
    else:
        command += ["--quick", "--loopback"]
    before = set(Path("/dev/shm").glob("ckpt-demo-*"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEMO_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["timeline"]
    found = [(row["restored"] and row["restored"]["tier"], row["ranks"]) for row in rows]
    assert found == expected or found[4] == ("store", 4)  # a save that ended just then is newer than what memory has
    assert set(Path("/dev/shm").glob("ckpt-demo-*")) <= before


def row(**restored: Any) -> Row:
    values = {"step": 8, "tier": "memory", "lost_ranks": [1], **restored}
    return Row(at_s=1.0, event="a fault", reached=9, kept=8, stored=4, restored=values)


MEMORY = Expected(tier="memory", num_lost=1, world=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, None),
        ({"tier": "store"}, "expected to come back from memory"),
        ({"tier": "store", "step": 10}, None),
        ({"lost_ranks": [1, 2]}, "expected 1 lost ranks"),
        ({"step": 6}, "step 8 was safe"),
    ],
)
def test_fault_with_another_outcome_is_a_problem(wrong: dict[str, Any], message: str | None) -> None:
    problems = judge(row(**wrong), MEMORY)
    assert [message] * bool(message) == [problem[: len(message or "")] for problem in problems]


def test_step_of_the_store_may_not_be_older_than_one_that_was_stored() -> None:
    expected = Expected(tier="store", num_lost=3, world=2)
    assert judge(row(tier="store", step=4), expected) == []
    assert judge(row(tier="store", step=2), expected) == ["step 4 was stored, came back from step 2"]


def test_one_bit_of_a_loss_is_a_problem() -> None:
    losses = undisturbed(3)
    repeated = {step: [loss, loss] for step, loss in losses.items()}
    assert compare(repeated, losses) == []
    assert len(compare({**repeated, 2: [losses[2], losses[2] * (1 + 2**-20)]}, losses)) == 1
    assert compare({1: [losses[1]]}, losses) == ["steps [2, 3] were never done"]
