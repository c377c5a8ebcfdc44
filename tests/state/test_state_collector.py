"""Goal: a `Collector` that has seen a state before gives what a first look at it gives.

Method: hypothesis plays random changes of a training state (tensors replaced, resized, re-allocated, moved within their
storage, frozen, annotated; keys and scalars changed; optimizer state swapped; DTensors cut otherwise), and after each one
the collector that saw all of them is compared with one that saw nothing: specs, boxes, addresses, objects.
"""

from __future__ import annotations

import collections
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
from state_oracle import piece_views
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.engine.structure import Digests, layout_digest, structure_digest
from ckpt.errors import InvalidInputError
from ckpt.format.spec import LocalState
from ckpt.layout.box import Box
from ckpt.state import RNG, Collector, annotate, collect

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
    storage = state["plain"]["list"][0].untyped_storage()
    storage.resize_(storage.nbytes() + number)


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


def replace_module(state: State, number: int, mesh: DeviceMesh) -> None:
    state["model"][1] = nn.Linear(4, 2, bias=bool(number % 2))
    state["optimizer"] = torch.optim.Adam(state["model"].parameters())


def replace_param(state: State, number: int, mesh: DeviceMesh) -> None:
    state["model"].scale = nn.Parameter(torch.zeros(number % 3))  # named by the module, in no group


def rename_module(state: State, number: int, mesh: DeviceMesh) -> None:
    modules = state["model"]._modules
    modules["last" if "1" in modules else "1"] = modules.pop("1" if "1" in modules else "last")


def unpersist(state: State, number: int, mesh: DeviceMesh) -> None:
    state["model"].register_buffer("copy", torch.zeros(2), persistent=bool(number % 2))


def tie_dtensors(state: State, number: int, mesh: DeviceMesh) -> None:
    one = nn.Parameter(cut(mesh, 6, Shard(0)))
    other = nn.Parameter(DTensor(one._local_tensor, one._spec, requires_grad=True))  # type: ignore[call-arg]
    state["model"].one, state["model"].other = (one, one) if number % 2 else (one, other)


def swap_names(state: State, number: int, mesh: DeviceMesh) -> None:
    first, second = state["model"][0], state["model"][number % 2]
    first.bias, second.bias = second.bias, first.bias


def add_param_group(state: State, number: int, mesh: DeviceMesh) -> None:
    extra = nn.Parameter(torch.zeros(number % 3 + 1))
    state["plain"]["tensors"][f"extra{number}"] = extra
    state["optimizer"].add_param_group({"params": [extra], "lr": number / 9})


def regroup(state: State, number: int, mesh: DeviceMesh) -> None:
    groups = state["optimizer"].param_groups
    groups[0]["params"].append(groups[0]["params"].pop(0))


def change_betas(state: State, number: int, mesh: DeviceMesh) -> None:
    state["optimizer"].param_groups[0]["betas"] = (0.9, number / 50)
    state["optimizer"].param_groups[0]["note"] = [number, {"of": [number]}]


def add_slot(state: State, number: int, mesh: DeviceMesh) -> None:
    weight = state["model"][0].weight
    slots = state["optimizer"].state[weight]
    slots[["max_exp_avg_sq", "count", "nested"][number % 3]] = [
        torch.zeros_like(weight),
        number,
        {"tensors": [torch.zeros(2)], "number": number},
    ][number % 3]


