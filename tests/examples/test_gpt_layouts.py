"""Goal: the example trains the same model on every layout, before any checkpoint comes in.

Method: the parts of the model are compared in this process; the layouts by real torchrun jobs of a few steps, with a
bound far below what a wrong gradient, a wrong mean or other weights would do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.gpt.model import GPT, ModelConfig, ModelPart, initialise
from examples.rehearsal.launch import ROOT, stop

JOB_S = 150.0  # about 8 on 2 idle cores
STEPS = 5
NUM_RANKS = {"single": 1, "fsdp": 2, "tp_fsdp": 4, "pp": 2}
TOLERANCE = 1e-5  # nats per token; the losses are about 5, their last bit about 5e-7


def losses_of(layout: str, folder: Path, *flags: str) -> list[float]:
    """Train `STEPS` steps, under torchrun where there are several ranks; the losses."""
    log, output = folder / f"{layout}.jsonl", folder / f"{layout}.txt"
    ranks = NUM_RANKS[layout]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    training = ["-m", "examples.gpt.train", "--layout", layout, "--layers", "2", "--warm-up", "2"]
    with output.open("wb") as stream:
        job = subprocess.Popen(
            [sys.executable, *torchrun, *training, "--stop", str(STEPS), "--loss-log", str(log), *flags],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            code = job.wait(JOB_S)
        finally:
            stop(job)
    assert code == 0, output.read_text()
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_every_layout_gives_the_same_losses(tmp_path: Path) -> None:
    expected = losses_of("single", tmp_path)
    assert len(expected) == STEPS
    assert expected[0] - expected[-1] > 0.3  # it learns
    for layout in ("fsdp", "tp_fsdp", "pp"):
        assert losses_of(layout, tmp_path) == pytest.approx(expected, abs=TOLERANCE, rel=0), layout


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_tied_weights_stay_tied_under_tensor_parallelism(tmp_path: Path) -> None:
    expected = losses_of("single", tmp_path, "--tied")
    assert losses_of("tp_fsdp", tmp_path, "--tied") == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_stages_hold_the_whole_model_under_its_global_names() -> None:
    config = ModelConfig(num_layers=3)
    whole = GPT(config)
    initialise(whole, seed=5)
    stages = [
        GPT(config, ModelPart(layer_start=0, layer_stop=2, last=False)),
        GPT(config, ModelPart(layer_start=2, layer_stop=3, first=False)),
    ]
    found = {}
    for stage in stages:
        initialise(stage, seed=5)
        assert not found.keys() & stage.state_dict().keys()
        found.update(stage.state_dict())
    expected = whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stages_in_a_row_compute_what_the_whole_model_does() -> None:
    config = ModelConfig(num_layers=2, context_tokens=16)
    parts = [
        None,
        ModelPart(layer_start=0, layer_stop=1, last=False),
        ModelPart(layer_start=1, layer_stop=2, first=False),
    ]
    whole, front, back = (GPT(config, part) for part in parts)
    for model in (whole, front, back):
        initialise(model, seed=1)
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(back(front(tokens)), whole(tokens))


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = GPT(ModelConfig(num_layers=1, context_tokens=16))
    initialise(model, seed=1)
    tokens = torch.arange(16).view(1, 16)
    changed = tokens.clone()
    changed[0, 9] = 200
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_tied_model_cannot_be_cut_into_stages() -> None:
    with pytest.raises(ValueError, match="tied"):
        GPT(ModelConfig(tied=True), ModelPart(layer_start=0, layer_stop=1, last=False))
