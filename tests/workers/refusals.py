"""Saves and loads that must be refused, on every rank alike: what the ranks run.

Each function runs on two ranks, checks what one rank sees, and returns what the test process compares between ranks.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt.commit import find
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, MismatchError, RankFailedError
from ckpt.store.open import open_store

OPTIONS = Options(commit_timeout_s=10.0, outcome_grace_s=3.0, exchange_timeout_s=20.0)


class Unstorable:
    """Nothing that a typed tree can hold."""


class Block(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def sharded(start: float = 0.0, **shapes: tuple[int, ...]) -> nn.Module:
    """A module cut over all ranks, its elements counted from `start`."""
    model = Block(**shapes)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(start, start + param.numel()).reshape(param.shape))
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def values(model: nn.Module) -> dict[str, list[float]]:
    """Whole parameters. Collective."""
    return {name: param.full_tensor().reshape(-1).tolist() for name, param in model.named_parameters()}


def local_bytes(model: nn.Module) -> str:
    """Of all that this rank holds."""
    parts = [param.to_local().detach().numpy().tobytes() for _, param in sorted(model.named_parameters())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def files(root: str) -> dict[str, str]:
    """Every file below a folder, by digest; without the event log, which grows with whatever is tried."""
    paths = [p for p in sorted(Path(root).rglob("*")) if p.is_file() and "events" not in p.relative_to(root).parts]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def caught(call: Any) -> CheckpointError:
    """The error that `call` raises."""
    try:
        call()
    except CheckpointError as error:
        return error
    raise AssertionError("nothing was raised")


# Loads


def load_lists_every_difference(root: str) -> str:
    """Each rank has a parameter that the other has not; one of them does not fit. All of it in one message."""
    rank = dist.get_rank()
    ckpt.save({"model": sharded(a=(4, 3), b=(6,), c=(2, 2), gone=(3,))}, root, step=1, options=OPTIONS)
    target = sharded(100.0, a=(4, 3), b=(7,), c=(2, 2))
    target.register_parameter(f"new_{rank}", nn.Parameter(torch.zeros(2)))
    before = local_bytes(_without_new(target))
    state = {"model": target, "extra_object": {"x": 1}}
    error = caught(lambda: ckpt.load(state, root, options=OPTIONS))
    assert type(error) is MismatchError, error
    for text in ("`model/new_0`", "`model/new_1`", "`model/b`", "[6]", "[7]", "`model/gone`", "`extra_object"):
        assert text in error.message, (text, error.message)
    assert "`model/a`" not in error.message
    assert local_bytes(_without_new(target)) == before and state["extra_object"] == {"x": 1}
    return error.message


def _without_new(model: nn.Module) -> nn.Module:
    out = nn.Module()
    for name, param in model.named_parameters():
        if not name.startswith("new_"):
            out.register_parameter(name, param)
    return out


def load_not_strict_takes_what_matches(root: str) -> tuple[Any, ...]:
    ckpt.save({"model": sharded(a=(4, 3), b=(6,), gone=(3,))}, root, step=1, options=OPTIONS)
    target = sharded(100.0, a=(4, 3), b=(6,), new=(2,))
    loaded = ckpt.load({"model": target}, root, strict=False, options=OPTIONS)
    found = values(target)
    assert found == {"a": list(range(12)), "b": list(range(6)), "new": [100.0, 101.0]}
    assert (loaded.missing, loaded.extra) == (("model/new",), ("model/gone",))
    reshaped = sharded(100.0, a=(3, 4), b=(6,), gone=(3,))
    error = caught(lambda: ckpt.load({"model": reshaped}, root, strict=False, options=OPTIONS))
    assert type(error) is MismatchError and "`model/a`" in error.message  # never by guessing
    assert values(reshaped)["b"] == [100.0 + i for i in range(6)]
    return loaded.missing, loaded.extra


def load_renamed(root: str) -> None:
    ckpt.save({"model": sharded(a=(4, 3), b=(6,))}, root, step=1, options=OPTIONS)
    target = sharded(100.0, x=(4, 3), b=(6,))
    ckpt.load({"model": target}, root, rename={"model/a": "model/x"}, options=OPTIONS)
    assert values(target) == {"x": list(range(12)), "b": list(range(6))}
    other = sharded(100.0, a_new=(4, 3), b_new=(6,))
    ckpt.load({"model": other}, root, rename=lambda name: f"{name}_new", options=OPTIONS)
    assert values(other) == {"a_new": list(range(12)), "b_new": list(range(6))}
    error = caught(lambda: ckpt.load({"model": target}, root, rename={"model/a": "model/b"}, options=OPTIONS))
    assert "same name" in error.message


def load_only_the_model(root: str) -> None:
    """A partial load reads no optimizer state and calls nothing of it extra."""
    model = sharded(a=(64, 64), b=(6,))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    expected = values(model)
    ckpt.save({"model": model, "optimizer": optimizer, "n": 3}, root, step=1, options=OPTIONS)
    target = sharded(100.0, a=(64, 64), b=(6,))
    loaded = ckpt.load({"model": target}, root, options=OPTIONS)
    assert values(target) == expected
    assert loaded.read_nbytes <= 1.02 * loaded.wanted_nbytes, loaded
    assert loaded.wanted_nbytes <= (64 * 64 + 6) * 4 / 2 + 8


# Saves


def ranks_disagree_on_the_step(root: str) -> str:
    step = 5 + dist.get_rank()
    error = caught(lambda: ckpt.save({"model": sharded(a=(4, 3))}, root, step=step, options=OPTIONS))
    assert type(error) is RankFailedError and error.kind == "rank-disagrees", error
    assert "5 on rank 0" in error.message and "6 on rank 1" in error.message
    assert not os.path.exists(root) or not files(root)
    return error.message


def ranks_disagree_on_a_shape(root: str) -> str:
    shape, dtype = ((4, 3), torch.float32) if dist.get_rank() == 0 else ((4, 5), torch.float64)
    state = {"same": torch.ones(3), "x": torch.ones(shape), "y": torch.ones(2, dtype=dtype)}
    error = caught(lambda: ckpt.save(state, root, step=1, options=OPTIONS))
    assert type(error) is RankFailedError and error.kind == "rank-disagrees", error
    assert "`x`" in error.message and "`y`" in error.message and "`same`" not in error.message, error.message
    assert "ranks 0, 1" in error.message, error.message
    return "raised"


def ranks_disagree_on_the_step_in_steady_state(root: str) -> str:
    """No exchange any more: the store tells. Nobody hangs, and saving goes on."""
    model = sharded(a=(4, 3))
    for step in (1, 2):
        ckpt.save({"model": model}, root, step=step, options=OPTIONS)
    quick = Options(commit_timeout_s=1.5, outcome_grace_s=1.0, exchange_timeout_s=20.0)
    run = ckpt.Checkpointer(root, every=1, background=False, options=quick)
    run.step(3, {"model": model})
    error = caught(lambda: run.step(4 + dist.get_rank(), {"model": model}))
    assert type(error) is RankFailedError, error
    run.step(6, {"model": model})
    run.close()
    dist.barrier()
    target = sharded(100.0, a=(4, 3))
    assert ckpt.load({"model": target}, root, options=OPTIONS).step == 6
    return error.message


def an_object_that_cannot_be_stored(root: str) -> tuple[str, str]:
    """On one rank, in the first save and in steady state: that rank names key and type, the others name that rank."""
    rank = dist.get_rank()
    model = sharded(a=(4, 3))
    bad: dict[str, Any] = {"model": model, "config": {"width": 3, "hook": Unstorable() if rank == 1 else 1}}
    good: dict[str, Any] = {"model": model, "config": {"width": 3, "hook": 1}}
    messages = []
    for attempt in range(2):
        error = caught(lambda step=10 + attempt: ckpt.save(bad, root, step=step, options=OPTIONS))
        if rank == 1:
            assert isinstance(error, InvalidInputError), error
            assert "Unstorable" in error.message and "hook" in error.message, error.message
        else:
            assert type(error) is RankFailedError, error
            assert "rank 1" in error.message and "Unstorable" in error.message, error.message
        messages.append(error.message)
        ckpt.save(good, root, step=20 + attempt, options=OPTIONS)
    with ckpt.open(root) as checkpoint:
        assert checkpoint.step == 21
    assert find.steps(open_store(root, options=OPTIONS)) == [20, 21]
    return messages[0], messages[1]


def a_step_that_exists_is_refused(root: str) -> str:
    """Also by a run that never saved before, and in steady state; and nothing of it is touched."""
    model = sharded(a=(4, 3))
    ckpt.save({"model": model}, root, step=1, options=OPTIONS)
    ckpt.save({"model": model}, root, step=2, options=OPTIONS)
    dist.barrier()
    before = files(root)
    dist.barrier()
    other = sharded(500.0, a=(4, 3))
    run = ckpt.Checkpointer(root, every=1, background=False, options=OPTIONS)
    errors = [
        caught(lambda: ckpt.save({"model": other}, root, step=1, options=OPTIONS)),
        caught(lambda: ckpt.async_save({"model": other}, root, step=2, options=OPTIONS)),
        caught(lambda: run.step(2, {"model": other})),
    ]
    run.close()
    assert [type(error) for error in errors] == [AlreadyExistsError] * 3, errors
    dist.barrier()
    assert files(root) == before
    dist.barrier()
    ckpt.save({"model": other}, root, step=3, options=OPTIONS)
    target = sharded(0.0, a=(4, 3))
    ckpt.load({"model": target}, root, options=OPTIONS)
    assert values(target) == values(other)
    return errors[0].message
