"""A merge takes the memory that its plan says, however many sources there are, and keeps within `--memory`.

Method: the command in a process of its own, whose greatest resident size the kernel keeps; sources of some 60 MB each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.merge.samples import save

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
RUN = """
import json, resource, sys
from ckpt.cli import run
code = run(sys.argv[2:])
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
status = open("/proc/self/status").read()  # not getrusage: that counts what the process was before its exec
peak = int(status.split("VmHWM:")[1].split()[0])
json.dump({"code": code, "peak": peak * 1024, "child": children * 1024, "torch": "torch" in sys.modules}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.w": (1024, 1024) for i in range(12)} | {"embed": (8192, 512)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for step in range(1, 13):
        save(folder / "run", step, {name: array + np.float32(step) for name, array in base.items()})
    return folder / "run"


def program(folder: Path, *arguments: object) -> dict[str, Any]:
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(report), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["code"] == 0, done.stderr
    return {**found, "out": done.stdout}


def peak(folder: Path, run: Path, name: str, *more: object, steps: str = "1..8") -> tuple[int, int]:
    """(measured, planned) bytes."""
    words = ("merge", f"{run}@{steps}", "-o", folder / name, *more)
    planned = json.loads(program(folder, *words, "--plan", "--json")["out"])["plan"]["peak_memory_bytes"]
    found = program(folder, *words)
    assert not found["torch"], "a merge needs no torch"
    return found["peak"] + (found["child"] * 2 if "--workers" in more else 0), planned


def test_peak_is_within_the_plan_and_does_not_grow_with_the_sources(run: Path, tmp_path: Path) -> None:
    few, planned_few = peak(tmp_path, run, "few", steps="1..2")
    many, planned_many = peak(tmp_path, run, "many", steps="1..12")
    assert few <= planned_few and many <= planned_many
    assert planned_few == planned_many
    assert many < few + 64 * MIB


@pytest.mark.parametrize("more", [(), ("--method", "ties"), ("--method", "ties", "--set", "scope=tensor")])
def test_peak_is_within_what_memory_allows(run: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    base = ("--base", f"{run}@1") if more else ()
    found, planned = peak(tmp_path, run, "out", *more, *base, "--memory", "400MiB", steps="2..9")
    assert found <= planned <= 400 * MIB


def test_peak_of_workers_is_within_the_plan(run: Path, tmp_path: Path) -> None:
    found, planned = peak(tmp_path, run, "out", "--workers", "2", "--memory", "800MiB")
    assert found <= planned <= 800 * MIB


@pytest.mark.parametrize("method", ["tsv_m", "opcm", "doge"])
def test_matrix_methods_say_what_they_take(tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step, {"w": np.random.default_rng(step).standard_normal((800, 800)).astype(np.float32)})
    more = ("--set", "steps=2") if method == "doge" else ()
    found, planned = peak(tmp_path, run, "out", "--method", method, "--base", f"{run}@1", *more, steps="2..3")
    assert found <= planned
