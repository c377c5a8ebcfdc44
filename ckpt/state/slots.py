"""Optimizer slots: where the state of a parameter lies, and new memory for slots that an optimizer does not have yet.

In: a parameter with its place, slot tensors, stored specs. Out: `Located`, tensors. Never changes an optimizer.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.state.dtypes import torch_dtype
from ckpt.state.locate import Locator, Param
from ckpt.state.tensors import Located, annotated, locate_plain, plain_memory

_HINT = "make the slot a DTensor, or say with `ckpt.annotate` which part of the global slot it holds"


def locate_slot(name: str, slot: str, tensor: torch.Tensor, param: Param, locator: Locator) -> Located:
    """A slot's place: its own where it knows it, else its parameter's when it has the local shape of that.

    Counters (`step`, 0-d, one element) and slots of unsharded parameters are whole on every rank that has them.
    """
    known = annotated(name, tensor)
    if known is not None or isinstance(tensor, DTensor):
        return known or locator.locate(name, tensor)
    located = param.located
    if slot == "step" or tensor.dim() == 0:
        return locate_plain(name, tensor)
    if tuple(tensor.shape) == located.local_shape:
        return Located(shape=located.shape, placed=located.placed, memory=plain_memory(name, tensor))
    if tensor.numel() == 1 or located.is_whole:
        return locate_plain(name, tensor)
    raise InvalidInputError(
        f"optimizer slot `{name}` has local shape {tuple(tensor.shape)}, but this rank holds {located.local_shape} of "
        f"its parameter of global shape {located.shape}: which part of the slot this is does not follow",
        kind="unsupported-tensor",
        hints=(_HINT,),
    )


def new_slot(
    name: str, slot: str, spec: TensorSpec, param: Param, *, step_on_device: bool
) -> tuple[torch.Tensor, Located]:
    """Memory for a stored slot that the optimizer does not have yet: like the parameter, or whole.

    step_on_device: the optimizer wants its counters beside the parameter (`capturable`, `fused`).
    """
    dtype, located = torch_dtype(spec.dtype), param.located
    counter = slot == "step" or not spec.shape or math.prod(spec.shape) == 1
    if spec.shape == located.shape and slot != "step":
        tensor = _like(param.tensor, located, dtype)
        memory = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return tensor, Located(shape=located.shape, placed=located.placed, memory=plain_memory(name, memory))
    if counter or located.is_whole:
        device = torch.device("cpu") if slot == "step" and not step_on_device else located.memory.device
        tensor = torch.zeros(spec.shape, dtype=dtype, device=device)
        return tensor, locate_plain(name, tensor)
    raise InvalidInputError(
        f"optimizer slot `{name}` of shape {spec.shape} does not exist yet, and how it is cut does not follow from its "
        f"parameter of shape {located.shape}",
        kind="unsupported-tensor",
        hints=("let the optimizer make its state before loading (a step with zero gradients does), then load",),
    )


def _like(param: torch.Tensor, located: Located, dtype: torch.dtype) -> torch.Tensor:
    """Zeros with the parameter's local shape, device and distribution."""
    local = torch.zeros_like(located.memory, dtype=dtype)
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
