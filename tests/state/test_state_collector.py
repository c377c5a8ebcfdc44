"""Goal: a `Collector` that has seen a state before gives what a first look at it gives.

Method: hypothesis plays random changes of a training state (tensors replaced, resized, re-allocated, moved within their
storage, frozen, annotated; keys and scalars changed; optimizer state swapped; DTensors cut otherwise), and after each one
the collector that saw all of them is compared with one that saw nothing: specs, boxes, addresses, objects.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.engine.structure import Digests, layout_digest, structure_digest
from ckpt.format.spec import LocalState
from ckpt.layout.box import Box
from ckpt.state import Collector, annotate, collect

State = dict[str, Any]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks of which only this one is there: nothing is ever sent."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def cut(mesh: DeviceMesh, num: int, placement: Shard | Replicate) -> DTensor:
    local = torch.zeros(num if isinstance(placement, Replicate) else -(-num // 2), 3)
    size = torch.Size([num, 3])
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=size, stride=(3, 1))


def make_state(mesh: DeviceMesh) -> State:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    tensors = {f"t{i}": torch.zeros(i, 3) for i in range(4)}
    return {
        "model": model,
        "optimizer": optimizer,
        "plain": {"tensors": tensors, "cut": {"a": cut(mesh, 6, Shard(0))}, "epoch": 1, "list": [torch.ones(2), 0.5]},
    }


def replace(state: State, number: int, mesh: DeviceMesh) -> None:
    tensors = state["plain"]["tensors"]
    tensors[f"t{number % 4}"] = torch.zeros(number % 4, 3)


def reallocate(state: State, number: int, mesh: DeviceMesh) -> None:
    tensor = state["plain"]["tensors"].get(f"t{number % 4}")
    if tensor is not None and not hasattr(tensor, "is_noted"):
        tensor.set_(torch.zeros(2, 3)) if number % 2 else tensor.set_(torch.zeros(3, 2).t())


def swap_data(state: State, number: int, mesh: DeviceMesh) -> None:
    weight = state["model"][number % 2].weight
    weight.data = weight.data.clone() if number % 3 else weight.data.t().contiguous().t()


def change_dtype(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["list"][0] = torch.ones(2, dtype=[torch.float64, torch.int64, torch.bool][number % 3])


def grow_storage(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["list"][0].untyped_storage().resize_(16 + number)


def change_in_place(state: State, number: int, mesh: DeviceMesh) -> None:
    with torch.no_grad():
        state["model"][0].bias.fill_(number)


def add_key(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["tensors"][f"new{number}"] = torch.zeros(1)


def remove_key(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["tensors"].pop(f"t{number % 4}", None)


def change_scalar(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["epoch"] = number
    state["optimizer"].param_groups[0]["lr"] = number / 7


def swap_optimizer_state(state: State, number: int, mesh: DeviceMesh) -> None:
    optimizer, weight = state["optimizer"], state["model"][number % 2].weight
    slots = optimizer.state[weight]
    if number % 3 == 0:
        optimizer.state.pop(weight)
    elif slots:
        optimizer.state[weight] = {slot: value.clone() for slot, value in slots.items()}


def freeze(state: State, number: int, mesh: DeviceMesh) -> None:
    state["model"][0].bias.requires_grad_(bool(number % 2))


def tie(state: State, number: int, mesh: DeviceMesh) -> None:
    state["model"].register_buffer("copy", state["model"][0].weight.detach() if number % 2 else torch.zeros(2))


def cut_otherwise(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["cut"]["a"] = cut(mesh, 4 + number % 3, Shard(0) if number % 2 else Replicate())


def swap_local(state: State, number: int, mesh: DeviceMesh) -> None:
    tensor = state["plain"]["cut"]["a"]
    tensor._local_tensor = tensor._local_tensor.clone()  # as FSDP2 does when it reshards


def note(state: State, number: int, mesh: DeviceMesh) -> None:
    noted = torch.zeros(2, 3)
    noted.is_noted = True  # type: ignore[attr-defined]
    annotate(noted, shape=(6, 3), boxes=[(Box(offsets=(number % 4, 0), lengths=(2, 3)), (0, 0))])
    state["plain"]["tensors"]["t2"] = noted


def move_note(state: State, number: int, mesh: DeviceMesh) -> None:
    noted = state["plain"]["tensors"].get("t2")
    if hasattr(noted, "is_noted"):
        annotate(noted, shape=(6, 3), boxes=[(Box(offsets=(number % 4, 0), lengths=(2, 3)), (0, 0))])


CHANGES: list[Callable[[State, int, DeviceMesh], None]] = [
    replace,
    reallocate,
    swap_data,
    change_dtype,
    grow_storage,
    change_in_place,
    add_key,
    remove_key,
    change_scalar,
    swap_optimizer_state,
    freeze,
    tie,
    cut_otherwise,
    swap_local,
    note,
    move_note,
]


def facts(local: LocalState) -> tuple[Any, ...]:
    pieces = local.pieces
    columns = (pieces.boxes.tensor, pieces.boxes.offsets, pieces.boxes.lengths, pieces.address, pieces.limit)
    return (
        local.specs,
        [column.tolist() for column in (*columns, pieces.strides)],
        local.objects,
        local.describe(),
        structure_digest(local),
        layout_digest(local),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 20)), max_size=12))
def test_a_collector_gives_what_a_first_look_gives_after_any_change(
    mesh: DeviceMesh, steps: list[tuple[Callable[[State, int, DeviceMesh], None], int]]
) -> None:
    state, collector, digests = make_state(mesh), Collector(), Digests()
    for change, number in [(change_in_place, 0), *steps]:
        change(state, number, mesh)
        found, expected = collector.collect(state, rank=0, world=2), collect(state, rank=0, world=2)
        assert facts(found) == facts(expected), change.__name__
        assert (digests.structure(found), digests.layout(found)) == (
            structure_digest(expected),
            layout_digest(expected),
        )


def test_what_did_not_change_is_given_out_again_as_the_same_objects(mesh: DeviceMesh) -> None:
    state, collector = make_state(mesh), Collector()
    first = collector.collect(state, rank=0, world=2)
    change_in_place(state, 3, mesh)
    change_scalar(state, 3, mesh)
    second = collector.collect(state, rank=0, world=2)
    assert second.specs is first.specs
    assert second.pieces is first.pieces
    swap_data(state, 1, mesh)  # another address, the same boxes
    third = collector.collect(state, rank=0, world=2)
    assert third.pieces is not first.pieces
    assert third.pieces.boxes is first.pieces.boxes


def test_a_collector_keeps_no_tensor_alive() -> None:
    memory, collector = np.zeros(1000), Collector()  # dies when the last tensor that uses it does
    state = {"plain": {"tensor": torch.from_numpy(memory)}}
    collector.collect(state, rank=0, world=1)
    watched = weakref.ref(memory)
    del memory, state
    gc.collect()
    assert watched() is None
