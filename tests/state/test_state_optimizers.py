"""Optimizer state belongs to its parameter by name; hyperparameters follow their parameters.

Goal: order of groups, frozen parameters, missing state and other optimizers change nothing. Method: train, save, load
into optimizers made differently, compare states by parameter name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import decode, encode
from ckpt.state import FlatOptimizerState, FlatShard, SavedWorld, StoredObjectRow, collect, target
from tests.state.state_oracle import Memory, load_alone, numbered, save_alone

SAME = SavedWorld(world=1, same_layout=True)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Linear(3, 2) for name in "abc"})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and not name.startswith("c."):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: {slot: v.tolist() if isinstance(v, torch.Tensor) else v for slot, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def adamw(model: nn.Module, order: str = "abc", **rates: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": list(model[k].parameters()), "lr": rates.get(k, 1e-3)} for k in order])


def test_state_and_hyperparameters_follow_names_whatever_the_order_of_the_groups() -> None:
    first = model_of()
    one = adamw(first, "abc", a=0.1, b=0.2, c=0.3)
    step(first, one)
    memory = save_alone({"model": first, "optimizer": one})
    second = model_of(1)
    other = adamw(second, "cba")
    load_alone({"model": second, "optimizer": other}, memory)
    assert by_name(second, other) == by_name(first, one)
    assert [group["lr"] for group in other.param_groups] == [0.3, 0.2, 0.1]
    step(first, one)
    step(second, other)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_parameter_without_stored_state_ends_up_with_none() -> None:
    first = model_of()
    one = adamw(first)
    step(first, one)  # never steps `c`
    second = model_of(1)
    other = adamw(second)
    for parameter in second.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert "c.weight" in by_name(second, other)
    load_alone({"model": second, "optimizer": other}, save_alone({"model": first, "optimizer": one}))
    assert sorted(by_name(second, other)) == ["a.bias", "a.weight", "b.bias", "b.weight"]


def test_frozen_parameters_are_stored_and_have_no_state() -> None:
    first = model_of()
    first["a"].requires_grad_(False)
    one = adamw(first)
    step(first, one)
    memory = save_alone({"model": first, "optimizer": one})
    assert "model/a.weight" in memory.specs and "optimizer/a.weight/exp_avg" not in memory.specs
    second = model_of(1)
    other = adamw(second)
    load_alone({"model": second, "optimizer": other}, memory)
    assert by_name(second, other) == by_name(first, one)


def test_nothing_of_the_optimizer_changes_before_restore_and_existing_slots_keep_their_memory() -> None:
    first = model_of()
    one = adamw(first)
    step(first, one)
    memory = save_alone({"model": first, "optimizer": one})
    second = model_of(1)
    other = adamw(second)
    step(second, other, steps=1)
    slot = other.state[second["a"].weight]["exp_avg"]
    fresh = model_of(1)
    empty = adamw(fresh)
    goal = target({"model": fresh, "optimizer": empty}, list(memory.specs.values()), rank=0, world=1)
    goal.check(memory.objects, SAME)
    assert not empty.state and torch.equal(fresh["a"].weight, model_of(1)["a"].weight)
    load_alone({"model": second, "optimizer": other}, memory)
    assert other.state[second["a"].weight]["exp_avg"] is slot


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1, dtype=torch.float64)),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True, capturable=False, foreach=False),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.Rprop(p),
    ],
)
def test_torch_optimizers_go_on_bit_equal(make: Any) -> None:
    first, second = model_of(), model_of(1)
    one, other = make(first.parameters()), make(second.parameters())
    step(first, one)
    load_alone({"model": second, "optimizer": other}, save_alone({"model": first, "optimizer": one}))
    assert by_name(second, other) == by_name(first, one)
    step(first, one)
    step(second, other)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_lbfgs_with_lists_of_tensors_and_numbers_in_its_state_goes_on_bit_equal() -> None:
    def run(parameter: nn.Parameter, optimizer: torch.optim.LBFGS) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((parameter - 2) ** 4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    states = []
    for _ in range(2):
        model = nn.ParameterDict({"x": nn.Parameter(numbered((5,)))})
        states.append({"model": model, "optimizer": torch.optim.LBFGS(model.parameters(), max_iter=3)})
    run(states[0]["model"]["x"], states[0]["optimizer"])
    load_alone(states[1], save_alone(states[0]))
    for state in states:
        run(state["model"]["x"], state["optimizer"])
    assert torch.equal(states[0]["model"]["x"], states[1]["model"]["x"])


def test_a_tensor_hyperparameter_stays_the_same_tensor_and_a_number_stays_a_number() -> None:
    saved = model_of()
    memory = save_alone({"model": saved, "optimizer": torch.optim.SGD(saved.parameters(), lr=torch.tensor(0.25))})
    model = model_of()
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    load_alone({"model": model, "optimizer": optimizer}, memory)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    load_alone({"model": model, "optimizer": optimizer}, memory)
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.25


def test_parameters_unknown_to_the_checkpoint_keep_their_hyperparameters() -> None:
    first = nn.ModuleDict({"a": nn.Linear(3, 2)})
    memory = save_alone({"model": first, "optimizer": adamw(first, "a", a=0.5)})
    second = model_of()
    other = adamw(second, "abc", a=0.1, b=0.2, c=0.3)
    goal = target({"model": second, "optimizer": other}, list(memory.specs.values()), rank=0, world=1)
    goal.restore(memory.objects, SAME)
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.2, 0.3]


def test_hyperparameters_are_looked_up_in_the_rows_of_all_ranks() -> None:
    rows = []
    for rank, key in enumerate("abc"):
        stage = nn.ModuleDict({key: nn.Linear(3, 2)})
        local = collect({"model": stage, "optimizer": adamw(stage, key, **{key: 0.1 * rank})}, rank=rank, world=3)
        rows.append(StoredObjectRow(rank=rank, kind="optimizer", payload=local.objects[0].payload))
    model = model_of()
    optimizer = adamw(model, "cab")
    goal = target({"model": model, "optimizer": optimizer}, [], rank=0, world=1)
    goal.restore({"optimizer": rows}, SavedWorld(world=3, same_layout=False))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.0, 0.1]


def test_one_group_over_parameters_with_different_saved_hyperparameters_is_one_error() -> None:
    first = model_of()
    memory = save_alone({"model": first, "optimizer": adamw(first, "abc", a=0.1, b=0.2, c=0.1)})
    second = model_of()
    optimizer = torch.optim.AdamW(second.parameters(), lr=7.0)
    with pytest.raises(MismatchError, match=r"group 0: `a.weight` has lr 0.1 and `b.weight` has lr 0.2"):
        load_alone({"model": second, "optimizer": optimizer}, memory)
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_several_optimizers_under_one_key_share_the_names() -> None:
    def make(seed: int) -> dict[str, Any]:
        model = model_of(seed)
        parts = [torch.optim.SGD(model[key].parameters(), lr=0.1 + seed, momentum=0.9) for key in "ab"]
        return {"model": model, "optimizer": parts}

    first, second = make(0), make(1)
    for optimizer in first["optimizer"]:
        step(first["model"], optimizer)
    memory = save_alone(first)
    load_alone(second, memory)
    assert "optimizer/b.weight/momentum_buffer" in memory.specs
    for one, other in zip(first["optimizer"], second["optimizer"], strict=True):
        assert by_name(second["model"], other) == by_name(first["model"], one)
    merged = model_of(2)
    optimizer = torch.optim.SGD([*merged["b"].parameters(), *merged["a"].parameters()], lr=3.0, momentum=0.9)
    load_alone({"model": merged, "optimizer": optimizer}, memory)
    assert optimizer.param_groups[0]["lr"] == 0.1 and len(optimizer.state) == 4


def test_an_optimizer_over_unnamed_parameters_is_an_error_and_names_mend_it() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    with pytest.raises(InvalidInputError, match=r"group 0, parameter 0, shape \(2, 3\)") as caught:
        collect({"optimizer": optimizer}, rank=0, world=1)
    assert any("names=" in hint for hint in caught.value.hints)
    memory = save_alone({"optimizer": optimizer}, names=model.named_parameters())
    assert "optimizer/a.weight/momentum_buffer" in memory.specs


def test_tensors_of_the_state_name_parameters_too() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([tensor], lr=0.1, momentum=0.9)
    tensor.grad = torch.ones(2)
    optimizer.step()
    memory = save_alone({"soft": {"prompt": tensor}, "optimizer": optimizer})
    assert sorted(memory.specs) == ["optimizer/soft/prompt/momentum_buffer", "soft/prompt"]


def test_a_slot_of_another_shape_is_whole_for_a_whole_parameter() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model["a"].weight] = {"rows": numbered((2,)), "count": 3, "tags": ["x", numbered((2, 2))]}
    memory = save_alone({"model": model, "optimizer": optimizer})
    second = model_of()
    other = torch.optim.SGD(second.parameters(), lr=0.1)
    load_alone({"model": second, "optimizer": other}, memory)
    state = other.state[second["a"].weight]
    assert state["rows"].tolist() == [0, 1] and state["count"] == 3
    assert state["tags"][0] == "x" and state["tags"][1].tolist() == [[0, 1], [2, 3]]


def test_a_step_that_was_a_tensor_becomes_the_number_that_the_optimizer_has() -> None:
    model = model_of()
    optimizer = adamw(model)
    step(model, optimizer)
    memory = save_alone({"model": model, "optimizer": optimizer})
    for state in optimizer.state.values():
        state["step"] = 0
    load_alone({"model": model, "optimizer": optimizer}, memory)
    assert optimizer.state[model["a"].weight]["step"] == 2
    assert type(optimizer.state[model["a"].weight]["step"]) is int


def test_a_payload_that_is_no_optimizer_is_damage() -> None:
    model = model_of()
    goal = target({"model": model, "optimizer": adamw(model)}, [], rank=0, world=1)
    rows = {"optimizer": [StoredObjectRow(rank=0, kind="optimizer", payload=encode([1], name="optimizer"))]}
    with pytest.raises(DamagedError, match="not an optimizer"):
        goal.check(rows, SAME)


# Flat ZeRO ranges

LAYOUT = [("a.weight", (2, 3)), ("a.bias", (2,)), (None, (3,)), ("b.weight", (2, 3)), ("b.bias", (2,)), ("c", ())]


def flat_states(world: int, step_value: Any, rate: float) -> list[FlatOptimizerState]:
    total = 20
    size = -(-total // world)  # the last range reaches into padding behind the last tensor
    out = []
    for rank in range(world):
        bounds = {"start": rank * size, "stop": (rank + 1) * size}
        slots = {slot: FlatShard(torch.zeros(size), LAYOUT, **bounds) for slot in ("exp_avg", "exp_avg_sq")}
        groups = [{"params": ["a.weight", "a.bias", "b.weight", "b.bias", "c"], "lr": rate}]
        out.append(FlatOptimizerState(slots, step=step_value, groups=groups))
    return out


def flat_model() -> nn.Module:
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    model.register_parameter("c", nn.Parameter(torch.tensor(1.0)))
    return model


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_flat_ranges_and_a_torch_optimizer_load_each_other(world: int) -> None:
    model = flat_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    memory = save_alone({"model": model, "optimizer": optimizer})
    ranks = flat_states(world, torch.zeros(()), 0.1)
    for rank, state in enumerate(ranks):
        goal = target({"optimizer": state}, list(memory.specs.values()), rank=rank, world=world)
        memory.fill(goal.local)
        goal.restore(memory.objects, SavedWorld(world=1, same_layout=False))
        assert state.step.item() == 1 and state.groups[0]["lr"] == 0.5
    again = Memory([collect({"optimizer": state}, rank=r, world=world) for r, state in enumerate(ranks)])
    again.check_complete()
    assert {name: spec for name, spec in memory.specs.items() if name.startswith("optimizer/")} == again.specs
    other = flat_model()
    fresh = torch.optim.AdamW(other.parameters())
    again.objects = {"optimizer": again.objects["optimizer"]}
    goal = target({"model": other, "optimizer": fresh}, list(again.specs.values()), rank=0, world=1)
    for spec in goal.local.specs:
        if spec.name.startswith("model/"):
            again.specs[spec.name], again.bytes[spec.name] = memory.specs[spec.name], memory.bytes[spec.name]
    again.fill(goal.local)
    goal.restore(again.objects, SavedWorld(world=world, same_layout=False))
    assert by_name(other, fresh) == by_name(model, optimizer)
    assert fresh.param_groups[0]["lr"] == 0.5


def test_a_flat_state_has_one_step_and_refuses_two() -> None:
    (state,) = flat_states(1, 5, 0.1)
    memory = save_alone({"optimizer": state})
    (goal,) = flat_states(1, 0, 0.2)
    load_alone({"optimizer": goal}, memory)
    assert goal.step == 5 and goal.groups[0]["lr"] == 0.1
    memory.bytes["optimizer/b.bias/step"] = memory.bytes["optimizer/b.bias/step"] ^ 0x40
    with pytest.raises(MismatchError, match=r"5 for `a.bias` and .* for `b.bias`"):
        load_alone({"optimizer": goal}, memory)


def test_a_flat_shard_is_a_value_of_its_own() -> None:
    whole = numbered((20,))
    shards = [FlatShard(whole[i : i + 10].clone(), LAYOUT, start=i, stop=i + 10) for i in (0, 10)]
    memory = Memory([collect({"master": shard}, rank=r, world=2) for r, shard in enumerate(shards)])
    memory.check_complete()
    assert memory.tensor("master/a.bias").tolist() == [6, 7]
    assert memory.tensor("master/b.weight").tolist() == [[11, 12, 13], [14, 15, 16]]


def test_a_flat_shard_that_does_not_fit_its_buffer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="needs a 1-d buffer of 5 elements"):
        FlatShard(torch.zeros(4), LAYOUT, start=0, stop=5)
    with pytest.raises(InvalidInputError, match="twice"):
        FlatShard(torch.zeros(4), [("a", (2,)), ("a", (2,))], start=0, stop=4)


def test_the_stored_object_is_as_documented() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    (item,) = collect({"model": model, "optimizer": optimizer}, rank=0, world=1).objects
    tree = decode(item.payload, name="optimizer")
    assert item.kind == "optimizer" and tree["param_state"] == {}
    assert tree["groups"][0]["params"] == ["a.weight"] and tree["groups"][0]["lr"] == 0.5


def test_a_checkpoint_without_the_optimizer_leaves_it_alone() -> None:
    model = model_of()
    optimizer = adamw(model, a=0.5)
    step(model, optimizer)
    before = by_name(model, optimizer)
    memory = save_alone({"model": model_of(1)})
    goal = target({"model": model, "optimizer": optimizer}, list(memory.specs.values()), rank=0, world=1)
    goal.restore({}, SAME)
    assert by_name(model, optimizer) == before and optimizer.param_groups[0]["lr"] == 0.5
