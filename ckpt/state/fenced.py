"""The memory that steps of optimizers change.

In: optimizers. Out: where the storages begin of their parameters and their state. Never changes an optimizer, and knows
nothing of what else changes a state (EMA copies, buffers changed by a forward).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckpt.state.optimizers import inner_optimizer
from ckpt.state.tensors import memory_problem

_CONTAINERS = (list, tuple)  # of slots: LBFGS keeps its history in lists


def fenced_tensors(optimizers: Iterable[Optimizer]) -> list[torch.Tensor]:
    """All parameters in `param_groups` and all tensors in `state`."""
    tensors: list[torch.Tensor] = []
    for optimizer in optimizers:
        for one in {id(part): part for part in (optimizer, inner_optimizer(optimizer))}.values():
            for group in one.param_groups:
                tensors += group["params"]
            for slots in one.state.values():
                _add(tensors, slots)
    return tensors


def storages_of(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses at which the storages of tensors begin; of a DTensor that of the local tensor.

    Storages without memory are left out, and tensors that cannot be saved.
    """
    memory = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    starts = {tensor.untyped_storage().data_ptr() for tensor in memory if memory_problem(tensor) is None}
    starts.discard(0)
    return starts


def fenced_storages(optimizers: Iterable[Optimizer]) -> set[int]:
    """Addresses at which the storages begin of all that the steps of these optimizers change.

    To be compared with `LocalState.storage_of_piece`. Cheap enough for every save: an optimizer makes its state at its first
    step, and may make more of it later.
    """
    return storages_of(fenced_tensors(optimizers))


def _add(tensors: list[torch.Tensor], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _add(tensors, item)
    elif isinstance(value, _CONTAINERS):
        for item in value:
            _add(tensors, item)
