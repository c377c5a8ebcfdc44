"""The test model on every parallel layout, made by torch itself (or by plain cuts, for layouts that ckpt is told of).

`build(kind)` on all ranks gives the state of a training job on that layout: the model holds the oracle's values (torch cuts
them, not ckpt), or -1 everywhere. `faults` says what differs from the oracle: whole parameters by what torch gathers,
optimizer slots piece by piece.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import ckpt
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Experts, Pad, Parts, Rule, ShardStep, Where
from ckpt.state import ElasticSampler, FlatOptimizerState, FlatShard
from tests.workers import model as net
from tests.workers.oracle import SLOTS, param_values, same_bits, slot_values

LAYOUTS = {  # by number of ranks
    1: ("single", "fsdp2", "tp", "megatron", "flat"),
    2: ("ddp", "fsdp2", "fsdp1", "tp", "pp", "ep", "zero", "flat", "megatron"),
    4: ("ddp", "fsdp2", "hsdp", "fsdp1", "tp", "tp_fsdp2", "pp", "pp_fsdp2", "ep", "zero", "flat", "megatron"),
    8: ("hsdp", "tp_fsdp2", "pp", "pp_fsdp2", "ep", "flat", "megatron"),
}
STEP = 7.0
NUM_SAMPLES = 1000
TAKEN = 5  # samples of each data-parallel rank before the save
PAD_MULTIPLE = 4

Cut = Callable[[str, np.ndarray], np.ndarray]


@dataclass(kw_only=True)
class Job:
    """A rank of a training job."""

    kind: str
    model: nn.Module
    optimizer: Any
    scheduler: Any
    dp: tuple[int, int] = (0, 1)  # rank and number of data-parallel ranks
    layout: Layout | None = None
    cut: Cut | None = None  # whole parameter to what this rank holds, where torch cannot tell
    state: dict[str, Any] = field(default_factory=dict)


def build(kind: str, *, filled: bool) -> Job:
    """The job on this layout. All ranks call; collective."""
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gathers are slow on strided shards: fine
    rank, world = dist.get_rank(), dist.get_world_size()
    job = _MAKERS[kind](rank, world, filled)
    job.kind = kind
    job.state = {
        "model": job.model,
        "optimizer": job.optimizer,
        "scheduler": job.scheduler,
        "scaler": torch.amp.GradScaler("cpu", init_scale=512.0 if filled else 2.0),
        "rng": ckpt.RNG(),
        "loader": ElasticSampler(NUM_SAMPLES, dp_rank=job.dp[0], dp_size=job.dp[1], seed=3 if filled else 4),
        "progress": {"step": 41, "seen": [1.5, "text"]} if filled else {"step": 0, "seen": [0.0, ""]},
    }
    if filled:
        _advance(job)
    return job


def scramble(job: Job, *, drop_slots: bool) -> None:
    """Make everything wrong before a load; without slots when `drop_slots`, as in an optimizer that never stepped."""
    with torch.no_grad():
        for _, param in named_local(job.model):
            param.fill_(-1.0)
        for buffer in job.model.buffers():
            buffer.zero_()
        if isinstance(job.optimizer, FlatOptimizerState):
            for shard in job.optimizer.slots.values():
                shard.buffer.fill_(-1.0)
            job.optimizer.step = 0
        elif drop_slots:
            _inner(job.optimizer).state.clear()
        else:
            for slots in _inner(job.optimizer).state.values():
                for value in slots.values():
                    _local(value).fill_(-1.0)
    for group in _groups(job.optimizer):
        group["lr"] = 99.0
    job.state["progress"] = {"step": 0, "seen": [0.0, ""]}
    job.state["scaler"].load_state_dict({**job.state["scaler"].state_dict(), "scale": 2.0})
    _seed(999)


def faults(job: Job, source: tuple[int, int, int]) -> list[str]:
    """What is not as the oracle says. All ranks call; collective.

    Args:
        source: number of ranks and of data-parallel ranks that saved; and this rank.
    """
    with torch.no_grad():
        return [*_param_faults(job), *_buffer_faults(job), *_slot_faults(job), *_object_faults(job, source)]


# Filling


def _advance(job: Job) -> None:
    """As after some steps: slots, hyperparameters, scheduler, random streams, samples taken."""
    if not isinstance(job.optimizer, FlatOptimizerState):
        for name, param in job.model.named_parameters():
            name = plain_name(name)
            if not net.is_frozen(name) and not net.is_fresh(name):
                param.grad = torch.zeros_like(param)  # with no decay, a step by zero changes no bit of [1, 2)
        job.optimizer.step()
        names = {id(param): plain_name(name) for name, param in job.model.named_parameters()}
        for param, slots in _inner(job.optimizer).state.items():
            assert id(param) in names
            local = _local(param).detach()
            slots["step"].fill_(STEP)
            for slot in SLOTS:
                _local(slots[slot]).copy_(torch.from_numpy(slot_values(slot, local.numpy())).reshape(local.shape))
    for _ in range(4):
        job.scheduler.step()
    _groups(job.optimizer)[0]["weight_decay"] = 0.25
    if isinstance(job.optimizer, FlatOptimizerState):
        for group, of in zip(job.optimizer.groups, job.scheduler.optimizer.param_groups, strict=True):
            group["lr"] = of["lr"]
    _seed(100 + dist.get_rank())
    samples = iter(job.state["loader"])
    for _ in range(TAKEN):
        next(samples)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# The layouts


def _plain(filled: bool, **part: Any) -> net.Net:
    model = net.Net(**part)
    net.fill(model, filled)
    return model


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)


def _job(model: nn.Module, make: Callable[..., Any] = _adamw, *, backwards: bool = False, **more: Any) -> Job:
    params = [(plain_name(name), param) for name, param in model.named_parameters() if param.requires_grad]
    params = params[::-1] if backwards else params
    groups = [
        {"params": [p for name, p in params if net.is_plain_decay(name)], "lr": 0.125},
        {"params": [p for name, p in params if not net.is_plain_decay(name)], "lr": 0.0625},
    ]
    optimizer = make(groups)
    return Job(kind="", model=model, optimizer=optimizer, scheduler=_scheduler(optimizer), **more)


def _scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


def _single(rank: int, world: int, filled: bool) -> Job:
    return _job(_plain(filled))


def _ddp(rank: int, world: int, filled: bool) -> Job:
    return _job(nn.parallel.DistributedDataParallel(_plain(filled)), backwards=True, dp=(rank, world))


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp2(rank: int, world: int, filled: bool) -> Job:
    return _job(_shard(_plain(filled), init_device_mesh("cpu", (world,))), dp=(rank, world))


def _hsdp(rank: int, world: int, filled: bool) -> Job:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return _job(_shard(_plain(filled), mesh), backwards=True, dp=(rank, world))


def _fsdp1(rank: int, world: int, filled: bool) -> Job:
    model = FullyShardedDataParallel(
        _plain(filled),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({net.Layer}),
        device_id=torch.device("cpu"),
    )
    return _job(model, dp=(rank, world))


def _tensor_parallel(model: net.Net, mesh: DeviceMesh) -> net.Net:
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),  # cut over the vocabulary
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention.wqkv": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.mlp.gate_up": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    model.tie()
    return model


def _tp(rank: int, world: int, filled: bool) -> Job:
    return _job(_tensor_parallel(_plain(filled), init_device_mesh("cpu", (world,))), backwards=True)


def _tp_fsdp2(rank: int, world: int, filled: bool) -> Job:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = _shard(_tensor_parallel(_plain(filled), mesh["tp"]), mesh["dp"])
    return _job(model, dp=(mesh.get_local_rank("dp"), world // 2))


def _stage(index: int, num: int) -> dict[str, Any]:
    bounds = [net.NUM_LAYERS * stage // num for stage in range(num + 1)]
    return {"layers": range(bounds[index], bounds[index + 1]), "first": index == 0, "last": index == num - 1}


def _pp(rank: int, world: int, filled: bool) -> Job:
    return _job(_plain(filled, **_stage(rank, world)))


def _pp_fsdp2(rank: int, world: int, filled: bool) -> Job:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))
    model = _plain(filled, **_stage(mesh.get_local_rank("pp"), 2))
    return _job(_shard(model, mesh["dp"]), dp=(mesh.get_local_rank("dp"), world // 2))


def _ep(rank: int, world: int, filled: bool) -> Job:
    """Experts in one tensor as DTensor, experts with a tensor each dealt out like cards, the rest as in DDP."""
    mesh = init_device_mesh("cpu", (world,))
    model = _plain(filled, owned=range(rank, net.NUM_EXPERTS, world))
    for layer in model.layers.values():
        layer.moe.stack = nn.Parameter(distribute_tensor(layer.moe.stack.detach(), mesh, [Shard(0)]))
    return _job(model, dp=(rank, world))


def _zero(rank: int, world: int, filled: bool) -> Job:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns on import: only where it is used

    def make(groups: list[dict[str, Any]]) -> Any:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, weight_decay=0.0, foreach=False)

    return _job(nn.parallel.DistributedDataParallel(_plain(filled)), make, dp=(rank, world))


def _flat(rank: int, world: int, filled: bool) -> Job:
    """Plain parameters; optimizer state in two flat buffers with padding inside and at the end, cut in the middle."""
    model = _plain(filled)
    layout = _flat_layout()
    slots = {slot: _flat_shard(layout, slot, rank, world, filled) for slot in SLOTS}
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = []
    for decay, lr in ((True, 0.125), (False, 0.0625)):
        params = [name for name in names if net.is_plain_decay(name) == decay]
        groups.append({**torch.optim.AdamW([torch.zeros(1)], weight_decay=0.0).param_groups[0]})
        groups[-1] |= {"params": params, "lr": lr, "initial_lr": lr, "foreach": False}
    optimizer = FlatOptimizerState(slots, step=int(STEP) if filled else 0, groups=groups)
    shadow = _adamw([{"params": [nn.Parameter(torch.zeros(1))], "lr": group["lr"]} for group in groups])
    return Job(kind="", model=model, optimizer=optimizer, scheduler=_scheduler(shadow), dp=(rank, world))


def _flat_layout() -> list[tuple[str | None, tuple[int, ...]]]:
    named = [
        (name, shape)
        for name, shape in net.global_shapes().items()
        if not net.is_frozen(name) and not net.is_fresh(name)
    ]
    return [*named[:3], (None, (11,)), *named[3:]]


def _flat_shard(layout: list[Any], slot: str, rank: int, world: int, filled: bool) -> FlatShard:
    values = _flat_values(layout, slot)
    total = -(-len(values) // world)
    start, stop = rank * total, (rank + 1) * total
    buffer = np.full(total, -1.0, np.float32)
    if filled:
        piece = values[start:stop]
        buffer[: len(piece)] = piece
    return FlatShard(torch.from_numpy(buffer), layout, start=start, stop=stop)


def _flat_values(layout: list[Any], slot: str) -> np.ndarray:
    """The whole flat buffer, -1 in the padding."""
    parts = [
        np.full(shape, -1.0, np.float32) if name is None else slot_values(slot, net.whole(name)).reshape(-1)
        for name, shape in layout
    ]
    return np.concatenate(parts)


def _megatron(rank: int, world: int, filled: bool) -> Job:
    """Every rank has plain tensors; a layout says which parts of the global ones they are."""

    def cut(name: str, value: np.ndarray) -> np.ndarray:
        return _megatron_cut(name, value, rank, world)

    each = -(-net.NUM_EXPERTS // world)
    model = net.Net(owned=range(rank * each, min((rank + 1) * each, net.NUM_EXPERTS)))
    for name, param in list(model.named_parameters()):
        value = cut(name, param_values(name, net.whole(name).shape))
        owner, _, leaf = name.rpartition(".")
        new = nn.Parameter(torch.from_numpy(value.copy() if filled else np.full_like(value, -1.0)))
        setattr(model.get_submodule(owner), leaf, new.requires_grad_(param.requires_grad))
    model.tie()
    for name, buffer in model.named_buffers():
        buffer.copy_(net.BUFFERS[name] if filled else torch.zeros_like(buffer))
    return _job(model, layout=_megatron_layout(world), cut=cut)


def _megatron_cut(name: str, value: np.ndarray, rank: int, world: int) -> np.ndarray:
    if name == "embedding.weight":
        unit = PAD_MULTIPLE * world
        padded = np.full((-(-len(value) // unit) * unit, *value.shape[1:]), -1.0, np.float32)
        padded[: len(value)] = value
        return np.split(padded, world)[rank]
    if ".wqkv." in name:
        edges = np.cumsum(net.QKV_PARTS)[:-1]
        return np.concatenate([np.split(part, world)[rank] for part in np.split(value, edges)])
    if name.endswith("gate_up.weight"):
        return np.concatenate([np.split(part, world)[rank] for part in np.split(value, 2)])
    if name.endswith(("wo.weight", "down.weight", "moe.stack")):
        return np.ascontiguousarray(_chunk(value, world, rank))
    return value


def _chunk(value: np.ndarray, world: int, rank: int) -> np.ndarray:
    """As torch.chunk cuts dim 1."""
    each = -(-value.shape[1] // world)
    return value[:, rank * each : (rank + 1) * each]


def _megatron_layout(world: int) -> Layout:
    def rule(pattern: str, dim: int, **more: Any) -> Rule:
        return _rule(pattern, Where(shard=(ShardStep(axis="tp", dim=dim),), **more))

    stack = (net.NUM_EXPERTS, net.EXPERT_WIDTH, net.WIDTH)
    return Layout(
        mesh=Mesh(axes=(("tp", world),)),
        rules=(
            rule("embedding.weight", 0, pad=Pad(axis="tp", multiple=PAD_MULTIPLE, size=net.VOCABULARY)),
            rule("layers.{layer}.attention.wqkv.{weight,bias}", 0, parts=Parts(axis="tp", sizes=net.QKV_PARTS)),
            rule("layers.{layer}.attention.wo.weight", 1),
            rule("layers.{layer}.mlp.gate_up.weight", 0, parts=Parts(axis="tp", num=2)),
            rule("layers.{layer}.mlp.down.weight", 1),
            rule("layers.{layer}.moe.stack", 1, shape=stack),  # uneven: the shape must be said
            _rule("layers.{layer}.moe.experts.{expert}.weight", Where(experts=Experts(axis="tp", num=net.NUM_EXPERTS))),
            _rule("**", Where()),
        ),
    )


def _rule(pattern: str, where: Where) -> Rule:
    return Rule(match=(NamePattern(pattern),), where=where)


_MAKERS: dict[str, Callable[[int, int, bool], Job]] = {
    "single": _single, "ddp": _ddp, "fsdp2": _fsdp2, "hsdp": _hsdp, "fsdp1": _fsdp1, "tp": _tp, "tp_fsdp2": _tp_fsdp2,
    "pp": _pp, "pp_fsdp2": _pp_fsdp2, "ep": _ep, "zero": _zero, "flat": _flat, "megatron": _megatron,
}  # fmt: skip


# Checking


def _param_faults(job: Job) -> Iterator[str]:
    if job.kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(job.model, writeback=False):
            whole = [(name, param.detach().clone()) for name, param in job.model.named_parameters()]
    else:
        whole = [
            (name, param.full_tensor() if isinstance(param, DTensor) else param)
            for name, param in job.model.named_parameters()
        ]
    for name, param in whole:
        name = plain_name(name)
        if not same_bits(param.detach().numpy(), _expected(job, name)):
            yield f"parameter {name} differs"


def _expected(job: Job, name: str) -> np.ndarray:
    value = net.whole(name)
    return value if job.cut is None else job.cut(name, value)


def _buffer_faults(job: Job) -> Iterator[str]:
    for name, buffer in job.model.named_buffers():
        expected = net.BUFFERS[plain_name(name)]
        if buffer.dtype != expected.dtype or bytes(buffer.view(torch.uint8).tolist() if buffer.dim() else []) != bytes(
            expected.view(torch.uint8).tolist() if expected.dim() else []
        ):
            yield f"buffer {name} differs"
        if not buffer.dim() and buffer.item() != expected.item():
            yield f"buffer {name} is {buffer.item()}"


def _slot_faults(job: Job) -> Iterator[str]:
    if isinstance(job.optimizer, FlatOptimizerState):
        for slot, shard in job.optimizer.slots.items():
            values = _flat_values(list(shard.layout), slot)
            padded = np.full(shard.stop, -1.0, np.float32)
            padded[: len(values)] = values[: shard.stop]
            if not same_bits(shard.buffer.numpy(), padded[shard.start : shard.stop]):
                yield f"flat slot {slot} differs"
        if job.optimizer.step != STEP:
            yield f"step is {job.optimizer.step}"
        return
    optimizer = _inner(job.optimizer)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in job.model.named_parameters():
        name = plain_name(name)
        slots = optimizer.state.get(param, {})
        if net.is_frozen(name) or net.is_fresh(name) or id(param) not in held:
            if slots:
                yield f"{name} has slots {sorted(slots)}, expected none"
            continue
        if sorted(slots) != ["exp_avg", "exp_avg_sq", "step"]:
            yield f"{name} has slots {sorted(slots)}"
            continue
        if float(slots["step"]) != STEP:
            yield f"{name} is at step {float(slots['step'])}"
        local = _local(param).detach().numpy()
        for slot in SLOTS:
            found = _local(slots[slot]).numpy()
            # The padding of a slot is nobody's: it is not stored and not filled.
            real = local != -1.0 if job.cut is not None else np.ones(local.shape, bool)
            if not same_bits(found[real], slot_values(slot, local)[real]):
                yield f"slot {slot} of {name} differs"


def _object_faults(job: Job, source: tuple[int, int, int]) -> Iterator[str]:
    saved_world, saved_dp, rank = source
    state = job.state
    lrs = [0.0625, 0.03125]
    for group, lr, decay in zip(_groups(job.optimizer), lrs, (0.25, 0.0), strict=True):
        if group["params"] and (group["lr"], group["weight_decay"]) != (lr, decay):
            yield f"a group has lr {group['lr']} and decay {group['weight_decay']}, expected {lr} and {decay}"
    scheduler = state["scheduler"].state_dict()
    if (scheduler["last_epoch"], scheduler["_last_lr"], scheduler["base_lrs"]) != (4, lrs, [0.125, 0.0625]):
        yield f"scheduler is {scheduler}"
    if state["scaler"].get_scale() != 512.0:
        yield f"scaler has {state['scaler'].get_scale()}"
    if state["progress"] != {"step": 41, "seen": [1.5, "text"]}:
        yield f"progress is {state['progress']}"
    if rank < saved_world:
        expected = (
            random.Random(100 + rank).random(),
            np.random.RandomState(100 + rank).random_sample(),
            torch.rand(1, generator=torch.Generator().manual_seed(100 + rank)).item(),
        )
        found = (random.random(), np.random.random_sample(), torch.rand(1).item())
        if found != expected:
            yield f"random numbers are {found}, expected {expected}"
    stream = iter(ElasticSampler(NUM_SAMPLES, seed=3))
    for _ in range(TAKEN * saved_dp):
        next(stream)
    dp_rank, dp_size = job.dp
    wanted = [next(stream) for _ in range(3 * dp_size)][dp_rank::dp_size]
    samples = iter(state["loader"])
    taken = [next(samples) for _ in range(3)]
    if taken != wanted:
        yield f"the loader gives {taken}, expected {wanted}"


# Names and memory


def plain_name(name: str) -> str:
    """The parameter's name in the plain model."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def named_local(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank holds of each parameter."""
    for name, param in model.named_parameters():
        yield plain_name(name), _local(param)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _inner(optimizer: Any) -> Any:
    """Of a ZeroRedundancyOptimizer, the one with this rank's state."""
    return getattr(optimizer, "optim", optimizer)


def _groups(optimizer: Any) -> Any:
    return optimizer.groups if isinstance(optimizer, FlatOptimizerState) else optimizer.param_groups
