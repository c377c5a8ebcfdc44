"""Everything that is no tensor: plain values, objects with `state_dict()`, extra state, and whose row counts.

Goal: what was saved comes back in place, or an error names the object. Method: one process, rows made by hand.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckpt.errors import InvalidInputError, MismatchError
from ckpt.format.objects import encode
from ckpt.state import RNG, ElasticSampler, SavedWorld, StoredObjectRow, collect, target
from tests.state.state_oracle import Memory, load_alone, numbered, save_alone


class Box:
    """A user's own class with state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_plain_values_come_back_into_the_same_containers() -> None:
    saved = {"step": 7, "ema": {"w": numbered((3,)), "list": [1, {"x": 2.5}], "pair": (1, "a")}, "none": None}
    memory = save_alone(saved)
    tensor = torch.zeros(3)
    inner: dict[str, Any] = {"w": tensor, "list": [0, {"x": 0.0, "mine": 1}], "pair": (0, "")}
    state: dict[str, Any] = {"step": 0, "ema": inner, "none": 1}
    items = inner["list"]
    load_alone(state, memory)
    assert state["step"] == 7 and state["none"] is None
    assert state["ema"] is inner and inner["w"] is tensor and tensor.tolist() == [0, 1, 2]
    assert inner["list"] is items and items == [1, {"x": 2.5, "mine": 1}] and inner["pair"] == (1, "a")


def test_an_empty_container_takes_all_that_is_stored_under_its_key() -> None:
    saved = {"ema": {"a": numbered((2,)), "b": [numbered((1,)), 3]}}
    state: dict[str, Any] = {"ema": {}}
    load_alone(state, save_alone(saved))
    assert state["ema"]["a"].tolist() == [0, 1] and state["ema"]["b"][0].tolist() == [0] and state["ema"]["b"][1] == 3


def test_a_value_in_a_tuple_cannot_be_replaced() -> None:
    state = {"x": (Box(1), 2)}
    memory = save_alone(state)
    assert sorted(memory.objects) == ["x/0", "x/1"]
    with pytest.raises(InvalidInputError, match="`x/1` cannot be loaded: it is in a tuple"):
        load_alone({"x": (Box(1), 3)}, memory)


def test_objects_with_state_get_their_trees_and_tensors_back() -> None:
    value = {
        "t": numbered((2, 2)),
        "n": np.float32(1.5),
        "d": collections.OrderedDict(a=torch.Size([2])),
        "dtype": torch.bfloat16,
    }
    goal = Box(None)
    load_alone({"box": goal}, save_alone({"box": Box(value)}))
    assert goal.value["t"].tolist() == [[0, 1], [2, 3]]
    assert goal.value["n"] == np.float32(1.5) and type(goal.value["n"]) is np.float32
    assert goal.value["d"] == value["d"] and type(goal.value["d"]["a"]) is torch.Size
    assert goal.value["dtype"] is torch.bfloat16


def test_tensors_of_an_object_keep_their_names_and_are_replicated() -> None:
    memory = save_alone({"box": Box([numbered((2,)), {"x": numbered((3,))}])})
    assert {name: spec.role for name, spec in memory.specs.items()} == {
        "box/value/0": "tensor",
        "box/value/1/x": "tensor",
    }


def test_a_value_that_cannot_be_stored_names_its_key() -> None:
    with pytest.raises(InvalidInputError, match="box"):
        collect({"box": Box(object())}, rank=0, world=1)
    with pytest.raises(InvalidInputError, match="thing"):
        collect({"thing": object()}, rank=0, world=1)


def test_scaler_and_schedulers_come_back() -> None:
    def make(steps: int) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[3])
        for _ in range(steps):
            optimizer.step()
            chain.step()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (10 + steps))
        return {"model": model, "optimizer": optimizer, "scheduler": chain, "scaler": scaler}

    first, second = make(4), make(0)
    load_alone(second, save_alone(first))
    assert second["scheduler"].state_dict() == first["scheduler"].state_dict()
    assert second["scaler"].state_dict() == first["scaler"].state_dict()
    assert second["optimizer"].param_groups[0]["lr"] == first["optimizer"].param_groups[0]["lr"]


