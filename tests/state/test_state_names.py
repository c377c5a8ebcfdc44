"""Names of a state's tensors: wrappers leave no trace, tied tensors are one, keys are checked.

Goal: a layer keeps its name whatever it is wrapped in. Method: small modules in one process.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckpt.errors import InvalidInputError
from ckpt.state import collect
from tests.state.state_oracle import load_alone, numbered, save_alone


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)  # a user's own child of this name stays in the names
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("dropped", torch.ones(3), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5, bias=False)
        self.embed = nn.Embedding(5, 4)
        self.head.weight = self.embed.weight


def names_of(state: dict[str, object]) -> list[str]:
    return [spec.name for spec in collect(state, rank=0, world=1).specs]


PLAIN = ["model/kept", "model/module.bias", "model/module.weight"]


def test_names_are_those_of_the_module_and_only_persistent_buffers_are_stored() -> None:
    memory = save_alone({"model": Block()})
    assert sorted(memory.specs) == PLAIN
    assert {name: spec.role for name, spec in memory.specs.items()} == {
        "model/kept": "buffer",
        "model/module.bias": "param",
        "model/module.weight": "param",
    }


@pytest.mark.parametrize(
    "wrap", [checkpoint_wrapper, nn.DataParallel, lambda block: torch.compile(block, backend="eager")]
)
def test_wrappers_leave_no_trace_in_names(wrap: object) -> None:
    assert names_of({"model": wrap(Block())}) == PLAIN  # type: ignore[operator]


def test_wrappers_inside_and_around_leave_no_trace() -> None:
    block = Block()
    block.module = checkpoint_wrapper(block.module)
    assert names_of({"model": nn.DataParallel(checkpoint_wrapper(block))}) == PLAIN


def test_tied_weights_are_stored_once_with_their_other_names() -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.embed.weight.sum().backward()
    optimizer.step()
    memory = save_alone({"model": model, "optimizer": optimizer})
    found = {spec.name: spec.aliases for spec in memory.specs.values()}
    assert found == {
        "model/embed.weight": ("model/head.weight",),
        "optimizer/embed.weight/exp_avg": ("optimizer/head.weight/exp_avg",),
        "optimizer/embed.weight/exp_avg_sq": ("optimizer/head.weight/exp_avg_sq",),
        "optimizer/embed.weight/step": ("optimizer/head.weight/step",),
    }


def test_tied_by_memory_only_counts_as_tied_but_the_optimizer_keeps_both_states() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.embed.weight.grad, model.head.weight.grad = torch.ones(5, 4), torch.full((5, 4), 2.0)
    optimizer.step()
    memory = save_alone({"model": model, "optimizer": optimizer})
    assert memory.specs["model/embed.weight"].aliases == ("model/head.weight",)
    assert memory.tensor("optimizer/embed.weight/momentum_buffer").unique().tolist() == [1.0]
    assert memory.tensor("optimizer/head.weight/momentum_buffer").unique().tolist() == [2.0]


def test_a_tied_model_loads_into_one_that_is_not_tied_and_back() -> None:
    tied = Tied()
    memory = save_alone({"model": tied})
    loose = Tied()
    loose.head.weight = nn.Parameter(torch.zeros(5, 4))
    load_alone({"model": loose}, memory)
    assert torch.equal(loose.head.weight, tied.embed.weight)
    again = Tied()
    load_alone({"model": again}, save_alone({"model": loose}))
    assert torch.equal(again.head.weight, tied.embed.weight)


def test_a_module_that_hangs_in_two_places_is_tied() -> None:
    shared = nn.Linear(2, 2, bias=False)
    memory = save_alone({"model": nn.ModuleDict({"b": shared, "a": shared})})
    assert memory.specs["model/a.weight"].aliases == ("model/b.weight",)


def test_pipeline_chunks_with_disjoint_names_are_one_module() -> None:
    chunks = [nn.ModuleDict({"layer0": nn.Linear(2, 2)}), nn.ModuleDict({"layer3": nn.Linear(2, 2)})]
    assert names_of({"model": chunks}) == [f"model/layer{i}.{name}" for i in (0, 3) for name in ("bias", "weight")]


def test_modules_with_the_same_names_are_indexed() -> None:
    assert names_of({"model": [nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)]}) == [
        "model/0.weight",
        "model/1.weight",
    ]


def test_nested_containers_of_modules_and_values_are_opened() -> None:
    linear = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
    local = collect({"train": {"net": linear, "opt": optimizer, "epoch": 3}}, rank=0, world=1)
    assert [spec.name for spec in local.specs] == ["train/net/weight"]
    assert [item.name for item in local.objects] == ["train/epoch", "train/opt"]


def test_two_things_of_one_name_are_an_error_that_names_both() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    model = nn.ParameterDict({"a": parameter})
    optimizers = [torch.optim.SGD([parameter], lr=1.0, momentum=0.9) for _ in range(2)]
    parameter.grad = torch.ones(2)
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(InvalidInputError, match="`o/a/momentum_buffer` from optimizer `o` and from optimizer `o`"):
        collect({"model": model, "o": optimizers}, rank=0, world=1)
    with pytest.raises(InvalidInputError, match="two values in `x` have the name `x/1`"):
        collect({"x": {1: torch.zeros(1), "1": torch.zeros(1)}}, rank=0, world=1)


@pytest.mark.parametrize("key", ["", "a/b", "a\nb", 7])
def test_a_key_that_cannot_be_a_name_is_refused(key: object) -> None:
    with pytest.raises(InvalidInputError, match="state key"):
        collect({key: 1}, rank=0, world=1)  # type: ignore[dict-item]


def test_optimizer_names_are_bare_for_the_model_and_qualified_for_other_modules() -> None:
    state: dict[str, object] = {"disc": nn.Linear(2, 2, bias=False), "model": nn.Linear(2, 2, bias=False)}
    for key in ("disc", "model"):
        optimizer = torch.optim.SGD(state[key].parameters(), lr=0.1, momentum=0.9)  # type: ignore[attr-defined]
        state[key].weight.grad = numbered((2, 2))  # type: ignore[attr-defined]
        optimizer.step()
        state[f"{key}_opt"] = optimizer
    assert names_of(state) == [
        "disc/weight",
        "disc_opt/disc/weight/momentum_buffer",
        "model/weight",
        "model_opt/weight/momentum_buffer",
    ]
    load_alone(state, save_alone(state))
