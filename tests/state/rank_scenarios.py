"""What the ranks of a `RankPool` run: a plain model, made parallel by torch itself, must be stored as the plain one.

Goal: for every kind of parallelism, boxes and addresses say exactly which elements of the plain tensors lie where.
Method: fill the plain model with element indices, let torch cut it, collect on all ranks, exchange the pieces, compare
with the plain model and optimizer; then load into a fresh parallel model and compare again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ckpt.errors import InvalidInputError
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Rule, ShardStep, Where
from ckpt.state import SavedWorld, collect, target
from tests.state.state_oracle import Memory, export, numbered

State = dict[str, Any]
Parallel = Callable[[nn.Module], nn.Module]


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, hidden) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", numbered((3,)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


EVEN = {"vocabulary": 16, "width": 8, "hidden": 16}
UNEVEN = {"vocabulary": 13, "width": 3, "hidden": 5}  # on 4 ranks: short pieces, empty pieces


def net(sizes: dict[str, int], *, start: int = 0, tied: bool = False) -> Net:
    """A plain model whose parameters hold their own element indices, each parameter other ones."""
    model = Net(**sizes, tied=tied)
    for parameter in model.parameters():
        parameter.data.copy_(numbered(parameter.shape, start=start))
        start += parameter.numel()
    return model


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.125, foreach=False, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step with each parameter as its own gradient: the same element by element, however it is cut."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach().clone()
    optimizer.step()


def gather(state: State, **options: Any) -> Memory:
    """The pieces of all ranks, on every rank, as whole tensors."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = export(collect(state, rank=rank, world=world, **options))
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    memory = Memory([])
    for other, exported in enumerate(everyone):
        memory.add_exported(other, exported)
    return memory


