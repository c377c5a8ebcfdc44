"""Goal: a save can tell which memory a step of an optimizer changes, and reach tensors on a device without a copy.

Method: the columns of a collected state against the tensors' own storages. What needs a device runs where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.format.spec import LocalState
from ckpt.layout.box import Box
from ckpt.state import annotate, collect, device_view, fenced_storages

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks of which only this one is there: nothing is ever sent."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def guarded(local: LocalState, storages: set[int]) -> set[str]:
    """Names of the tensors whose memory is in one of these storages."""
    assert local.storage_of_piece is not None
    inside = np.isin(local.storage_of_piece, np.array(sorted(storages), np.uint64))
    return {local.specs[number].name for number in local.pieces.boxes.tensor[inside].tolist()}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_all_that_a_step_changes_is_fenced(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = kind(model.parameters(), **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    step(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "ema": {"a": torch.zeros(3)}}
    names = guarded(collect(state, rank=0, world=1), fenced_storages([optimizer]))
    params = {f"model/{name}" for name, _ in model.named_parameters()}
    slots = {spec.name for spec in collect(state, rank=0, world=1).specs if spec.name.startswith("optimizer/")}
    assert names == params | slots


def test_what_lbfgs_keeps_in_lists_is_fenced() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.LBFGS([weight], max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    history = optimizer.state[weight]["old_dirs"]
    assert history
    assert {tensor.untyped_storage().data_ptr() for tensor in history} <= fenced_storages([optimizer])


def test_the_local_tensor_of_a_dtensor_is_what_is_fenced(mesh: DeviceMesh) -> None:
    local = torch.zeros(2, 3)
    param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(4, 3), stride=(3, 1)))
    optimizer = torch.optim.AdamW([param])
    assert fenced_storages([optimizer]) == {local.untyped_storage().data_ptr()}


def test_tensors_without_memory_fence_nothing() -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3, device="meta"))]
    assert fenced_storages([torch.optim.AdamW(params)]) == set()


def test_each_piece_says_where_its_storage_begins() -> None:
    buffer = torch.zeros(64)
    first, second, flat = buffer[:12].view(3, 4), buffer[20:32].view(4, 3).t(), buffer[40:48]
    boxes = [(Box(offsets=(0, 2), lengths=(1, 2)), (0,)), (Box(offsets=(1, 0), lengths=(1, 4)), (2,))]
    annotate(flat, shape=(3, 4), boxes=boxes)
    local = collect({"s": {"a": first, "b": second, "c": flat, "none": torch.zeros(0)}}, rank=0, world=1)
    assert local.storage_of_piece is not None and local.on_device is None
    assert local.storage_of_piece.tolist() == [buffer.untyped_storage().data_ptr()] * 4
    assert (local.storage_of_piece <= local.pieces.address).all()


def test_views_of_pieces_are_the_boxes_in_the_users_memory() -> None:
    buffer = torch.arange(64.0)
    flat = buffer[40:48]
    boxes = [(Box(offsets=(0, 2), lengths=(1, 2)), (0,)), (Box(offsets=(1, 0), lengths=(1, 4)), (2,))]
    annotate(flat, shape=(3, 4), boxes=boxes)
    state = {"s": {"a": buffer[20:32].view(4, 3).t(), "b": flat, "c": torch.tensor(7, dtype=torch.int8)}}
    local = collect(state, rank=0, world=1, stage_devices=False)
    found = [device_view(local, row) for row in range(len(local.pieces.boxes))]
    expected = [buffer[20:32].view(4, 3).t(), buffer[40:42].view(1, 2), buffer[42:46].view(1, 4), state["s"]["c"]]
    assert [view.shape for view in found] == [view.shape for view in expected]
    assert all(torch.equal(view, other) for view, other in zip(found, expected, strict=True))
    assert [view.data_ptr() for view in found] == local.pieces.address.tolist()


@needs_cuda
def test_device_memory_is_given_without_a_copy_when_asked() -> None:
    cpu, gpu = torch.arange(6.0).view(2, 3), torch.arange(12.0, device="cuda").view(3, 4).t()
    local = collect({"s": {"a": cpu, "b": gpu}}, rank=0, world=1, stage_devices=False)
    assert local.on_device is not None and local.on_device.tolist() == [False, True]
    assert local.pieces.address.tolist() == [cpu.data_ptr(), gpu.data_ptr()]
    assert guarded(local, {gpu.untyped_storage().data_ptr()}) == {"s/b"}
    assert torch.equal(device_view(local, 1), gpu)


@needs_cuda
def test_device_memory_is_staged_on_the_host_when_not_asked() -> None:
    gpu = torch.arange(12.0, device="cuda")
    local = collect({"s": gpu}, rank=0, world=1)
    assert local.on_device is None
    buffer = local.keep_alive[0]
    assert isinstance(buffer, torch.Tensor) and buffer.is_pinned() and torch.equal(buffer, gpu.cpu())


@needs_cuda
def test_conjugated_device_memory_is_made_real_on_the_device() -> None:
    gpu = torch.tensor([1 + 2j, 3 - 4j], device="cuda").conj()
    local = collect({"s": gpu}, rank=0, world=1, stage_devices=False)
    assert local.on_device is not None and local.on_device.tolist() == [True]
    assert not device_view(local, 0).is_conj() and torch.equal(device_view(local, 0), gpu)
