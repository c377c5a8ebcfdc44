"""What CheckFree makes of a lost stage, and all that it refuses: pure plans over names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from ckpt.engine.approximate import Approximation, LayerNames, Rebuilt, plan_checkfree, values
from ckpt.engine.substitute import substitutes
from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.format.objects import decode, encode
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import TensorSpec

NAMES = LayerNames("layers.{}.**")
PARTS = {
    "model/layers.{}.w": ("param", "bfloat16", (4, 2)),
    "model/layers.{}.seen": ("buffer", "int64", ()),
    "optimizer/layers.{}.w/exp_avg": ("optim.exp_avg", "float32", (4, 2)),
    "optimizer/layers.{}.w/step": ("optim.step", "float32", ()),
}


def layer(number: int, parts: Mapping[str, tuple[str, str, tuple[int, ...]]] = PARTS) -> list[TensorSpec]:
    return [TensorSpec(name=n.format(number), role=r, dtype=d, shape=s) for n, (r, d, s) in parts.items()]


def plan(
    lost: set[int],
    *,
    num_layers: int = 8,
    stage: int = 1,
    norms: Mapping[int, float] | None = None,
    extra: list[TensorSpec] | None = None,
    changed: dict[int, list[TensorSpec]] | None = None,
) -> Approximation:
    """A model of layers in stages of `stage`; nothing of a lost layer is known."""
    layers = {n: (changed or {}).get(n, layer(n)) for n in range(num_layers) if n not in lost}
    known = [spec for specs in layers.values() for spec in specs]
    return plan_checkfree(
        [*known, *(extra or [])],
        frozenset(spec.name for spec in known),
        names=NAMES,
        num_layers=num_layers,
        stage_of={n: frozenset(range(n // stage * stage, (n // stage + 1) * stage)) for n in layers},
        norms=norms,
    )


def test_every_inner_stage_of_every_size_is_made_of_the_same_layers_of_its_neighbours() -> None:
    for stage in (1, 2, 4):
        num_layers = 4 * stage
        for first in range(stage, num_layers - stage, stage):
            lost = range(first, first + stage)
            found = plan(set(lost), num_layers=num_layers, stage=stage)
            wanted = {part.format(n): (part.format(n - stage), part.format(n + stage)) for n in lost for part in PARTS}
            assert {one.spec.name: (one.below, one.above) for one in found.tensors} == wanted


def test_weights_are_squared_norms_of_whole_stages() -> None:
    norms = {2: 3.0, 3: 4.0, 6: 1.0, 7: 2.0}
    found = plan({4, 5}, num_layers=10, stage=2, norms=norms)
    assert found.stages[0].share == pytest.approx((9 + 16) / (9 + 16 + 1 + 4)) and not found.equal
    assert plan({4}, norms={3: 0.0, 5: 0.0}).stages[0].share == 0.5


def test_parameters_are_averaged_counters_copied_and_optimizer_state_is_zero() -> None:
    found = {one.spec.name: one for one in plan({3}, norms={2: 1.0, 4: 3.0}).tensors}
    stored = {
        "model/layers.2.w": torch.full((4, 2), 2.0, dtype=torch.bfloat16),
        "model/layers.4.w": torch.full((4, 2), 12.0, dtype=torch.bfloat16),
        "model/layers.4.seen": torch.tensor(7),
    }

    def value(name: str, dtype: torch.dtype) -> torch.Tensor:
        one: Rebuilt = found[name]
        return torch.from_numpy(values(one, stored.__getitem__).copy()).view(dtype).reshape(one.spec.shape)

    assert torch.equal(value("model/layers.3.w", torch.bfloat16), torch.full((4, 2), 11.0, dtype=torch.bfloat16))
    assert value("model/layers.3.seen", torch.int64).item() == 7
    assert not value("optimizer/layers.3.w/exp_avg", torch.float32).any()
    assert value("optimizer/layers.3.w/step", torch.float32).item() == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"lost": {0}}, "the first stage"),
        ({"lost": {7}}, "the last stage"),
        ({"lost": {3, 4}}, "more than one stage in a row"),
        ({"lost": {2, 3, 4, 5}, "stage": 2}, "more than one stage in a row"),
        ({"lost": {2, 3}, "stage": 2, "num_layers": 5}, "not one stage that is whole"),
        ({"lost": {2, 4}, "stage": 1, "num_layers": 5}, "the last stage"),
        (
            {"lost": {3}, "extra": [TensorSpec(name="model/norm", role="param", dtype="float32", shape=(2,))]},
            "model/norm",
        ),
        ({"lost": {3}, "changed": {4: layer(4)[:-1]}}, "do not have the same tensors"),
        ({"lost": {3}, "changed": {4: layer(4, {**PARTS, "model/layers.{}.w": ("param", "float32", (4, 2))})}}, "same"),
        (
            {
                "lost": {3},
                "changed": {
                    n: layer(n, {**PARTS, "optimizer/layers.{}.w/master": ("optim.master", "float32", (4, 2))})
                    for n in (2, 4)
                },
            },
            "does not begin at zero",
        ),
        ({"lost": {3}, "norms": {2: 1.0}}, "no gradient norm of layers [4]"),
        ({"lost": {3}, "norms": {2: 1.0, 4: float("nan")}}, "not all finite"),
        ({"lost": set()}, "no layer is lost"),
    ],
)
def test_what_cannot_be_made_up_is_refused_with_the_reason(given: dict, why: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        plan(**given)
    assert why in refused.value.message


@pytest.mark.parametrize("pattern", ["layers.3.**", "layers.*", "{}.{}", "layers.{}.{x}.**"])
def test_a_pattern_has_one_number(pattern: str) -> None:
    with pytest.raises(InvalidInputError):
        LayerNames(pattern)


def test_a_pattern_with_a_state_key_is_about_that_key_and_all_optimizer_state() -> None:
    names = LayerNames("model/layers.{}.**")
    found = [names.place(name) for name in ("model/layers.12.w", "teacher/layers.1.w", "optimizer/layers.3.w/exp_avg")]
    assert [place and place[0] for place in found] == [12, None, 3]
    assert names.renamed("optimizer/layers.3.w/exp_avg", 10) == "optimizer/layers.10.w/exp_avg"
    assert names.renamed("model/layers.12.w", 0) == "model/layers.0.w"


def row(name: str, kind: str, rank: int, tree: object, *, dp: tuple[int, int] = (-1, -1)) -> tuple[ObjectRow, bytes]:
    data = encode(tree, name=name)  # type: ignore[arg-type]
    place = {"writer": rank, "byte_offset": 0, "nbytes": len(data), "digest": str(rank)}
    return ObjectRow(name=name, kind=kind, rank=rank, dp_rank=dp[0], dp_size=dp[1], **place), data  # type: ignore[arg-type]


def test_lost_ranks_get_hyperparameters_of_the_stage_before_fresh_streams_and_what_all_share() -> None:
    groups = [[{"params": [f"layers.{n}.w"], "lr": 0.1 * (n + 1)}] for n in (1, 3)]
    rows = {
        "optimizer": [row("optimizer", "optimizer", r, {"groups": g, "param_state": {}}) for r, g in enumerate(groups)],
        "rng": [row("rng", "rank", rank, {"named": {}}) for rank in (0, 1)],
        "progress": [row("progress", "replicated", rank, {"epoch": 3}) for rank in (0, 1)],
        "loader": [row("loader", "loader", 0, {"at": 1}, dp=(0, 2))],
    }
    found, notes = substitutes([2, 3], rows, plan({2}, num_layers=4, stage=1).stages, NAMES)
    trees = {(rank, one.name): decode(one.data, name=one.name) for rank, some in found.items() for one in some}

    assert trees[2, "optimizer"] == {"groups": [{"params": ["layers.2.w"], "lr": 0.2}], "param_state": {}}
    assert trees[3, "optimizer"] == {"groups": [], "param_state": {}}
    assert trees[2, "progress"] == trees[3, "progress"] == {"epoch": 3}
    assert len({str(trees[rank, "rng"]) for rank in (2, 3)}) == 2 and (2, "loader") not in trees
    assert len(notes) == 2 and "fresh random streams" in notes[0] and "loader" in notes[1]
