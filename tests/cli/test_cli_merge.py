"""`ckpt merge`, `explain` and `export` as a person calls them. Method: real runs; `--json` is checked against the schemas by the
`program` fixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.cli.conftest import Program


def test_merge_explain_and_export(program: Program, gpt: Path, tmp_path: Path) -> None:
    into = tmp_path / "merged"
    done = program("merge", f"{gpt}@10..30", "-o", into, "--weight-by", "loss", "--penalty", 1, "--json").document
    told = program("explain", into, "model/layers.0*", "--json").document
    written = program("export", into, tmp_path / "model", "--json").document

    assert done["target"] == {"url": str(into), "step": 30} and len(done["sources"]) == 3
    assert told["tensors"] and all(one["method"] == "mwa" for one in told["tensors"])
    assert [share["source"] for share in told["tensors"][0]["shares"]] == [f"{gpt}@{step}" for step in (20, 30)]
    with safe_open(tmp_path / "model" / written["files"][0], "np") as file:
        assert len(file.keys()) == written["num_tensors"]


def test_what_people_are_told(program: Program, gpt: Path, tmp_path: Path) -> None:
    made = program("merge", f"{gpt}@10..30", "-o", tmp_path / "merged", "--export", tmp_path / "model", "-q")
    told = program("explain", tmp_path / "merged", "model/embedding.weight")

    assert (made.code, made.err) == (0, "")
    assert "step 30 is in" in made.out and "3 sources merged by uniform" in made.out and "1 file" in made.out
    assert f"0.3333 x {gpt}@10, 0.3333 x {gpt}@20, 0.3333 x {gpt}@30" in told.out


def test_plan_says_all_and_writes_nothing(program: Program, gpt: Path, tmp_path: Path) -> None:
    arguments = ("merge", f"{gpt}@10..30", "-o", tmp_path / "merged", "--plan")
    document = program(*arguments, "--json").document
    shown = program(*arguments).out

    assert document["plan"]["weights"] == [{"weights": [1 / 3] * 3, "num_tensors": 7}]
    assert document["plan"]["read_bytes"] > 0 and document["plan"]["peak_memory_bytes"] > 0
    assert {one["why"] for one in document["plan"]["dropped"]} == {"optimizer state"}
    assert "a floating-point param" in shown and "optimizer state is left out" in shown and "memory:" in shown
    assert not (tmp_path / "merged").exists()


def test_the_table_of_methods(program: Program) -> None:
    found = {one["name"]: one for one in program("merge", "--methods", "--json").document["methods"]}

    assert found["uniform"]["kind"] == "linear" and found["ties"]["kind"] == "elementwise"
    assert {one["name"] for one in found["ties"]["parameters"]} >= {"keep", "scope"}


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("--method", "unifrom"), 2, "unknown-method"),
        (("--method", "ties"), 2, "no-base"),
        (("--weight-by", "accuracy"), 2, "no-metric"),
        (("--weights", "1,-1,0"), 2, "zero-weights"),
        (("--set", "nonsense"), 2, "usage"),
        (("--memory", "1MiB"), 1, "budget"),
    ],
)
def test_errors_come_before_anything_is_written(
    program: Program, gpt: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, kind: str
) -> None:
    outcome = program("merge", f"{gpt}@10..30", "-o", tmp_path / "merged", *arguments, "--json")

    assert (outcome.code, json.loads(outcome.err)["error"]["kind"]) == (code, kind)
    assert not (tmp_path / "merged").exists()


def test_nothing_to_resume_and_a_step_that_exists(program: Program, gpt: Path, tmp_path: Path) -> None:
    program("merge", f"{gpt}@10..30", "-o", tmp_path / "merged")

    assert program("merge", "--resume", tmp_path / "merged").code == 11
    assert program("merge", f"{gpt}@10..30", "-o", tmp_path / "merged").code == 12
    assert program("explain", gpt).code == 11
