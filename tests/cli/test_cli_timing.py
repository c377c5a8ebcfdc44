"""Goal: `ckpt show --timing` and `ckpt report` say where the time went, also of saves that failed.

Method: runs with synthetic events.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ckpt.config import Options
from ckpt.observe.log import EventLog
from ckpt.store.posix import PosixStore
from tests.cli.conftest import Program
from tests.observe.synthetic import load_events, save_events


@pytest.fixture
def timed(gpt: Path) -> Path:
    """The run with steps 10, 20, 30 and events of 4 ranks; step 40 failed, in step 30 rank 2 was slow to write."""
    shutil.rmtree(gpt / "events", ignore_errors=True)
    told = [
        *(save_events(step, 4, start_s=1_790_000_000.0 + step) for step in (10, 20)),
        save_events(30, 4, start_s=1_790_000_030.0, straggler=(2, "write", 3.0)),
        save_events(40, 4, start_s=1_790_000_040.0, outcome="failed", error="disk full"),
        load_events(30, 4, start_s=1_790_000_050.0),
    ]
    for rank in range(4):
        log = EventLog(PosixStore(gpt, options=Options()), rank=rank, world=4)
        for events in told:
            log.emit([event for event in events if event.rank == rank])
    return gpt


def test_timing_names_the_straggler(timed: Path, program: Program) -> None:
    outcome = program("show", f"{timed}@30", "--timing")

    assert outcome.code == 0
    assert "straggler: rank 2 in write" in outcome.out
    assert [line.split()[:2] for line in outcome.out.splitlines() if line.startswith("write")] == [["write", "4"]]


def test_timing_of_a_run_is_that_of_its_newest_checkpoint(timed: Path, program: Program) -> None:
    document = program("show", timed, "--timing", "--json").document

    assert document["step"] == 30 and document["timing"]["straggler"]["rank"] == 2
    write = next(phase for phase in document["timing"]["phases"] if phase["phase"] == "write")
    assert write["slowest_rank"] == 2 and write["min_s"] <= write["median_s"] < write["max_s"]
    assert [row["rank"] for row in document["timing"]["ranks"]] == [0, 1, 2, 3]


def test_timing_of_a_failed_save_needs_no_checkpoint(timed: Path, program: Program) -> None:
    document = program("show", f"{timed}@40", "--timing", "--json").document

    assert (document["timing"]["outcome"], document["timing"]["error"]) == ("failed", "rank 0: disk full")


def test_timing_of_a_forgotten_step_stays(timed: Path, program: Program) -> None:
    assert program("forget", f"{timed}@10").code == 0
    assert program("gc", timed, "--yes").code == 0
    assert program("ls", timed, "--json").code == 0
    assert program("show", f"{timed}@10", "--timing").code == 0


def test_where_nothing_was_told_the_error_says_so(gpt: Path, tmp_path: Path, program: Program) -> None:
    shutil.rmtree(gpt / "events", ignore_errors=True)
    for command in (("show", f"{gpt}@10", "--timing"), ("report", gpt), ("report", f"{gpt}@10")):
        outcome = program(*command, "--json")
        assert (outcome.code, json.loads(outcome.err)["error"]["kind"]) == (1, "no-events")
    assert program("report", tmp_path / "nowhere").code == 10
    assert program("show", f"{tmp_path / 'nowhere'}@1", "--timing").code == 10
    assert program("show", gpt, "--timing", "--layout").code == 2


def test_report_lists_saves_and_loads(timed: Path, program: Program) -> None:
    outcome = program("report", timed)
    document = program("report", timed, "--json").document

    assert outcome.code == 0 and "4 saves, 1 load" in outcome.out and "rank 2, write" in outcome.out
    assert [(o["operation"], o["step"], o["outcome"]) for o in document["operations"]] == [
        ("save", 10, "ok"),
        ("save", 20, "ok"),
        ("save", 30, "ok"),
        ("save", 40, "failed"),
        ("load", 30, "ok"),
    ]
    assert (document["page"], document["trace"], document["num_lines_skipped"]) == (None, None, 0)


def test_report_writes_page_and_trace(timed: Path, tmp_path: Path, program: Program) -> None:
    page, trace = tmp_path / "report.html", tmp_path / "trace.json"
    document = program("report", f"{timed}@20", "-o", page, "--trace", trace, "--json").document

    assert document["page"] == str(page) and "Chosen save: step 20" in page.read_text()
    assert len([r for r in json.loads(trace.read_text())["traceEvents"] if r["ph"] == "X"]) == document["num_events"]


def test_a_page_that_cannot_be_written_is_an_error(timed: Path, tmp_path: Path, program: Program) -> None:
    outcome = program("report", timed, "-o", tmp_path / "no" / "folder" / "report.html")

    assert outcome.code == 1 and "cannot write" in outcome.err
