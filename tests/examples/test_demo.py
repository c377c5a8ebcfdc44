"""Goal: `make demo` shows what it claims, and fails when it does not.

Method: the short demo as its own process; its checks with made-up results, each wrong in one way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.rehearsal.launch import ROOT, DemoError, Outcome, check_course, newest_checkpoint, stop
from examples.rehearsal.phases import SAVE_EVERY, Phase, script
from examples.rehearsal.report import LOSS_TOLERANCE, judge

DEMO_S = 540.0  # about 70 on 2 idle cores
UNDISTURBED, KILLED, SAME_LAYOUT, FSDP, STAGES, SINGLE = script(quick=True).phases


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_quick_demo_resumes_on_every_layout(tmp_path: Path) -> None:
    out, output = tmp_path / "demo", tmp_path / "output.txt"
    with output.open("wb") as stream:
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--quick", "--out", str(out)]
        demo = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code = demo.wait(DEMO_S)
        finally:
            stop(demo)
    assert code == 0, output.read_text()
    phases = {row["phase"]: row for row in json.loads((out / "report.json").read_text())["phases"]}
    assert [row["layout"] for row in phases.values()] == ["tp_fsdp"] * 3 + ["fsdp", "pp", "single"]
    assert phases["killed"]["newest_checkpoint"] == phases["killed"]["killed_in_save_of"] - SAVE_EVERY
    assert phases["same layout"]["max_loss_difference"] == phases["killed"]["max_loss_difference"] == 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def outcome(phase: Phase, *, first: int | None = None, last: int | None = None, newest: int | None = None) -> Outcome:
    """What a good run of `phase` gives, but for what is passed."""
    steps = range(phase.resumes_from + 1 if first is None else first, (phase.stop if last is None else last) + 1)
    good = phase.stop if phase.kill_at is None else phase.kill_at - SAVE_EVERY
    losses = {step: 3.0 for step in steps}
    return Outcome(phase=phase, losses=losses, seconds=1.0, newest_checkpoint=good if newest is None else newest)


def test_difference_beyond_the_bound_is_a_violation() -> None:
    reference, close, equal = outcome(UNDISTURBED), outcome(FSDP), outcome(SAME_LAYOUT)
    assert all(verdict.holds for verdict in judge([reference, close, equal]))
    close.losses[FSDP.stop] += 2 * LOSS_TOLERANCE
    equal.losses[UNDISTURBED.stop] += 1e-12
    assert [verdict.holds for verdict in judge([reference, close, equal])] == [True, False, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": 1}, "should resume from"),
        ({"last": FSDP.stop - 1}, "should end with step"),
        ({"newest": FSDP.stop - SAVE_EVERY}, "should end with step"),
    ],
)
def test_phase_with_another_course_is_refused(tmp_path: Path, wrong: dict[str, int], message: str) -> None:
    (tmp_path / "out.txt").write_text("")
    check_course(outcome(FSDP), tmp_path, 0, tmp_path / "out.txt")
    with pytest.raises(DemoError, match=message):
        check_course(outcome(FSDP, **wrong), tmp_path, 0, tmp_path / "out.txt")


def test_kill_must_be_real_in_a_save_and_leave_nothing_visible(tmp_path: Path) -> None:
    assert KILLED.kill_at is not None
    output = tmp_path / "out.txt"
    output.write_text("      exitcode  : -9 (pid: 7)\n")
    with pytest.raises(DemoError, match="no partial file"):
        check_course(outcome(KILLED), tmp_path, 1, output)
    partial = tmp_path / f"step-{KILLED.kill_at:012d}" / "attempt"
    partial.mkdir(parents=True)
    (partial / "00003-of-00004.safetensors").touch()
    check_course(outcome(KILLED), tmp_path, 1, output)
    with pytest.raises(DemoError, match="newest checkpoint after the kill"):
        check_course(outcome(KILLED, newest=KILLED.kill_at), tmp_path, 1, output)
    output.write_text("      exitcode  : 1 (pid: 7)\n")
    with pytest.raises(DemoError, match="SIGKILL"):
        check_course(outcome(KILLED), tmp_path, 1, output)


def test_only_a_step_with_a_manifest_is_a_checkpoint(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        (tmp_path / f"step-{step:012d}").mkdir()
    assert newest_checkpoint(tmp_path) == 0
    for step in (4, 8):
        (tmp_path / f"step-{step:012d}" / "manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 8


def test_scripts_of_both_lengths_cover_all_layouts() -> None:
    for plan in (script(quick=False), script(quick=True)):
        interrupted = [phase for phase in plan.phases if phase.run == "gpt"]
        assert [phase.layout for phase in interrupted] == ["tp_fsdp", "fsdp", "pp", "single"]
        assert [phase.resumes_from for phase in interrupted[2:]] == [phase.stop for phase in interrupted[1:-1]]
        assert plan.phases[-1].stop == plan.phases[0].stop == plan.steps