class WithExtra(nn.Linear):
    def __init__(self, amax: torch.Tensor) -> None:
        super().__init__(2, 2)
        self.amax = amax
        self.note = "fresh"

    def get_extra_state(self) -> dict[str, Any]:
        return {"amax": self.amax, "note": self.note}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.amax, self.note = state["amax"], state["note"]


def test_extra_state_of_modules_is_an_object_per_module() -> None:
    first = nn.ModuleDict({"fp8": WithExtra(numbered((4,)))})
    first["fp8"].note = "trained"
    memory = save_alone({"model": first})
    assert list(memory.objects) == ["model/fp8._extra_state"]
    assert memory.specs["model/fp8._extra_state/amax"].role == "tensor"
    second = nn.ModuleDict({"fp8": WithExtra(torch.zeros(4))})
    old = second["fp8"].amax
    load_alone({"model": second}, memory)
    assert second["fp8"].amax.tolist() == [0, 1, 2, 3] and second["fp8"].note == "trained"
    assert old.tolist() == [0, 0, 0, 0]


def rows_of(*values: Any) -> dict[str, list[StoredObjectRow]]:
    return {
        "x": [
            StoredObjectRow(rank=rank, kind="replicated", payload=encode(value, name="x") + b" " * rank)
            for rank, value in enumerate(values)
        ]
    }


def load_row(rows: dict[str, list[StoredObjectRow]], *, rank: int, world: int, same_layout: bool) -> Any:
    state = {"x": -1}
    goal = target(state, [], rank=rank, world=world)
    saved = SavedWorld(world=len(rows["x"]), same_layout=same_layout)
    goal.check(rows, saved)
    assert state == {"x": -1}
    goal.restore(rows, saved)
    return state["x"]


def test_equal_rows_load_on_any_world() -> None:
    for world in (1, 2, 5):
        assert load_row(rows_of(4, 4), rank=world - 1, world=world, same_layout=False) == 4


def test_rows_that_differ_load_on_the_same_world_and_layout_only() -> None:
    assert [load_row(rows_of(4, 5), rank=rank, world=2, same_layout=True) for rank in (0, 1)] == [4, 5]
    for world, same_layout in ((1, False), (3, False), (2, False)):
        with pytest.raises(MismatchError, match="object `x` differs between the ranks"):
            load_row(rows_of(4, 5), rank=0, world=world, same_layout=same_layout)


def test_an_object_that_is_not_given_stays_as_it_is() -> None:
    state = {"x": 1, "box": Box(2)}
    goal = target(state, [], rank=0, world=1)
    assert goal.wants_objects == ["box", "x"]
    goal.restore({}, SavedWorld(world=1, same_layout=True))
    assert state["x"] == 1 and state["box"].value == 2


def test_random_streams_and_loaders_come_back_and_say_their_kind() -> None:
    def make() -> dict[str, Any]:
        return {"rng": RNG(), "loader": ElasticSampler(100, dp_rank=0, dp_size=2, seed=3), "a": 1}

    first = make()
    torch.manual_seed(11)
    it = iter(first["loader"])
    taken = [next(it) for _ in range(5)]
    local = collect(first, rank=0, world=1)
    assert [(i.name, i.kind, i.dp_rank, i.dp_size) for i in local.objects] == [
        ("a", "replicated", -1, -1),
        ("loader", "loader", 0, 2),
        ("rng", "rank", -1, -1),
    ]
    expected, goes_on = torch.rand(3), next(it)
    second = make()
    torch.manual_seed(12)
    load_alone(second, save_alone_of(local))
    assert torch.equal(torch.rand(3), expected)
    assert next(iter(second["loader"])) == goes_on and goes_on not in taken


def save_alone_of(local: Any) -> Any:
    return Memory([local])
