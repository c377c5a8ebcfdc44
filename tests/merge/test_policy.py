"""What is not combined: buffers, statistics, scales, ties, padding, optimizer state, objects, random streams.

Method: a model with one of each, trained for some steps by torch; each kind against what the table of the documentation says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckpt
from ckpt.errors import InvalidInputError, MismatchError
from ckpt.format.objects import decode
from tests.merge.samples import bits, cast, doubles, merged, opened, save

STEPS = (10, 20, 30)


class Net(nn.Module):
    """Batch normalisation, integer and bool buffers, a constant table, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(8))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("inv_freq", torch.arange(4, dtype=torch.float32) / 4)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("amax_history", torch.zeros(5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(self.conv(self.embedding(tokens))))


class Masters(torch.optim.AdamW):
    """AdamW that keeps an fp32 copy of each parameter, as optimizers for bfloat16 do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if self.state[param]:
                    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
                    self.state[param]["master_param"] = param.detach().float() + 1e-4 * noise


def train(url: Path, *, dtype: torch.dtype = torch.float32, masters: bool = False) -> list[dict[str, torch.Tensor]]:
    """A run with everything in it; all its tensors, step by step."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = (Masters if masters else torch.optim.AdamW)(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "rng": ckpt.RNG(),
        "progress": {"tokens": 0},
    }
    out = []
    for step in STEPS:
        model(torch.randint(0, 11, (16,))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        model.positions += 1
        model.average += step
        model.amax_history[0] = step
        state["progress"]["tokens"] = step * 100  # type: ignore[index]
        ckpt.save(state, url, step=step)
        out.append(opened(url, step))
    return out


def mean(sources: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return cast(
        (doubles(sources[0], name) + doubles(sources[1], name) + doubles(sources[2], name)) / 3, sources[0][name].dtype
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_state_by_the_table(run: Path, tmp_path: Path) -> None:
    sources = train(run)
    found, _ = merged(f"{run}@0..", tmp_path / "out")
    newest = sources[-1]
    for name in ("embedding.weight", "conv.weight", "conv.bias", "norm.weight", "norm.running_mean", "average"):
        assert bits(found[name]) == bits(mean(sources, name)), name
    for name in ("positions", "mask", "norm.num_batches_tracked", "amax_history", "inv_freq"):
        assert bits(found[name]) == bits(newest[name]), name
    pooled = sum(doubles(s, "norm.running_var") + doubles(s, "norm.running_mean") ** 2 for s in sources) / 3
    pooled = pooled - (sum(doubles(s, "norm.running_mean") for s in sources) / 3) ** 2
    np.testing.assert_allclose(found["norm.running_var"].numpy(), pooled, rtol=1e-6)
    assert not any(name.startswith("optimizer/") for name in found)
    assert sorted(found) == sorted(n for n in newest if not n.startswith("optimizer/"))


def test_tied_weights_are_merged_and_stored_once(run: Path, tmp_path: Path) -> None:
    train(run)
    ckpt.merge(f"{run}@0..", tmp_path / "out")
    with ckpt.open(tmp_path / "out") as checkpoint:
        names = [name for name in checkpoint if "weight" in name]
        assert "model/output.weight" not in names
        assert checkpoint["model/output.weight"].spec.name == "model/embedding.weight"
    model = Net()
    ckpt.load({"model": model}, tmp_path / "out")
    assert model.output.weight is model.embedding.weight


def test_untied_weights_in_one_source_are_found_by_either_name(run: Path, tmp_path: Path) -> None:
    train(run)
    other = opened(run, 30)
    arrays = {name: t.numpy() for name, t in other.items() if not name.startswith("optimizer/")}
    arrays["output.weight"] = arrays.pop("embedding.weight")
    save(tmp_path / "other", 40, arrays)
    ckpt.merge([f"{tmp_path}/other", f"{run}@30"], tmp_path / "out", rules=[{"match": "norm.**", "policy": "newest"}])


def test_objects_come_from_the_newest_and_random_streams_are_new(run: Path, tmp_path: Path) -> None:
    train(run)
    ckpt.merge(f"{run}@0..", tmp_path / "out")
    ckpt.merge(f"{run}@0..", tmp_path / "same")
    ckpt.merge(f"{run}@0..", tmp_path / "other", seed=1)

    def objects(url: Path) -> dict[str, Any]:
        with ckpt.open(url) as checkpoint:
            return {name: checkpoint.read_object(name) for name, _ in checkpoint.objects()}

    found = objects(tmp_path / "out")
    assert sorted(found) == ["progress", "rng", "scheduler"]
    assert found["progress"] == {"tokens": 3000} and found["scheduler"]["last_epoch"] == 3
    assert set(found["rng"]) == {"seed"}
    assert found["rng"] == objects(tmp_path / "same")["rng"] != objects(tmp_path / "other")["rng"]
    state = {"model": Net(), "rng": ckpt.RNG(), "progress": {"tokens": 0}}
    ckpt.load(state, tmp_path / "out")
    assert state["progress"] == {"tokens": 3000}


def test_training_goes_on_from_a_result_with_optimizer_state(run: Path, tmp_path: Path) -> None:
    sources = train(run)
    ckpt.merge(f"{run}@0..", tmp_path / "out", optimizer="newest")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
    ckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "out")
    slots = optimizer.state[model.conv.weight]
    assert bits(slots["exp_avg_sq"]) == bits(sources[-1]["optimizer/conv.weight/exp_avg_sq"])
    assert slots["step"].item() == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**3)


def test_combined_optimizer_state_never_averages_the_step(run: Path, tmp_path: Path) -> None:
    sources = train(run)
    found, _ = merged(f"{run}@0..", tmp_path / "out", optimizer="combine")
    for slot in ("exp_avg", "exp_avg_sq"):
        name = f"optimizer/conv.weight/{slot}"
        assert bits(found[name]) == bits(mean(sources, name))
    assert found["optimizer/conv.weight/step"].item() == 3


def test_second_moments_refuse_negative_weights(run: Path, tmp_path: Path) -> None:
    train(run)
    with pytest.raises(InvalidInputError, match="second moment"):
        ckpt.merge(f"{run}@0..", tmp_path / "out", weights=[-1, 1, 1], optimizer="combine")
    ckpt.merge(f"{run}@0..", tmp_path / "out", weights=[-1, 1, 1], optimizer="newest")


def test_parameters_are_made_from_master_copies(run: Path, tmp_path: Path) -> None:
    sources = train(run, dtype=torch.bfloat16, masters=True)
    name, master = "conv.weight", "optimizer/conv.weight/master_param"
    found, _ = merged(f"{run}@0..", tmp_path / "out", optimizer="newest")
    total = sum(doubles(s, master) for s in sources) / 3
    assert found[name].dtype == torch.bfloat16
    assert bits(found[name]) == bits(cast(total, torch.bfloat16))  # type: ignore[arg-type]
    assert bits(found[master]) == bits(cast(total, torch.float32))  # type: ignore[arg-type]
    assert bits(found[name]) == bits(found[master].to(torch.bfloat16))
    without, _ = merged({"run": str(run), "steps": "0.."}, tmp_path / "off", optimizer="drop", dtype="float32")
    assert bits(without[name]) == bits(found[master])


def test_a_rule_names_the_slot_of_master_copies(run: Path, tmp_path: Path) -> None:
    sources = train(run, dtype=torch.bfloat16, masters=True)
    recipe = tmp_path / "recipe.yaml"
    for number, (masters, slot) in enumerate((("none", ""), ("exp_avg", "optimizer/conv.weight/exp_avg"))):
        recipe.write_text(f"recipe: 1\nsources: ['{run}@0..']\nmethod: uniform\nstate: {{masters: {masters}}}\n")
        found, _ = merged(recipe, tmp_path / f"out{number}")
        assert bits(found["conv.weight"]) == bits(
            cast(sum(doubles(s, slot or "conv.weight") for s in sources) / 3, torch.bfloat16)  # type: ignore[arg-type]
        )


def test_constant_tables_that_differ_are_an_error(run: Path, tmp_path: Path) -> None:
    train(run)
    arrays = {n: t.numpy().copy() for n, t in opened(run, 30).items() if not n.startswith("optimizer/")}
    arrays["inv_freq"][0] = 9
    save(run, 40, arrays)
    with pytest.raises(MismatchError, match="inv_freq.*should be the same"):
        ckpt.merge(f"{run}@20..40", tmp_path / "out")
    rule = {"match": "inv_freq", "policy": "newest"}
    found, _ = merged(f"{run}@20..40", tmp_path / "out", rules=[rule])
    assert found["inv_freq"][0] == 9


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ({"match": "conv.*", "policy": "newest"}, "conv.weight", "newest"),
        ({"match": "conv.*", "policy": "oldest"}, "conv.weight", "oldest"),
        ({"match": ["nothing", "conv.weight"], "policy": "drop"}, "conv.weight", None),
        ({"match": "norm.running_var", "policy": "combine"}, "norm.running_var", "mean"),
        ({"match": "norm.running_var", "policy": "reset"}, "norm.running_var", "ones"),
        ({"match": "norm.running_mean", "policy": "reset"}, "norm.running_mean", "zeros"),
        ({"match": "norm.num_batches_tracked", "policy": "reset"}, "norm.num_batches_tracked", "zeros"),
        (
            {"match": "conv.weight", "combine": {"method": "weights", "weights": [0, 1, 0]}},
            "conv.weight",
            "middle",
        ),
    ],
)
def test_rules_win_over_the_table(
    run: Path, tmp_path: Path, rule: dict[str, Any], name: str, expected: str | None
) -> None:
    sources = train(run)
    found, _ = merged(f"{run}@0..", tmp_path / "out", rules=[rule])
    if expected is None:
        assert name not in found
        return
    like = sources[-1][name]
    wanted = {
        "newest": lambda: like,
        "oldest": lambda: sources[0][name],
        "middle": lambda: sources[1][name],
        "mean": lambda: mean(sources, name),
        "ones": lambda: torch.ones_like(like),
        "zeros": lambda: torch.zeros_like(like),
    }[expected]()
    assert bits(found[name]) == bits(wanted)


