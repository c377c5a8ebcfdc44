"""Saves in a running training: no collectives in steady state, structures that change, saves in the background.

What the ranks run; all functions on all ranks together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import nn
from torch._C._distributed_c10d import Backend

import ckpt
from ckpt.errors import CheckpointError, RankFailedError, SaveFailedError
from ckpt.failpoints import FailpointError
from tests.workers import layouts
from tests.workers.refusals import OPTIONS, Block, caught, sharded, values

_FUNCTIONS = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier",
    "new_group", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
    "ProcessGroupGloo",
)  # fmt: skip
_METHODS = (
    "_allgather_base", "_reduce_scatter_base", "allgather", "allgather_coalesced", "allreduce", "allreduce_coalesced",
    "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource", "reduce",
    "reduce_scatter", "scatter", "send",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[Callable[[], list[str]]]:
    """Every collective on any group while this is open: functions, methods of groups, and groups whose counter moved.

    The counters are the backend's own, so what C++ starts on a group that torch knows is seen, too.
    """
    calls: list[str] = []
    before = dict(_sequence_numbers())
    places = [(module, name) for module in (dist, c10d) for name in _FUNCTIONS]
    places += [(owner, name) for owner in (dist.ProcessGroup, Backend) for name in _METHODS if name in vars(owner)]
    saved = [(owner, name, vars(owner)[name]) for owner, name in places]  # what is put back must still bind to `self`

    def spy(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    def found() -> list[str]:
        after = dict(_sequence_numbers())
        return calls + [f"group {name}" for name in sorted(after) if after[name] != before.get(name)]

    for owner, name in places:
        setattr(owner, name, spy(name, getattr(owner, name)))
    try:
        yield found
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def _sequence_numbers() -> list[tuple[str, int]]:
    return [(group.group_name, group._get_sequence_number_for_group()) for group in c10d._world.pg_map]


def no_collectives_in_steady_state(root: str, kind: str) -> list[str]:
    """The first save talks, the next six do not: three that block and three in the background."""
    job = layouts.build(kind, filled=True)
    with counted() as found:
        ckpt.save(job.state, root, step=0, layout=job.layout, options=OPTIONS)
        assert found(), "the counter sees nothing"
    with counted() as found:
        for step in (1, 2, 3):
            ckpt.save(job.state, root, step=step, layout=job.layout, options=OPTIONS)
        for step in (4, 5, 6):
            ckpt.async_save(job.state, root, step=step, layout=job.layout, options=OPTIONS).wait(60.0)
        seen = found()
    layouts.scramble(job, drop_slots=True)
    ckpt.load(job.state, root, step=6, layout=job.layout, options=OPTIONS)
    world = dist.get_world_size()
    assert not layouts.faults(job, (world, job.dp[1], dist.get_rank()))
    return seen


def async_saves_beside_all_reduces(root: str, rounds: int) -> int:
    """Training reduces on the default group in every iteration while saves are on their way: no order can deadlock."""
    model = sharded(a=(256, 64), b=(6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    pending = []
    for i in range(rounds):
        total = torch.ones(1000)
        dist.all_reduce(total)
        assert float(total[0]) == dist.get_world_size()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        if i % 5 == 0:
            pending.append((i, ckpt.async_save({"model": model, "i": i}, root, step=i, options=OPTIONS)))
            if dist.get_rank() == 0:
                time.sleep(0.01)  # the ranks are never in step
    for _, one in pending:
        one.wait(60.0)
    dist.barrier()
    expected = {name: torch.tensor(whole) for name, whole in values(model).items()}
    for i, _ in pending:
        target = sharded(0.0, a=(256, 64), b=(6,))
        ckpt.load({"model": target}, root, step=i, options=OPTIONS, strict=True)
        for name, whole in values(target).items():  # each step minus one, exact in float32
            assert torch.equal(torch.tensor(whole), expected[name] + (rounds - 1 - i)), (i, name)
    return len(pending)


def structure_changes_on_all_ranks(root: str) -> list[list[str]]:
    """LoRA weights appear between two saves, then a layer is unfrozen: these saves talk to nobody, the next one may."""
    model = sharded(a=(8, 4), b=(6,))
    model.b.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.a], foreach=False)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    log = [_save(state, root, 1), _save(state, root, 2)]
    state["lora"] = sharded(50.0, down=(8, 2), up=(2, 4))
    log += [_save(state, root, 3), _save(state, root, 4), _save(state, root, 5)]
    _check(root, 3, state)
    model.b.requires_grad_(True)
    optimizer.add_param_group({"params": [model.b], "lr": 0.5})
    for param in (model.a, model.b):
        param.grad = torch.ones_like(param)
    optimizer.step()
    log += [_save(state, root, 6), _save(state, root, 7), _save(state, root, 8)]
    for step in (6, 7, 8):
        _check(root, step, state)
    return log


def structure_changes_on_one_rank(root: str) -> list[list[str]]:
    """Pipeline: only the last stage gets adapters, and they hold what the others know nothing of."""
    rank = dist.get_rank()
    model = nn.ModuleDict({f"stage{rank}": Block(w=(5, 2))})
    _count(model, 10.0 * rank)
    state: dict[str, Any] = {"model": model}
    log = [_save(state, root, 1), _save(state, root, 2)]
    if rank == dist.get_world_size() - 1:
        model["adapter"] = Block(w=(3, 3))
        _count(model, 70.0)
    log += [_save(state, root, 3), _save(state, root, 4), _save(state, root, 5)]
    dist.barrier()
    for step in (3, 4, 5):
        with ckpt.open(root, step=step) as checkpoint:
            assert checkpoint["model/adapter.w"][...].reshape(-1).tolist() == [70.0 + i for i in range(9)]
            first = checkpoint["model/stage0.w"][...].reshape(-1).tolist()
            assert first == [float(i) for i in range(10)], first
    dist.barrier()
    return log


def structure_shrinks(root: str) -> list[list[str]]:
    """Adapters are merged and removed again."""
    state: dict[str, Any] = {"model": sharded(a=(8, 4)), "lora": sharded(50.0, down=(8, 2))}
    log = [_save(state, root, 1), _save(state, root, 2)]
    del state["lora"]
    log += [_save(state, root, 3), _save(state, root, 4), _save(state, root, 5)]
    dist.barrier()
    for step in (3, 4, 5):
        with ckpt.open(root, step=step) as checkpoint:
            assert sorted(checkpoint) == ["model/a"], sorted(checkpoint)
        _check(root, step, state)
    return log


def replicas_change_together(root: str) -> list[list[str]]:
    """Tensors that every rank holds whole grow by one: each of them writes it, the committer keeps one."""
    state: dict[str, Any] = {"x": torch.arange(6.0)}
    log = [_save(state, root, 1), _save(state, root, 2)]
    state["y"] = torch.arange(4.0)
    log += [_save(state, root, 3), _save(state, root, 4), _save(state, root, 5)]
    dist.barrier()
    for step in (3, 4, 5):
        with ckpt.open(root, step=step) as checkpoint:
            assert checkpoint["y"][...].tolist() == [0.0, 1.0, 2.0, 3.0]
            assert checkpoint["x"][...].tolist() == [float(i) for i in range(6)]
    dist.barrier()
    return log


def a_background_failure_reaches_the_trainer(root: str) -> list[str]:
    """By `wait`, by the next save, and by the next load; saving again is safe."""
    rank = dist.get_rank()
    state: dict[str, Any] = {"model": sharded(a=(8, 4))}
    ckpt.save(state, root, step=1, options=OPTIONS)
    seen = []
    os.environ["CKPT_FAILPOINT"], os.environ["CKPT_FAILPOINT_RANK"] = "save.before-image-commit:error", "1"
    try:
        pending = ckpt.async_save(state, root, step=2, options=OPTIONS)
        error = caught(lambda: pending.wait(30.0))
        assert isinstance(error, FailpointError if rank == 1 else RankFailedError), error
        if rank == 0:
            assert "rank 1" in error.message and "save.before-image-commit" in error.message, error.message
        seen.append(error.message)
    finally:
        del os.environ["CKPT_FAILPOINT"], os.environ["CKPT_FAILPOINT_RANK"]
    nxt = caught(lambda: ckpt.save(state, root, step=3, options=OPTIONS))  # the trainer that never asked
    assert type(nxt) is SaveFailedError and "step 2" in nxt.message, nxt
    assert isinstance(nxt.__cause__, CheckpointError)
    ckpt.save(state, root, step=4, options=OPTIONS)
    dist.barrier()
    assert not _complete(root, 2) and _complete(root, 3) and _complete(root, 4)
    return seen


def _complete(root: str, step: int) -> bool:
    return os.path.exists(f"{root}/step-{step:012d}/manifest.json")


def _save(state: Any, root: str, step: int) -> list[str]:
    with counted() as found:
        ckpt.save(state, root, step=step, options=OPTIONS)
        return found()


def _check(root: str, step: int, state: dict[str, Any]) -> None:
    """The modules of `state` are in the checkpoint, whole."""
    dist.barrier()
    with ckpt.open(root, step=step) as checkpoint:
        for key, module in state.items():
            if isinstance(module, nn.Module):
                for name, whole in values(module).items():
                    assert checkpoint[f"{key}/{name}"][...].reshape(-1).tolist() == whole, (step, key, name)
    dist.barrier()


def _count(model: nn.Module, start: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(start, start + param.numel()).reshape(param.shape))
