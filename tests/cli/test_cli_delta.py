"""`ckpt delta` and `ckpt lora` as a person calls them. Method: real runs; `--json` is checked against the schemas by the
`program` fixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Program


def test_a_delta_is_made_shown_and_applied(program: Program, gpt: Path, tmp_path: Path) -> None:
    made = program("delta", "make", f"{gpt}@30", "--base", f"{gpt}@20", "-o", tmp_path / "d", "--json").document
    shown = program("delta", "show", tmp_path / "d", "--json").document
    back = program("delta", "apply", tmp_path / "d", "--base", f"{gpt}@20", "-o", tmp_path / "back", "--json").document

    assert made["target"]["step"] == back["target"]["step"] == 30 and made["max_abs_error"] == 0.0
    assert len(shown["tensors"]) == made["tasks"][0]["num_tensors"]
    assert program("diff", f"{gpt}@30", f"{tmp_path}/back@30", "-q").code == 0


def test_what_people_are_told_of_a_delta(program: Program, gpt: Path, tmp_path: Path) -> None:
    sources = (f"{gpt}@20", f"{gpt}@30")
    made = program("delta", "make", *sources, "--base", f"{gpt}@10", "-o", tmp_path / "d", "--method", "tall")
    table = program("delta", "show", tmp_path / "d").out
    back = program(
        "delta", "apply", tmp_path / "d", "--base", f"{gpt}@10", "-o", tmp_path / "back", "--task", sources[0]
    )

    assert made.code == back.code == 0
    assert "2 fine-tunes by tall" in made.out and "of their change" in made.out
    assert "optimizer state is left out" in made.err
    assert "mask" in table and "that they share" in table and f"{gpt}@20" in back.out


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("make", "RUN@30", "-o", "OUT"), 2, "usage"),
        (("make", "RUN@30", "--base", "RUN@20"), 2, "usage"),
        (("make", "RUN@30", "--base", "RUN@20", "-o", "OUT", "--task", "1"), 2, "usage"),
        (("make", "RUN@30", "--base", "RUN@20", "-o", "OUT", "--method", "compeft", "--scale", "big"), 2, "usage"),
        (("make", "RUN@30", "RUN@20", "--base", "RUN@10", "-o", "OUT"), 2, "wrong-number"),
        (("apply", "RUN@30", "RUN@20", "--base", "RUN@10", "-o", "OUT"), 2, "usage"),
        (("apply", "RUN@30", "--base", "RUN@10", "-o", "OUT"), 11, "not-a-delta"),
        (("show", "RUN@30"), 11, "not-a-delta"),
        (("show", "RUN@30", "--base", "RUN@10"), 2, "usage"),
    ],
)
def test_errors_of_delta_come_before_anything_is_written(
    program: Program, gpt: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, kind: str
) -> None:
    words = [word.replace("RUN", str(gpt)).replace("OUT", str(tmp_path / "out")) for word in arguments]
    outcome = program("delta", *words, "--json")

    assert (outcome.code, json.loads(outcome.err)["error"]["kind"]) == (code, kind)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        tensors = {
            f"base_model.model.layers.0.attention.wq.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "one", tmp_path / "two"


def test_adapters_are_merged_and_exported(
    program: Program, adapters: tuple[Path, Path], gpt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = program("lora", *adapters, "-o", f"{out}@5", "--export", tmp_path / "peft", "--json").document
    told = program("lora", *adapters, "-o", f"{out}@6", "--method", "svd", "--rank", 1, "-q")
    folded = program("lora", *adapters, "-o", f"{out}@7", "--method", "fold", "--base", f"{gpt}@10", "--json").document
    written = program("export", f"{out}@6", tmp_path / "again", "--peft", "--json").document

    assert done["modules"][0]["rank"] == 4 and done["error"] < 1e-15 and done["target"]["step"] == 5
    assert "rank 1; the change of no module is off by more than" in told.out
    assert folded["num_modules"] == 1 and folded["modules"] == []
    assert written["files"] == ["adapter_model.safetensors", "adapter_config.json"]
    assert {tensor.shape for tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").values()} == {
        (4, 8),
        (8, 4),
    }


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("--method", "fold"), 2, "no-base"),
        (("--method", "factors"), 2, "no-shared-factor"),
        (("--rank", "3"), 2, "usage"),
        (("--weights", "1"), 2, "usage"),
        (("--adapter-config", "absent.json"), 2, "usage"),
        (("--memory", "1MiB"), 1, "budget"),
    ],
)
def test_errors_of_lora_come_before_anything_is_written(
    program: Program, adapters: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, ...], code: int, kind: str
) -> None:
    outcome = program("lora", *adapters, "-o", tmp_path / "out", *arguments, "--json")

    assert (outcome.code, json.loads(outcome.err)["error"]["kind"]) == (code, kind)
    assert not (tmp_path / "out").exists()


def test_export_of_an_adapter_needs_its_config(program: Program, gpt: Path, tmp_path: Path) -> None:
    outcome = program("export", gpt, tmp_path / "out", "--peft", "--json")
    assert (outcome.code, json.loads(outcome.err)["error"]["kind"]) == (2, "no-config")
    assert program("export", gpt, tmp_path / "out", "--adapter", "x").code == 2
