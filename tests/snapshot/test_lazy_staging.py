"""A save at every step of a training, copied while the training goes on, is bit for bit the state at the call.

Method: real training loops with every way to step an optimizer; each save is compared with a clone taken at the same point.
Copies are delayed by a failpoint, so that without a fence the next step would overtake them (one test shows that it does).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckpt
from ckpt import failpoints
from ckpt.errors import SaveFailedError

OPTIONS = ckpt.Options(chunk_bytes=4096, write_buffers=2)
STEPS = 5
WIDTH = 48  # 9 KiB a matrix: parts cross chunks

Step = Callable[[], None]


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk waits before the copying thread takes it."""
    monkeypatch.setenv("CKPT_FAILPOINT", "stage.before-chunk:delay=0.01")


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def loss_of(net: nn.Module, number: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return net(torch.randn(16, WIDTH, generator=generator)).square().mean()


def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def one_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[dict[str, Any], Step]:
    net = model()
    optimizer = make(net.parameters())
    return {"model": net, "optimizer": optimizer}, plain(net, optimizer)


def accumulation() -> tuple[dict[str, Any], Step]:
    """Two of three iterations change nothing but gradients and the buffers of the norm."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    count = iter(range(1000))

    def step() -> None:
        number = next(count)
        loss_of(net, number).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    return {"model": net, "optimizer": optimizer}, step


def inside_backward() -> tuple[dict[str, Any], Step]:
    """An optimizer per parameter, which steps as soon as its gradient is there."""
    net = model()
    optimizers = {name: torch.optim.AdamW([param], lr=0.01) for name, param in net.named_parameters()}
    for name, param in net.named_parameters():

        def hook(tensor: torch.Tensor, optimizer: torch.optim.Optimizer = optimizers[name]) -> None:
            optimizer.step()
            tensor.grad = None

        param.register_post_accumulate_grad_hook(hook)
    state: dict[str, Any] = {"model": net}
    state |= {f"optimizer-{name.replace('.', '-')}": optimizer for name, optimizer in optimizers.items()}
    return state, lambda: loss_of(net).backward()


def with_average(told: bool) -> tuple[dict[str, Any], Step]:
    """An exponential moving average of the weights, changed after each step; `told`: it is attached with the optimizer."""
    net = model()
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if told:
        ckpt.attach(optimizer, also=[average])

    def step() -> None:
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 0.1)

    return {"model": net, "average": average, "optimizer": optimizer}, step


TRAININGS: dict[str, Callable[[], tuple[dict[str, Any], Step]]] = {
    "for-loop": lambda: one_optimizer(lambda p: torch.optim.AdamW(p, foreach=False)),
    "foreach": lambda: one_optimizer(lambda p: torch.optim.AdamW(p, foreach=True)),
    "fused": lambda: one_optimizer(lambda p: torch.optim.AdamW(p, fused=True)),
    "sgd": lambda: one_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adagrad": lambda: one_optimizer(lambda p: torch.optim.Adagrad(p)),
    "accumulation": accumulation,
    "inside-backward": inside_backward,
    "average": lambda: with_average(False),
    "average-told": lambda: with_average(True),
}


def values_of(state: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of modules and optimizers, cloned, under the names that they are saved by."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            out |= {f"{key}/{name}": tensor.detach().numpy().copy() for name, tensor in value.state_dict().items()}
    for param_state in (v.state for v in state.values() if isinstance(v, torch.optim.Optimizer)):
        for i, slots in enumerate(param_state.values()):
            out |= {
                f"slot-{id(param_state)}-{i}-{name}": tensor.detach().numpy().copy()
                for name, tensor in slots.items()
                if isinstance(tensor, torch.Tensor) and tensor.dim()
            }
    return out


def saved_values(folder: Path, step: int) -> dict[str, np.ndarray[Any, Any]]:
    with ckpt.open(folder, step=step) as stored:
        return {name: np.asarray(stored[name][...]) for name in stored}


def assert_saved(folder: Path, step: int, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    """Modules by name; slots of optimizers as a set of values, since their names are the optimizers' business."""
    found = saved_values(folder, step)
    for name, value in expected.items():
        if not name.startswith("slot-"):
            np.testing.assert_array_equal(found[name], value, err_msg=f"step {step}: {name}")
    slots = sorted(v.tobytes() for n, v in expected.items() if n.startswith("slot-"))
    stored = sorted(v.tobytes() for n, v in found.items() if "ptimizer" in n and v.ndim)
    assert slots == stored, f"step {step}: slots of optimizers differ"


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.usefixtures("slow_copies")
def test_a_save_at_every_step_is_the_state_at_the_call(training: str, tmp_path: Path) -> None:
    state, train = TRAININGS[training]()
    seen = []
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        for step in range(STEPS):
            train()
            seen.append(values_of(state))
            checkpointer.step(step, state)
    for step, expected in enumerate(seen):
        assert_saved(tmp_path, step, expected)


def test_copies_go_on_while_training_does_and_the_fence_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delay is real: the call returns before the copies are over, and the next step waits for the one that was begun."""
    monkeypatch.setenv("CKPT_FAILPOINT", "stage.before-chunk:delay=0.3")
    state, train = TRAININGS["foreach"]()
    train()
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        pending = checkpointer.step(0, state)
        assert pending is not None
        call_s = pending.stall_s
        train()
        held_s = pending.stall_s - call_s
        phases = {phase.name for phase in pending.timeline()}
    assert (held_s > 0.005, "fence" in phases) == (True, True), (call_s, held_s, phases)


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("through_data", [False, True])
def test_a_change_without_a_fence_is_found_and_named(through_data: bool, tmp_path: Path) -> None:
    """What torch counts as a change in place always; what goes round its count with `check_fence`."""
    state, train = TRAININGS["foreach"]()
    train()
    options = ckpt.Options(chunk_bytes=4096, check_fence=through_data)
    with (
        pytest.raises(SaveFailedError, match="model/3.weight") as caught,
        ckpt.Checkpointer(tmp_path, every=1, options=options) as checkpointer,
    ):
        checkpointer.step(0, state)
        weight = state["model"][3].weight
        (weight.data if through_data else weight.detach()).add_(1.0)  # nobody told the fence
    assert caught.value.__cause__.kind == "changed-unfenced"  # type: ignore[union-attr]
    assert not list(tmp_path.glob("step-*/manifest.json"))


@pytest.mark.usefixtures("slow_copies")
def test_buffers_that_share_memory_with_parameters_are_copied_in_the_call(tmp_path: Path) -> None:
    """A forward changes them, and no fence holds a forward."""
    net = nn.BatchNorm1d(WIDTH)
    flat = torch.zeros(4 * WIDTH)
    net.weight, net.bias = nn.Parameter(flat[:WIDTH]), nn.Parameter(flat[WIDTH : 2 * WIDTH])
    net.running_mean, net.running_var = flat[2 * WIDTH : 3 * WIDTH], flat[3 * WIDTH :].fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = {"model": net, "optimizer": optimizer}
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        before = values_of({"model": net})
        checkpointer.step(0, state)
        net(torch.randn(8, WIDTH))
    assert_saved(tmp_path, 0, before)


@pytest.mark.usefixtures("slow_copies")
def test_a_fence_by_hand_makes_any_change_safe(tmp_path: Path) -> None:
    state, train = TRAININGS["foreach"]()
    train()
    before = values_of(state)
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        checkpointer.step(0, state)
        ckpt.fence()
        with torch.no_grad():
            for param in state["model"].parameters():
                param.zero_()
    assert_saved(tmp_path, 0, before)


@pytest.mark.usefixtures("slow_copies")
def test_tensors_that_are_dropped_while_they_are_copied_are_saved_whole(tmp_path: Path) -> None:
    """The state is gone, its memory given to others: what was to be saved is kept until it is copied."""
    state, train = TRAININGS["foreach"]()
    train()
    before = values_of(state)
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        checkpointer.step(0, state)
        for param in state["model"].parameters():
            param.data = torch.full_like(param, 7.0)
        state.clear()
        rubbish = [torch.full((WIDTH, WIDTH), 9.0) for _ in range(200)]
    assert_saved(tmp_path, 0, before)
    assert len(rubbish) == 200


@pytest.mark.usefixtures("slow_copies")
def test_an_optimizer_that_nobody_attached_waits_as_well(tmp_path: Path) -> None:
    """It is made after the save began, over the same parameters."""
    state, train = TRAININGS["foreach"]()
    train()
    before = values_of(state)
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        checkpointer.step(0, state)
        other = torch.optim.SGD(state["model"].parameters(), lr=10.0)
        loss_of(state["model"]).backward()
        other.step()
    assert_saved(tmp_path, 0, before)


def test_a_failed_copy_fails_the_save_and_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, train = TRAININGS["foreach"]()
    train()
    failpoints.reset()
    monkeypatch.setenv("CKPT_FAILPOINT", "stage.before-chunk:error@2")
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        pending = checkpointer.step(0, state)
        assert pending is not None
        with pytest.raises(ckpt.CheckpointError, match="stage.before-chunk"):
            pending.wait(30)
        train()
        monkeypatch.delenv("CKPT_FAILPOINT")
        with pytest.raises(SaveFailedError, match="step 0 failed"):
            checkpointer.step(1, state)
        expected = values_of(state)
    assert_saved(tmp_path, 1, expected)


def test_a_checked_save_of_a_quiet_state_succeeds(tmp_path: Path) -> None:
    state, train = TRAININGS["fused"]()
    options = ckpt.Options(chunk_bytes=4096, check_fence=True)
    seen = []
    with ckpt.Checkpointer(tmp_path, every=1, options=options) as checkpointer:
        for step in range(3):
            train()
            seen.append(values_of(state))
            checkpointer.step(step, state)
    for step, expected in enumerate(seen):
        assert_saved(tmp_path, step, expected)


def test_nothing_is_held_when_nothing_is_copied(tmp_path: Path) -> None:
    """An attached optimizer steps without a look at anything."""
    state, train = TRAININGS["sgd"]()
    attached = ckpt.attach(state["optimizer"])
    train()
    ckpt.fence()
    attached.detach()
    train()
    ckpt.save(state, tmp_path, step=1, options=OPTIONS)
    assert_saved(tmp_path, 1, values_of(state))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_save_at_every_step_on_cuda(tmp_path: Path) -> None:
    net = model().cuda()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    state = {"model": net, "optimizer": optimizer}
    data = torch.randn(16, WIDTH, device="cuda")
    seen = []
    with ckpt.Checkpointer(tmp_path, every=1, options=OPTIONS) as checkpointer:
        for step in range(STEPS):
            net(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append({f"model/{n}": t.detach().cpu().numpy().copy() for n, t in net.state_dict().items()})
            checkpointer.step(step, state)
    for step, expected in enumerate(seen):
        found = saved_values(tmp_path, step)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
