"""A module with AdamW goes out and comes back, in one process.

Goal: the main path. Method: collect into whole tensors in memory, load into a fresh model and optimizer, compare bits.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.state.state_oracle import load_alone, save_alone


def make(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": seed}


def train(state: dict[str, object], steps: int) -> None:
    model, optimizer, scheduler = state["model"], state["optimizer"], state["scheduler"]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def test_training_goes_on_bit_equal_after_a_load_into_a_fresh_job() -> None:
    first = make(0)
    train(first, 3)
    memory = save_alone(first)
    second = make(1)
    load_alone(second, memory)
    assert second["step"] == 0
    train(first, 3)
    train(second, 3)
    for one, other in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert first["optimizer"].state_dict()["param_groups"] == second["optimizer"].state_dict()["param_groups"]
    assert first["scheduler"].state_dict() == second["scheduler"].state_dict()
    assert set(memory.specs) >= {"model/0.weight", "optimizer/0.weight/exp_avg", "optimizer/2.bias/step"}
