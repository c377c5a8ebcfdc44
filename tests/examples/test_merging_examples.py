"""Goal: the merging examples run and do what they say. Method: run them, smaller, in this process; all figures are theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ckpt
from examples.merging import adamerging, expert_merging, experts, frank_wolfe, trajectory


@pytest.mark.parametrize(
    "example", [adamerging, frank_wolfe, expert_merging], ids=lambda e: e.__name__.rpartition(".")[2]
)
def test_learned_merge_is_published_and_beats_base_and_experts(example: object, tmp_path: Path) -> None:
    found = example.main(["--out", str(tmp_path), "--steps", "12"])  # type: ignore[attr-defined]
    accuracy = found["accuracy"]
    way = list(accuracy)[-1]
    singles = [value for name, value in accuracy.items() if name == "base" or name.startswith("expert of")]
    assert len(singles) == 1 + len(experts.TASKS) and accuracy[way] > max(singles)
    for name in ("entropy", "disagreement"):
        if name in found:
            before, after = found[name]
            assert after < before
    folder = tmp_path / example.__name__.rpartition(".")[2].replace("_", "-")  # type: ignore[attr-defined]
    with ckpt.open(folder) as merged:
        assert merged.step == len(experts.TASKS) and "model/0.weight" in merged


def test_trajectory_compares_all_ways_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        trajectory, "SEARCHED", {name: {**how, "budget": 8} for name, how in trajectory.SEARCHED.items()}
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{trajectory.BEGIN}\nold\n{trajectory.END}\nafter\n")
    words = ["--seeds", "2", "--epochs", "6", "--snapshots", "4", "--picture", str(tmp_path / "digits.png")]
    results = trajectory.main([*words, "--results", str(tmp_path / "digits.json"), "--page", str(page)])
    assert json.loads((tmp_path / "digits.json").read_text()) == results
    assert [len(one) for one in results] == [2 + len(trajectory.FIXED) + len(trajectory.SEARCHED)] * 2
    assert all(0.5 < value <= 1 for one in results for value in one.values())
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[2:-2] == trajectory.table(results)