def load(state: State, memory: Memory, **options: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    goal = target(state, list(memory.specs.values()), rank=rank, world=world, **options)
    assert set(goal.wants_objects) <= set(memory.objects)
    saved = SavedWorld(world=world, same_layout=True)
    goal.check(memory.objects, saved)
    memory.fill(goal.local)
    goal.restore(memory.objects, saved)


def check_equal(memory: Memory, reference: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The collected tensors are those of the plain model and optimizer, and no others."""
    memory.check_complete()
    expected = {f"model/{name}": tensor.detach() for name, tensor in reference.named_parameters()}
    expected |= {f"model/{name}": tensor for name, tensor in reference.named_buffers()}
    for name, parameter in reference.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            expected[f"optimizer/{name}/{slot}"] = value
    assert sorted(memory.specs) == sorted(expected)
    for name, tensor in expected.items():
        assert memory.specs[name].shape == tuple(tensor.shape), name
        assert torch.equal(memory.tensor(name), tensor), name


def roundtrip(
    sizes: dict[str, int],
    parallel: Parallel,
    *,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    tied: bool = False,
) -> None:
    reference = net(sizes, tied=tied)
    model = parallel(copy.deepcopy(reference))
    plain, optimizer = adamw(reference), optimizer_of(model)
    for _ in range(2):
        step(reference, plain)
        step(model, optimizer)
    memory = gather({"model": model, "optimizer": optimizer})
    check_equal(memory, reference, plain)

    fresh = parallel(net(sizes, start=1000, tied=tied))
    other = optimizer_of(fresh)
    load({"model": fresh, "optimizer": other}, memory)
    check_equal(gather({"model": fresh, "optimizer": other}), reference, plain)
    step(reference, plain)
    step(fresh, other)
    check_equal(gather({"model": fresh, "optimizer": other}), reference, plain)


def shard_each(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = True) -> nn.Module:
    plan: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel()}
    for index in range(len(model.layers)):
        plan[f"layers.{index}.up"] = ColwiseParallel()
        plan[f"layers.{index}.down"] = RowwiseParallel()
        if sequence:
            plan[f"layers.{index}.norm"] = SequenceParallel()
    return parallelize_module(model, mesh, plan)


# Scenarios


def fsdp2(sizes: dict[str, int], tied: bool = False) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    roundtrip(sizes, lambda model: shard_each(model, mesh), tied=tied)


def fsdp2_on_last_dim() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    roundtrip(EVEN, lambda model: shard_each(model, mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1)))


def hsdp(sizes: dict[str, int]) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    roundtrip(sizes, lambda model: shard_each(model, mesh))


def tp(sizes: dict[str, int]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    roundtrip(sizes, lambda model: tensor_parallel(model, mesh))


def tp_fsdp2(sizes: dict[str, int], dp: int = 2) -> None:
    mesh = init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))
    roundtrip(sizes, lambda model: shard_each(tensor_parallel(model, mesh["tp"]), mesh["dp"]))


def tp_fsdp2_equals_full_tensor() -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = shard_each(tensor_parallel(net(EVEN), mesh["tp"]), mesh["dp"])
    memory = gather({"model": model})
    strided = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(memory.tensor(f"model/{name}"), parameter.full_tensor()), name
        strided += any("_S" in str(p) for p in parameter.placements)
    assert strided or mesh.shape[1] == 1, "no parameter is cut twice on one dim: this tests nothing"


def fsdp2_after_a_forward_only() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reference = net(EVEN)
    model = shard_each(copy.deepcopy(reference), mesh)
    optimizer = adamw(model)
    with torch.no_grad():
        model(torch.arange(4))
    check_equal(gather({"model": model, "optimizer": optimizer}), reference, adamw(reference))


def ddp_trains_on() -> None:
    reference = net(EVEN)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
    optimizer, plain = adamw(model), adamw(reference)
    step(model, optimizer)
    step(reference, plain)
    check_equal(gather({"model": model, "optimizer": optimizer}), reference, plain)


def fsdp1(sizes: dict[str, int], strategy: str = "FULL_SHARD", tied: bool = False) -> None:
    policy = None if tied else ModuleWrapPolicy({Layer})
    wrap = functools.partial(
        FullyShardedDataParallel,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
    )
    roundtrip(sizes, wrap, tied=tied)


def fsdp1_trains_between() -> None:
    """After real forwards and backwards the shards are where they were, and a load reaches the next forward."""
    wrap = functools.partial(
        FullyShardedDataParallel,
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        device_id=torch.device("cpu"),
    )

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.arange(8) % 13).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    torch.manual_seed(0)
    model = wrap(Net(**UNEVEN))
    optimizer = adamw(model)
    for _ in range(2):
        train(model, optimizer)
    memory = gather({"model": model, "optimizer": optimizer})
    memory.check_complete()
    torch.manual_seed(1)
    fresh = wrap(Net(**UNEVEN))
    other = adamw(fresh)
    train(fresh, other)
    load({"model": fresh, "optimizer": other}, memory)
    assert [train(model, optimizer) for _ in range(2)] == [train(fresh, other) for _ in range(2)]


def fsdp1_without_original_parameters_is_refused() -> None:
    model = FullyShardedDataParallel(net(EVEN), use_orig_params=False, device_id=torch.device("cpu"))
    try:
        collect({"model": model}, rank=dist.get_rank(), world=dist.get_world_size())
    except InvalidInputError as error:
        assert "without its original parameters" in error.message and "use_orig_params" in str(error.hints)
    else:
        raise AssertionError("a flat parameter was accepted")


def _zero_optimizer(model: nn.Module, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns on import: only where it is used

    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)


def zero(sizes: dict[str, int]) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return _zero_optimizer(model, lr=0.125, foreach=False)

    roundtrip(sizes, nn.parallel.DistributedDataParallel, optimizer_of=optimizer_of)


def zero_restores_hyperparameters() -> None:
    reference = net(EVEN)
    memory = gather({"model": reference, "optimizer": adamw(reference)})
    model = net(EVEN)
    optimizer = _zero_optimizer(model, lr=9.0)
    load({"model": model, "optimizer": optimizer}, memory)
    assert {group["lr"] for group in (*optimizer.param_groups, *optimizer.optim.param_groups)} == {0.125}


def fsdp2_into_plain_and_zero_into_fsdp2() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reference = net(UNEVEN)
    plain = adamw(reference)
    step(reference, plain)
    model = copy.deepcopy(reference)
    optimizer = adamw(model)
    load({"model": model, "optimizer": optimizer}, gather({"model": reference, "optimizer": plain}))
    sharded = shard_each(net(UNEVEN, start=500), mesh)
    other = adamw(sharded)
    load({"model": sharded, "optimizer": other}, gather({"model": model, "optimizer": optimizer}))
    check_equal(gather({"model": sharded, "optimizer": other}), reference, plain)


def a_rank_outside_the_mesh_holds_nothing() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = distribute_tensor(numbered((5, 2)), mesh, [Shard(0)])
    local = collect({"x": tensor}, rank=dist.get_rank(), world=dist.get_world_size())
    assert [spec.shape for spec in local.specs] == [(5, 2)]
    assert len(local.pieces.boxes) == (1 if dist.get_rank() < 2 else 0)
    assert torch.equal(gather({"x": tensor}).tensor("x"), numbered((5, 2)))


def a_partial_tensor_is_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    try:
        collect({"x": tensor}, rank=dist.get_rank(), world=dist.get_world_size())
    except InvalidInputError as error:
        assert "tensor `x` has placement" in error.message
    else:
        raise AssertionError("a partial tensor was accepted")


def dtensors_in_plain_values() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"ema": {"w": distribute_tensor(numbered((7, 3)), mesh, [Shard(0)]), "n": 3}}
    memory = gather(state)
    fresh = {"ema": {"w": distribute_tensor(torch.zeros(7, 3), mesh, [Shard(1)]), "n": 0}}
    load(fresh, memory)
    assert torch.equal(fresh["ema"]["w"].full_tensor(), numbered((7, 3))) and fresh["ema"]["n"] == 3


def _rule(pattern: str, where: Where) -> Rule:
    return Rule(match=(NamePattern(text=pattern),), where=where)


def plain_tensors_under_a_layout() -> None:
    """Megatron's way: every rank has plain tensors that are parts of global ones."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, wide, bias = numbered((8, 4)), numbered((4, 8)), numbered((4,))
    model = nn.ModuleDict({"column": nn.Linear(4, 8 // world, bias=False), "row": nn.Linear(8 // world, 4)})
    model["column"].weight.data.copy_(whole.chunk(world, 0)[rank])
    model["row"].weight.data.copy_(wide.chunk(world, 1)[rank])
    model["row"].bias.data.copy_(bias)
    layout = Layout(
        mesh=Mesh(axes=(("tp", world),)),
        rules=(
            _rule("model/column.weight", Where(shard=(ShardStep(dim=0, axis="tp"),))),
            _rule("model/row.weight", Where(shard=(ShardStep(dim=1, axis="tp"),))),
            _rule("model/row.bias", Where()),
        ),
    )
    optimizer = adamw(model)
    step(model, optimizer)
    memory = gather({"model": model, "optimizer": optimizer}, layout=layout)
    memory.check_complete()
    assert memory.specs["model/column.weight"].shape == (8, 4) == memory.specs["optimizer/column.weight/exp_avg"].shape
    assert memory.specs["optimizer/row.weight/exp_avg"].shape == (4, 8)
    assert torch.allclose(memory.tensor("optimizer/row.weight/exp_avg"), wide * 0.1)
