"""What the commands print. Method: real runs; `--json` is checked against the schemas by the `program` fixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import ckpt
from ckpt.cli import texts
from ckpt.cli.printer import Printer
from ckpt.layout.files import read_layout
from tests.cli.conftest import Program, save_run


def test_ls_lists_complete_checkpoints_with_their_metrics(program: Program, gpt: Path) -> None:
    found = program("ls", gpt, "--json").document["checkpoints"]
    assert [(c["step"], c["world"], c["metrics"]["loss"], c["error"]) for c in found] == [
        (10, 1, 0.1, None),
        (20, 1, 0.05, None),
        (30, 1, 1 / 30, None),
    ]
    assert all(c["created"].endswith("+00:00") for c in found)
    text = program("ls", f"{gpt}@15..", "--quiet")
    assert [line.split()[0] for line in text.out.splitlines()[2:4]] == ["20", "30"] and text.err == ""


def test_ls_all_shows_what_is_no_checkpoint(program: Program, gpt: Path) -> None:
    program("forget", f"{gpt}@10")
    document = program("ls", gpt, "--all", "--json").document
    assert [c["step"] for c in document["checkpoints"]] == [20, 30]
    assert [(a["step"], a["state"]) for a in document["attempts"]] == [(10, "forgotten")]
    assert "forgotten" in program("ls", gpt, "--all").out


def test_ls_reports_a_damaged_manifest_and_the_rest(program: Program, gpt: Path) -> None:
    manifest = gpt / "step-000000000020" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"a test"', b'"a fest"'))
    outcome = program("ls", gpt, "--json")
    assert outcome.code == 3
    assert [(c["step"], c["error"] is None) for c in outcome.document["checkpoints"]] == [
        (10, True),
        (20, False),
        (30, True),
    ]
    assert "cannot be read" in program("ls", gpt).out


def test_show_says_what_the_manifest_says(program: Program, gpt: Path) -> None:
    shown = program("show", f"{gpt}@20", "--json").document
    with ckpt.open(gpt, step=20) as checkpoint:
        assert (shown["step"], shown["num_tensors"], shown["metadata"]) == (20, len(checkpoint), {"note": "a test"})
    assert {(o["name"], o["kind"]) for o in shown["objects"]} == {
        ("optimizer", "optimizer"),
        ("progress", "replicated"),
        ("rng", "rank"),
    }
    assert "metric loss:" in program("show", gpt).out


def test_show_layout_prints_a_layout_file_that_reads_back(program: Program, gpt: Path, tmp_path: Path) -> None:
    target = tmp_path / "two"
    assert program("reshard", gpt, target, "--dp", 2).code == 0
    text = program("show", target, "--layout").out
    document = program("show", target, "--layout", "--json").document["layout"]
    assert read_layout(text) == read_layout(yaml.safe_dump(document))
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert program("reshard", gpt, tmp_path / "three", "--layout", again).code == 0
    assert program("diff", target, tmp_path / "three", "--exit-code").code == 0


def test_tensors_lists_names_by_glob(program: Program, gpt: Path) -> None:
    found = program("tensors", gpt, "model/layers.*.weight", "--json").document["tensors"]
    assert [(t["name"], t["shape"], t["dtype"]) for t in found] == [
        ("model/layers.0.attention.wq.weight", [8, 8], "float32"),
        ("model/layers.0.norm.weight", [8], "float32"),
        ("model/layers.1.attention.wq.weight", [8, 8], "float32"),
        ("model/layers.1.norm.weight", [8], "float32"),
    ]
    assert program("tensors", gpt, "nothing*", "--json").document["tensors"] == []


def test_names_from_a_checkpoint_cannot_steer_the_terminal(program: Program, tmp_path: Path) -> None:
    ckpt.save({"t": {"\x1b[2Jgone": torch.zeros(1)}}, tmp_path / "run", step=1)
    assert "\x1b" not in program("tensors", tmp_path / "run").out


def test_diff_tells_added_removed_reshaped_and_changed(program: Program, tmp_path: Path) -> None:
    before = {
        "same": torch.ones(5),
        "changed": torch.zeros(3),
        "reshaped": torch.zeros(2, 3),
        "removed": torch.zeros(1),
    }
    after = {"same": torch.ones(5), "changed": torch.ones(3), "reshaped": torch.zeros(3, 2), "added": torch.zeros(1)}
    ckpt.save({"t": before, "count": {"n": 1}, "old": {"x": 1}}, tmp_path / "run", step=1)
    ckpt.save({"t": after, "count": {"n": 2}, "new": {"x": 1}}, tmp_path / "run", step=2)
    found = program("diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2", "--json").document
    tensors, objects = found["tensors"], found["objects"]
    assert not found["same"]
    assert (tensors["added"], tensors["removed"], tensors["changed"]) == (["t/added"], ["t/removed"], ["t/changed"])
    assert [item["name"] for item in tensors["reshaped"]] == ["t/reshaped"] and tensors["num_same"] == 1
    assert {"old"} <= set(objects["removed"]) and {"new"} <= set(objects["added"]) and "count" in objects["changed"]
    assert program("diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2", "--exit-code").code == 1


def test_diff_reads_tensors_that_are_cut_differently(program: Program, gpt: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    program("reshard", f"{gpt}@20", cut, "--dp", 3)
    assert program("diff", f"{gpt}@20", cut, "--json").document["same"]
    changed = program("diff", f"{gpt}@30", cut, "--json").document["tensors"]
    with ckpt.open(gpt, step=20) as a, ckpt.open(gpt, step=30) as b:
        expected = sorted(name for name in a if not torch.equal(a[name][...], b[name][...]))
    assert changed["changed"] == expected and len(expected) > 5


def test_plan_says_what_each_rank_reads_and_writes_nothing(program: Program, gpt: Path) -> None:
    before = sorted(path for path in gpt.rglob("*"))
    document = program("plan", f"{gpt}@10", "--dp", 2, "--json").document
    assert [rank["coordinate"]["dp"] for rank in document["ranks"]] == [0, 1]
    assert document["reshard"]["wanted_bytes"] == document["tensor_bytes"] == document["reshard"]["read_bytes"]
    assert all(len(rank["files"]) == 1 for rank in document["ranks"])
    assert "reshard in one process" in program("plan", gpt, "--dp", 2).out
    assert sorted(path for path in gpt.rglob("*")) == before


def test_doctor_tests_the_core_and_a_store_and_leaves_nothing(program: Program, gpt: Path) -> None:
    before = sorted(path for path in gpt.rglob("*"))
    document = program("doctor", gpt, "--json").document
    assert document["ok"] and {c["name"] for c in document["checks"]} >= {"crc32c", "box copy", "conditional create"}
    assert sorted(path for path in gpt.rglob("*")) == before
    assert program("doctor").code == 0


def test_data_go_to_stdout_and_all_else_to_stderr_of_the_real_program(saved_runs: Path) -> None:
    command = [sys.executable, "-m", "ckpt"]
    env = {**os.environ, "TZ": "Asia/Tokyo"}
    good = subprocess.run([*command, "ls", str(saved_runs / "gpt"), "--json"], capture_output=True, env=env, timeout=60)
    bad = subprocess.run([*command, "show", str(saved_runs / "gpt@7")], capture_output=True, env=env, timeout=60)
    assert (good.returncode, good.stderr, bad.returncode, bad.stdout) == (0, b"", 11, b"")
    assert len(json.loads(good.stdout)["checkpoints"]) == 3
    lines = bad.stderr.decode().splitlines()
    assert lines[0].startswith("error: no complete checkpoint of step 7") and lines[1].startswith("  run:")
    assert lines[2] == "" and lines[3].startswith("hint: ckpt ls")


def test_progress_is_a_line_every_ten_seconds_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Printer(clock=lambda: now[0]).progress("verify", 4 * 1024**3) as bar:
        for _ in range(41):
            now[0] += 1.0
            bar.advance(100 * 1024**2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0] == "verify: 1000.0 MiB of 4.0 GiB (24 %), 100.0 MiB/s, 31 s left"
    with Printer(clock=lambda: now[0], quiet=True).progress("verify", 100) as bar:
        now[0] += 100
        bar.advance(100)
    assert capsys.readouterr().err == ""


def test_metrics_that_json_lacks_stay_valid_json(program: Program, tmp_path: Path) -> None:
    ckpt.save({"t": {"x": torch.zeros(1)}}, tmp_path / "run", step=1, metrics={"loss": float("nan")})
    assert program("ls", tmp_path / "run", "--json").document["checkpoints"][0]["metrics"] == {"loss": "NaN"}


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**50, "1.0 PiB")]
)
def test_sizes_are_in_binary_units(nbytes: int, text: str) -> None:
    assert texts.size(nbytes) == text


@pytest.mark.parametrize(("text", "nbytes"), [("4GiB", 4 * 2**30), ("512M", 2**29), ("7", 7), ("1.5 KiB", 1536)])
def test_sizes_are_read_in_binary_units(text: str, nbytes: int) -> None:
    assert texts.parse_size(text) == nbytes


def test_save_run_is_deterministic(tmp_path: Path, saved_runs: Path, program: Program) -> None:
    save_run(tmp_path / "again", steps=(10,))
    tensors = program("diff", f"{tmp_path}/again@10", f"{saved_runs}/gpt@10", "--json").document["tensors"]
    assert tensors["changed"] == []