def resize(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"]["list"][0].resize_(number % 5)


def view_elsewhere(state: State, number: int, mesh: DeviceMesh) -> None:
    base = state["plain"].setdefault("base", torch.zeros(40))
    tensor = state["plain"]["list"][0]
    tensor.data = base[number : number + 2] if number % 2 else base[::2][:number]


def conjugate(state: State, number: int, mesh: DeviceMesh) -> None:
    now = state["plain"].setdefault("lazy", {"base": torch.tensor([1 + 2j, 3 - 4j]), "conj": torch.zeros(2) * 1j})
    base = now["base"]
    now["conj"].data = base.conj() if number % 3 else base
    now["neg"] = base.conj().imag if number % 2 else base.imag


def change_spec(state: State, number: int, mesh: DeviceMesh) -> None:
    tensor = state["plain"]["cut"]["b"] = cut(mesh, 4, Shard(0))
    if number % 2:
        tensor._spec.placements = (Replicate(),)
        tensor._local_tensor = torch.zeros(4, 3)


def same_spec_anew(state: State, number: int, mesh: DeviceMesh) -> None:
    tensor = state["plain"]["cut"]["a"]
    tensor._spec.placements = tuple(type(p)(p.dim) if isinstance(p, Shard) else p for p in tensor._spec.placements)


def change_leaf(state: State, number: int, mesh: DeviceMesh) -> None:
    values = [1, True, 1.0, 0.0, -0.0, float("nan"), "1", b"1", None, 2**70, np.float32(1), np.zeros(2), torch.float32]
    state["plain"]["list"][1] = values[number % len(values)]


def change_leaf_in_place(state: State, number: int, mesh: DeviceMesh) -> None:
    state["plain"].setdefault("array", np.zeros(3))[0] = number


def change_containers(state: State, number: int, mesh: DeviceMesh) -> None:
    tensors, kinds = state["plain"].setdefault("box", [torch.zeros(1)]), (list, tuple, collections.deque)
    state["plain"]["box"] = kinds[number % 3](tensors)
    state["plain"]["keys"] = {[1, "1", True][number % 3]: torch.zeros(1), "order": [], "number": number % 2}


def reorder(state: State, number: int, mesh: DeviceMesh) -> None:
    plain = state["plain"]
    for key in list(plain)[number % 2 :: 2]:
        plain[key] = plain.pop(key)


def change_state_keys(state: State, number: int, mesh: DeviceMesh) -> None:
    state["more"] = [torch.zeros(1), 3, {"a": torch.zeros(2)}, "text"][number % 4]


def step_scheduler(state: State, number: int, mesh: DeviceMesh) -> None:
    if "scheduler" not in state:
        state["scheduler"] = Counter()
    state["scheduler"].count += number % 2
    state["rng"] = RNG()
    torch.manual_seed(number)


def train(state: State, number: int, mesh: DeviceMesh) -> None:
    for param in state["model"].parameters():
        param.grad = None if isinstance(param, DTensor) else torch.ones_like(param)
    state["optimizer"].step()


class Counter:
    """An object of the user's, with a tensor of its own."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(2)

    def state_dict(self) -> State:
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state: State) -> None:
        raise NotImplementedError


def change_one_fact(state: State, number: int, mesh: DeviceMesh) -> None:
    """The same address, all but one of size, stride, dtype and length of the storage as before."""
    array = state.setdefault("array", {"memory": torch.zeros(16, dtype=torch.int32)})["memory"].numpy()
    plain, base = state["plain"], torch.from_numpy(array)
    square, longer = base[:4].view(2, 2), torch.from_numpy(array[:8])[:4].view(2, 2)
    plain["fact"] = [square, square.t(), square.view(torch.float32), square[:1], longer, square[:, :1]][number % 6]
    local, size = base[:9].view(3, 3), torch.Size([5 + number // 6 % 2, 3])  # a shard of 3 rows of 5 or of 6
    plain["shard"] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=(3, 1))


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
    replace_module,
    replace_param,
    rename_module,
    unpersist,
    tie_dtensors,
    swap_names,
    add_param_group,
    regroup,
    change_betas,
    add_slot,
    resize,
    view_elsewhere,
    conjugate,
    change_spec,
    same_spec_anew,
    change_leaf,
    change_leaf_in_place,
    change_containers,
    reorder,
    change_state_keys,
    step_scheduler,
    train,
    change_one_fact,
]


def facts(local: LocalState) -> tuple[Any, ...]:
    """All that a save works with. Of conjugated tensors every look makes a copy elsewhere: of them the bytes."""
    pieces, names = local.pieces, [spec.name for spec in local.specs]
    copied = np.array(["/lazy/" in names[number] for number in pieces.boxes.tensor.tolist()], np.bool_)
    assert local.storage_of_piece is not None and len(local.keep_alive) == len(names)
    where = [np.where(copied, 0, column) for column in (pieces.address, pieces.limit, local.storage_of_piece)]
    columns = (pieces.boxes.tensor, pieces.boxes.offsets, pieces.boxes.lengths, *where, pieces.strides)
    views = zip(piece_views(local), copied, strict=True) if copied.any() else []
    return (
        local.specs,
        [column.tolist() for column in columns],
        [view.tobytes() for (_, _, view), is_copy in views if is_copy],
        local.objects,
        local.describe(),
        local.on_device,
        structure_digest(local),
        layout_digest(local),
    )


def compare(collector: Collector, digests: Digests, state: State, change: str) -> None:
    """What the collector gives, and what a first look gives; both may refuse, then with one message."""
    found: LocalState | str
    expected: LocalState | str
    try:
        expected = collect(state, rank=0, world=2)
    except InvalidInputError as error:
        expected = error.message
    try:
        found = collector.collect(state, rank=0, world=2)
    except InvalidInputError as error:
        found = error.message
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected, change
        return
    assert facts(found) == facts(expected), change
    structure, layout = structure_digest(expected), layout_digest(expected)
    assert (digests.structure(found), digests.layout(found)) == (structure, layout), change


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 20)), max_size=12))
def test_a_collector_gives_what_a_first_look_gives_after_any_change(
    mesh: DeviceMesh, steps: list[tuple[Callable[[State, int, DeviceMesh], None], int]]
) -> None:
    state, collector, digests = make_state(mesh), Collector(), Digests()
    for change, number in [(change_in_place, 0), *steps]:
        try:
            change(state, number, mesh)
        except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, ValueError):
            pass  # a change that an earlier one made impossible
        compare(collector, digests, state, change.__name__)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_kind_of_change_is_noticed_each_time(
    mesh: DeviceMesh, change: Callable[[State, int, DeviceMesh], None]
) -> None:
    state, collector, digests = make_state(mesh), Collector(), Digests()
    compare(collector, digests, state, "first")
    for number in (0, 1, 2, 0, 3, 4, 6, 0, 5, 12, 13, 16):
        change(state, number, mesh)
        compare(collector, digests, state, change.__name__)
        compare(collector, digests, state, "nothing")


def test_an_unchanged_state_is_not_walked_again(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    state, collector = make_state(mesh), Collector()
    step_scheduler(state, 1, mesh)
    note(state, 1, mesh)
    first = collector.collect(state, rank=0, world=2)
    monkeypatch.setattr(Collector, "_walk", None)
    for change in (train, change_scalar, change_betas, step_scheduler, change_in_place):
        change(state, 5, mesh)
        assert collector.collect(state, rank=0, world=2).pieces is first.pieces


def test_state_dicts_made_anew_for_each_save_are_not_walked_again(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, collector = make_state(mesh), Collector()
    state["model"].cut = nn.Parameter(cut(mesh, 6, Shard(0)))
    first = collector.collect({"model": state["model"].state_dict()}, rank=0, world=2)
    monkeypatch.setattr(Collector, "_walk", None)
    assert collector.collect({"model": state["model"].state_dict()}, rank=0, world=2).pieces is first.pieces


def test_memory_handed_out_again_outlives_its_tensor() -> None:
    memory, collector = np.zeros(1000), Collector()
    state = {"plain": {"tensor": torch.from_numpy(memory)}}
    collector.collect(state, rank=0, world=1)
    local = collector.collect(state, rank=0, world=1)
    watched = weakref.ref(memory)
    state["plain"]["tensor"].data = torch.zeros(1)
    del memory, state
    gc.collect()
    assert watched() is not None
    del local
    gc.collect()
    assert watched() is None


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
    for _ in range(3):
        collector.collect(state, rank=0, world=1)
    watched = weakref.ref(memory)
    del memory, state
    gc.collect()
    assert watched() is None


def test_a_collector_keeps_no_mesh_and_no_module_alive(mesh: DeviceMesh) -> None:
    model, collector = nn.Linear(3, 4), Collector()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        collector.collect({"model": model, "optimizer": optimizer}, rank=0, world=2)
    watched = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.weight)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
