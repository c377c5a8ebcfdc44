"""Parameters of `FullyShardedDataParallel` (FSDP1) with original parameters: 1-d ranges of them to boxes.

In: a module tree. Out: each original parameter with its place. Never gathers and never unshards.

FSDP1 concatenates parameters into a flat one and cuts that evenly, so that a rank holds elements [start, stop) of some
original parameters; its optimizer state has the same local 1-d shapes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ckpt.errors import InvalidInputError
from ckpt.layout.box import boxes_of_flat_range
from ckpt.layout.placement import Placed
from ckpt.state.names import walk_module
from ckpt.state.tensors import Located, locate_plain

ShardedParams: TypeAlias = dict[tuple[int, str], tuple[torch.Tensor, Located]]  # by (id of the owner, its name there)


def sharded_params(root: nn.Module, *, key: str) -> ShardedParams:
    """All parameters below `root` that FSDP1 manages. `key`: the state key, for messages."""
    out: ShardedParams = {}
    for prefix, module in walk_module(root):
        if isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None:
                _add_handle(out, handle, where=f"{key}/{prefix}")
    return out


def _add_handle(out: ShardedParams, handle: Any, *, where: str) -> None:
    flat = handle.flat_param
    if not handle._use_orig_params:
        raise InvalidInputError(
            f"`{where}` is wrapped by FullyShardedDataParallel without its original parameters",
            kind="unsupported-tensor",
            hints=("wrap it with `use_orig_params=True`, or with `fully_shard` (FSDP2)",),
        )
    if handle.uses_sharded_strategy and not handle.is_sharded(flat):
        raise InvalidInputError(
            f"`{where}` is gathered right now (inside a forward, or `summon_full_params`)",
            hints=("save and load between steps, when its parameters are sharded",),
        )
    located_of: dict[tuple[int, str], tuple[torch.Tensor, Located]] = {}
    for info, shard, shape, fqn, param in zip(
        flat._param_infos, flat._shard_param_infos, flat._shapes, flat._fqns, flat._params, strict=True
    ):
        located = _located(f"{where}{fqn}", param, tuple(shape), shard, sharded=handle.uses_sharded_strategy)
        located_of[id(info.module), info.param_name] = (param, located)
    for shared, param in zip(flat._shared_param_infos, flat._shared_params, strict=True):
        located = located_of[id(shared.prim_module), shared.prim_param_name][1]
        located_of[id(shared.module), shared.param_name] = (param, located)
    out.update(located_of)


def _located(name: str, param: torch.Tensor, shape: tuple[int, ...], shard: Any, *, sharded: bool) -> Located:
    plain = locate_plain(name, param)
    if not sharded:
        return plain
    if not shard.in_shard:
        return Located(shape=shape, placed=(), memory=plain.memory)
    start, stop = shard.intra_param_start_idx, shard.intra_param_end_idx + 1
    if plain.memory.dim() != 1 or plain.memory.numel() != stop - start:
        raise InvalidInputError(
            f"tensor `{name}`: FSDP1 holds elements {start} to {stop} of it, found local shape {plain.local_shape}"
        )
    placed, at = [], 0
    for box in boxes_of_flat_range(shape, start, stop):
        placed.append(Placed(box=box, local_offsets=(at,)))
        at += box.volume
    return Located(shape=shape, placed=tuple(placed), memory=plain.memory)
