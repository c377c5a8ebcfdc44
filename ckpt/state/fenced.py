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


def fenced_storages(optimizers: Iterable[Optimizer], known: Mapping[int, int] | None = None) -> set[int]:
    """Addresses at which the storages begin of all parameters in `param_groups` and all tensors in `state`.

    To be compared with `LocalState.storage_of_piece`. Of a DTensor it is the storage of the local tensor. Storages
    without memory are left out, and tensors that cannot be saved. Cheap enough for every save: an optimizer makes its
    state at its first step, and may make more of it later.

    Args:
        known: storages of tensors by their ids, as `LocalState.storages` gives them; others are looked at.
    """
    known = known or {}
    tensors: list[torch.Tensor] = []
    for optimizer in optimizers:
        for one in {id(part): part for part in (optimizer, inner_optimizer(optimizer))}.values():
            for group in one.param_groups:
                tensors += group["params"]
            for slots in one.state.values():
                _add(tensors, slots)
    starts = set(map(known.get, map(id, tensors)))
    if None in starts:
        rest = [tensor for tensor in tensors if id(tensor) not in known]
        memory = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in rest]
        starts |= {tensor.untyped_storage().data_ptr() for tensor in memory if memory_problem(tensor) is None}
    return {start for start in starts if start}


def _add(tensors: list[torch.Tensor], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _add(tensors, item)
    elif isinstance(value, _CONTAINERS):
        for item in value:
            _add(tensors, item)
