"""Plain local tensors under a user's layout: padded, fused, and faults told all at once.

Goal: the boxes of plain tensors are those of the layout, and nothing is guessed. Method: cut by hand, collect as each
rank in one process, compare with the whole.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckpt.errors import InvalidInputError
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Pad, Parts, Rule, ShardStep, Where
from ckpt.state import collect, target
from tests.state.state_oracle import Memory, numbered, save_alone


def rule(pattern: str, **where: object) -> Rule:
    return Rule(match=(NamePattern(text=pattern),), where=Where(**where))  # type: ignore[arg-type]


ROWS = {"shard": (ShardStep(dim=0, axis="tp"),)}


def layout_of(*rules: Rule) -> Layout:
    return Layout(mesh=Mesh(axes=(("tp", 2),)), rules=rules)


def held(weight: torch.Tensor) -> nn.Module:
    return nn.ParameterDict({"w": nn.Parameter(weight.clone())})


def test_padding_of_a_vocabulary_is_not_stored_and_not_touched() -> None:
    whole = numbered((5, 2))
    padded = torch.cat([whole, torch.full((3, 2), -1.0)])
    layout = layout_of(rule("model/w", **ROWS, pad=Pad(axis="tp", multiple=4, size=5)))
    ranks = [held(part) for part in padded.chunk(2)]
    memory = Memory([collect({"model": m}, rank=r, world=2, layout=layout) for r, m in enumerate(ranks)])
    memory.check_complete()
    assert torch.equal(memory.tensor("model/w"), whole)
    last = held(torch.full((4, 2), 9.0))
    goal = target({"model": last}, list(memory.specs.values()), rank=1, world=2, layout=layout)
    memory.fill(goal.local)
    assert last["w"].tolist() == [[8, 9]] + [[9, 9]] * 3


def test_parts_of_a_fused_tensor_go_to_their_places() -> None:
    query, key, value = numbered((4, 2)), numbered((2, 2), start=100), numbered((2, 2), start=200)
    layout = layout_of(rule("model/w", **ROWS, parts=Parts(axis="tp", sizes=(4, 2, 2))))
    ranks = [held(torch.cat([part.chunk(2)[rank] for part in (query, key, value)])) for rank in range(2)]
    memory = Memory([collect({"model": m}, rank=r, world=2, layout=layout) for r, m in enumerate(ranks)])
    memory.check_complete()
    assert torch.equal(memory.tensor("model/w"), torch.cat([query, key, value]))


def test_all_tensors_without_a_rule_are_named_at_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    layout = layout_of(rule("model/a.weight"), rule("model/*.elsewhere"))
    with pytest.raises(InvalidInputError) as caught:
        collect({"model": model}, rank=0, world=2, layout=layout)
    for name in ("model/a.bias", "model/b.bias", "model/b.weight"):
        assert name in caught.value.message
    assert "elsewhere" not in caught.value.message


def test_a_tensor_that_is_not_as_large_as_its_rule_says_is_refused() -> None:
    layout = layout_of(rule("model/w", **ROWS, shape=(6, 2)))
    with pytest.raises(InvalidInputError, match=r"gives rank 0 local shape \(3, 2\).*found local shape \(2, 2\)"):
        collect({"model": held(numbered((2, 2)))}, rank=0, world=2, layout=layout)


def test_values_that_no_rule_matches_are_whole() -> None:
    layout = layout_of(rule("model/w", **ROWS))
    memory = save_alone({"ema": {"x": numbered((3,))}}, layout=layout)
    assert memory.tensor("ema/x").tolist() == [0, 1, 2]