def test_batch_norm_policies(run: Path, tmp_path: Path) -> None:
    sources = train(run)
    for policy, expected in (
        ("newest", sources[-1]["norm.running_var"]),
        ("reset", torch.ones(8)),
        ("combine", mean(sources, "norm.running_var")),
    ):
        recipe = tmp_path / f"{policy}.yaml"
        recipe.write_text(f"recipe: 1\nsources: ['{run}@0..']\nmethod: uniform\nstate: {{batch_norm: {policy}}}\n")
        found, _ = merged(recipe, tmp_path / policy)
        assert bits(found["norm.running_var"]) == bits(expected)


def test_quantised_and_complex_parameters_are_refused_until_a_rule_says_what(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {
            "codes": nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False),
            "phase": torch.zeros(3, dtype=torch.complex64),
            "w": torch.ones(2),
            "w8": torch.zeros(4, dtype=torch.float8_e4m3fn),
            "w8_scale_inv": torch.ones(1),
        }
        module = nn.Module()
        for name, value in state.items():
            module.register_parameter(name, value) if isinstance(value, nn.Parameter) else module.register_buffer(
                name, value
            )
        ckpt.save({"model": module}, tmp_path / "run", step=step)
    with pytest.raises(InvalidInputError) as caught:
        ckpt.merge(f"{tmp_path}/run@1..2", tmp_path / "out")
    assert caught.value.kind == "cannot-merge"
    assert all(name in caught.value.message for name in ("model/codes", "model/phase", "model/w8"))
    rules = [{"match": "{codes,phase,w8}", "policy": "newest"}]
    found, _ = merged(f"{tmp_path}/run@1..2", tmp_path / "out", rules=rules)
    assert sorted(found) == ["codes", "phase", "w", "w8", "w8_scale_inv"]


def test_padding_of_a_sharded_vocabulary_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint holds tensors by their true shape, so that nothing that is computed over elements can see padding."""
    sources = [save(tmp_path / "run", step, {"embed": np.full((5, 3), step, np.float32)}) for step in (1, 2)]
    found, _ = merged(f"{tmp_path}/run@1..2", tmp_path / "out")
    assert found["embed"].shape == sources[0]["embed"].shape


def test_seed_of_random_streams_is_stored_as_any_object(run: Path, tmp_path: Path) -> None:
    train(run)
    ckpt.merge(f"{run}@0..", tmp_path / "out")
    with ckpt.open(tmp_path / "out") as checkpoint:
        stored = checkpoint._stored
        rows = [row for row in stored.objects if row.name == "rng"]
        assert len(decode(stored.read_object(rows[0]), name="rng")["seed"]) == 64
