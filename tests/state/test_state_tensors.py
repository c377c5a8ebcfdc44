"""One tensor to boxes and addresses, whatever its memory looks like.

Goal: collected pieces read exactly the tensor, for every dtype, stride and shape. Method: read raw addresses, compare
bits.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import DTYPES
from ckpt.layout.box import Box
from ckpt.state import annotate, collect
from ckpt.state.tensors import overlaps_itself
from tests.state.state_oracle import Memory, load_alone, numbered, save_alone

STRANGE = {
    "transposed": lambda: numbered((3, 4)).t(),
    "sliced": lambda: numbered((6, 8))[1:5:2, 3:7],
    "offset": lambda: numbered((10,))[7:],
    "scalar": lambda: torch.tensor(7.5),
    "scalar of a vector": lambda: numbered((5,))[3],
    "empty": lambda: torch.empty(0, 3),
    "empty inside": lambda: torch.empty(2, 0, 3),
    "channels last": lambda: numbered((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last),
    "ones": lambda: numbered((1, 1, 1)),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_any_memory_reads_and_loads_exactly(kind: str) -> None:
    tensor = STRANGE[kind]()
    memory = save_alone({"x": tensor})
    assert torch.equal(memory.tensor("x"), tensor)
    goal = STRANGE[kind]()
    goal.zero_()
    load_alone({"x": goal}, memory)
    assert torch.equal(goal, tensor)


def test_a_load_into_a_slice_leaves_its_surroundings_alone() -> None:
    outer = torch.full((6, 8), -1.0)
    load_alone({"x": outer[1:5:2, 3:7]}, save_alone({"x": numbered((2, 4))}))
    expected = torch.full((6, 8), -1.0)
    expected[1:5:2, 3:7] = numbered((2, 4))
    assert torch.equal(outer, expected)


@pytest.mark.parametrize("lazy", [lambda t: t.conj(), lambda t: torch._neg_view(t)])
def test_values_computed_on_reading_are_stored_as_read(lazy: object) -> None:
    tensor = lazy(torch.tensor([1 + 2j, 3 - 4j]))  # type: ignore[operator]
    assert save_alone({"x": tensor}).tensor("x").tolist() == tensor.resolve_conj().resolve_neg().tolist()
    with pytest.raises(InvalidInputError, match="`x` cannot be loaded into"):
        load_alone({"x": tensor}, save_alone({"x": tensor}))


def test_expanded_tensors_are_stored_whole_and_refused_as_targets() -> None:
    tensor = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    memory = save_alone({"x": tensor})
    assert memory.tensor("x").tolist() == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(InvalidInputError, match="share memory"):
        load_alone({"x": tensor}, memory)


@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_keeps_every_bit(name: str) -> None:
    dtype = getattr(torch, name)
    values = torch.arange(0, 2 if name == "bool" else 256, dtype=torch.uint8).repeat(16)
    tensor = values.view(dtype)
    goal = torch.zeros_like(values).view(dtype)
    memory = save_alone({"x": tensor})
    load_alone({"x": goal}, memory)
    assert memory.specs["x"].dtype == name
    assert torch.equal(goal.view(torch.uint8), values)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 4), max_size=4))
def test_any_view_reads_exactly(data: st.DataObject, shape: list[int]) -> None:
    tensor = numbered(shape, torch.int64)
    for _ in range(data.draw(st.integers(0, 3))):
        if tensor.dim() == 0:
            break
        dim = data.draw(st.integers(0, tensor.dim() - 1))
        move = data.draw(st.sampled_from(["narrow", "step", "swap", "select", "expand"]))
        size = tensor.shape[dim]
        if move == "narrow":
            start = data.draw(st.integers(0, size))
            tensor = tensor.narrow(dim, start, data.draw(st.integers(0, size - start)))
        elif move == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, data.draw(st.integers(1, 3))),)]
        elif move == "swap":
            tensor = tensor.transpose(dim, data.draw(st.integers(0, tensor.dim() - 1)))
        elif move == "select" and size:
            tensor = tensor.select(dim, data.draw(st.integers(0, size - 1)))
        else:
            tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], 2, *tensor.shape[dim:])
    assert torch.equal(save_alone({"x": tensor}).tensor("x"), tensor)
    distinct = torch.unique(tensor).numel() == tensor.numel()
    assert overlaps_itself(tensor) is (not distinct)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.zeros(2, device="meta"), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "not a plain dense tensor"),
        (lambda: torch.zeros(2, dtype=torch.bits8), "dtype torch.bits8"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "not a plain dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_plain_memory_is_refused_by_name(tensor: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"tensor `x`.*{message}"):
        collect({"x": tensor()}, rank=0, world=1)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="tensor `model/.*` belongs to a lazy module"):
        collect({"model": nn.LazyLinear(3)}, rank=0, world=1)


def test_an_annotated_tensor_is_its_part_and_its_optimizer_state_follows() -> None:
    whole = numbered((4, 6))
    model = nn.Linear(3, 4, bias=False)
    model.weight.data.copy_(whole[:, 3:])
    annotate(
        model.weight,
        shape=(4, 6),
        boxes=[
            (Box(offsets=(0, 3), lengths=(2, 3)), (0, 0)),
            (Box(offsets=(2, 3), lengths=(2, 3)), (2, 0)),
        ],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = whole[:, 3:].clone()
    optimizer.step()
    model.weight.data.copy_(whole[:, 3:])
    local = collect({"model": model, "optimizer": optimizer}, rank=0, world=1)
    assert {spec.name: spec.shape for spec in local.specs} == {
        "model/weight": (4, 6),
        "optimizer/weight/momentum_buffer": (4, 6),
    }
    memory = Memory([local])
    for name in ("model/weight", "optimizer/weight/momentum_buffer"):
        assert memory.covered[name].tolist() == [[False] * 3 + [True] * 3] * 4
        assert torch.equal(memory.tensor(name)[:, 3:], whole[:, 3:])


def test_an_annotated_expert_may_lack_the_dim_of_the_stack_and_a_buffer_may_be_flat() -> None:
    stack = numbered((3, 2, 4))
    expert, flat = stack[1].clone(), stack[2].reshape(-1).clone()
    annotate(expert, shape=(3, 2, 4), boxes=[(Box(offsets=(1, 0, 0), lengths=(1, 2, 4)), (0, 0))])
    annotate(flat, shape=(3, 2, 4), boxes=[(Box(offsets=(2, 0, 0), lengths=(1, 2, 4)), (0,))])
    memory = Memory([collect({"x": expert}, rank=0, world=2), collect({"x": flat}, rank=1, world=2)])
    assert torch.equal(memory.tensor("x")[1:], stack[1:])


@pytest.mark.parametrize(
    ("box", "at", "message"),
    [
        (Box(offsets=(3, 0), lengths=(2, 2)), (0, 0), "outside its global shape"),
        (Box(offsets=(0, 0), lengths=(2, 2)), (1, 1), "outside its local shape"),
        (Box(offsets=(0,), lengths=(2,)), (0, 0), "outside its global shape"),
        (Box(offsets=(0, 0), lengths=(2, 2)), (0,), "outside its local shape"),
    ],
)
def test_a_wrong_annotation_is_refused_at_once(box: Box, at: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        annotate(torch.zeros(2, 2), shape=(4, 2), boxes=[(box, at)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_tensors_go_through_pinned_copies_and_back() -> None:
    tensor = numbered((5, 7)).cuda().t()
    memory = save_alone({"x": tensor})
    assert torch.equal(memory.tensor("x"), tensor.cpu())
    goal = torch.zeros(7, 5, device="cuda")
    load_alone({"x": goal}, memory)
    assert torch.equal(goal, tensor)
