"""Goal: every benchmark runs from end to end and reports what the issue asks for. Method: each one in processes of its own, with
sizes so small that the figures mean nothing; the report is read back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.plot import draw
from ckpt.kernels import choice

ROOT = Path(__file__).resolve().parents[2]


def report(name: str, folder: Path) -> dict[str, Any]:
    """Run one benchmark tiny and give its report; the scratch folder must be empty afterwards."""
    file, scratch = folder / "report.json", folder / "scratch"
    command = [sys.executable, "-m", "bench", "--tiny", "--only", name, "--dir", str(scratch), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(scratch.iterdir()) == []
    found = json.loads(file.read_text())
    assert {"cores", "memory_gib", "kernel", "file_system", "versions"} <= set(found["machine"])
    one: dict[str, Any] = found["benchmarks"][name]
    return one


def test_planning_reports_seconds_and_bytes_beside_those_of_dcp(tmp_path: Path) -> None:
    found = report("planning", tmp_path)

    assert found["results"]["index"]["bytes"] > 0
    assert found["dcp"]["coordinator_s"] > 0
    assert found["ratios"]["dcp .metadata / index, per shard"] > 1


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_reshard_reports_every_pair_of_layouts(tmp_path: Path) -> None:
    pairs = report("reshard_bytes", tmp_path)["pairs"]

    assert {source: set(row) for source, row in pairs.items()} == {source: set(pairs) for source in pairs}
    assert all(0 < pair["ratio"] < 1.2 for row in pairs.values() for pair in row.values())  # tiny: whole blocks count


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_small_reports_saves_and_loads_of_all_systems(tmp_path: Path) -> None:
    found = report("small", tmp_path)

    assert {"ckpt", "dcp", "safetensors+fsync", "direct I/O"} <= set(found["results"]["save"])
    assert found["ratios"]["save"]["dcp"] > 0 and found["ratios"]["load, cold"]["dcp"] > 0


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_gpt_reports_every_kind_of_load_and_of_async_save(tmp_path: Path) -> None:
    tasks = report("gpt", tmp_path)["results"]

    loads = {f"load {kind}, {cache}" for kind in ("same layout", "to TP", "to 1 rank") for cache in ("cold", "warm")}
    assert set(tasks) == {"save", "async save, stall", "async save, durable", *loads}
    assert all({"ckpt", "dcp"} <= set(systems) for systems in tasks.values())


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_training_reports_what_each_system_takes_from_a_loop(tmp_path: Path) -> None:
    variants = report("training", tmp_path)["variants"]

    assert [title.split(",")[0] for title in variants] == ["gpt", "gpt", "small"]
    for found in variants.values():
        assert {"nothing", "ckpt", "dcp.async_save", "dcp.async_save, stager kept"} <= set(found["results"])
        saved = [row for name, row in found["results"].items() if name != "nothing"]
        figures = {"overhead_median_s", "stall_median_s", "tail_median_s", "cpu_extra_median_s", "step_median_s"}
        assert all(figures <= set(row) for row in saved)
        assert all(rate > 0 for rate in found["limits"].values())
    assert {"ckpt, blocking", "dcp.save"} <= set(variants[next(iter(variants))]["results"])


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_first_reports_the_first_save_of_a_process_beside_the_others(tmp_path: Path) -> None:
    results = report("first", tmp_path)["results"]

    assert set(results) == {"ckpt, blocking", "ckpt, background", "ckpt, not prepared", "dcp.save"}
    assert all(row["first_s"] > 0 and row["first_ratio"] > 0 for row in results.values())


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_host_memory_reports_the_peak_beside_the_budget(tmp_path: Path) -> None:
    results = report("host_memory", tmp_path)["results"]

    assert results["ckpt, 2 images"]["budget_mb"] == pytest.approx(
        2 * results["ckpt, 1 image"]["budget_mb"], abs=0.2
    )  # rounded
    assert all(row["extra_mb"] > 0 for row in results.values())


@pytest.mark.multirank
@pytest.mark.timeout(300)
def test_s3_reports_ckpt_beside_bare_objects(tmp_path: Path) -> None:
    tasks = report("s3", tmp_path)["results"]

    assert {task: set(systems) for task, systems in tasks.items()} == {
        "save": {"ckpt", "bare objects"},
        "load": {"ckpt", "bare objects"},
    }


def test_a_report_is_drawn_as_one_picture(tmp_path: Path) -> None:
    row = {"ckpt": {"median_s": 1.0}, "dcp": {"median_s": 2.0}}
    draw({"benchmark": "any", "machine": {}, "results": {"save": row, "load": row}}, tmp_path / "out" / "any.png")

    assert (tmp_path / "out" / "any.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif("isal" not in choice.coders_available(), reason="ISA-L is not installed")
def test_erasure_reports_the_share_of_the_raw_rate(tmp_path: Path) -> None:
    made = report("erasure", tmp_path)
    assert len(made["results"]) == 8
    for rows in made["results"].values():
        assert rows["ours"]["of_raw"] > 0 and rows["ISA-L, same tile"]["of_raw"] == 1


@pytest.mark.timeout(300)
def test_merge_reports_time_and_memory_beside_mere_reading_and_writing(tmp_path: Path) -> None:
    found = report("merge", tmp_path)

    assert set(found["results"]) == {"checkpoints", "linear", "ties"}
    rows = [row for systems in found["results"].values() for row in systems.values()]
    assert all(row["median_s"] > 0 and row["peak_mb"] > row["peak_anonymous_mb"] > 0 for row in rows)
    assert "read and write, one pipeline: speed" in found["ratios"]["checkpoints"]


def test_transport_reports_rates_and_cpu_seconds_beside_flight_and_tcp(tmp_path: Path) -> None:
    found = report("transport", tmp_path)

    assert [set(systems) for systems in found["sizes"].values()] == [{"ckpt", "flight", "tcp"}]
    assert all(figures["gb_per_s"] > 0 for figures in found["sizes"]["4 MiB"].values())
