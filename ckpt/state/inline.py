"""Small tensors inside loader and RNG state, stored within the object instead of as tensors of the checkpoint.

In: a plain CPU tensor (a loader's generator state, say). Out: its dtype, shape and bytes, and back. Importing this
module registers the codec `torch.Tensor`. Never takes a tensor that requires grad or a subclass: those are model state.
"""

from __future__ import annotations

import math

import torch

from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import dtype_of
from ckpt.format.objects import Tree, register_codec


def tensor_to_tree(tensor: torch.Tensor) -> Tree:
    """Dtype, shape and row-major little-endian bytes of a plain tensor."""
    if tensor.requires_grad or tensor.layout != torch.strided or tensor.is_quantized:
        raise InvalidInputError("only dense tensors without grad are stored within an object")
    dtype = str(tensor.dtype).removeprefix("torch.")
    dtype_of(dtype)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return {"dtype": dtype, "shape": list(tensor.shape), "bytes": data}


def tensor_from_tree(tree: Tree) -> torch.Tensor:
    """The tensor, on the CPU, owning its memory."""
    dtype, shape, data = dtype_of(tree["dtype"]), tree["shape"], tree["bytes"]
    if any(type(n) is not int or n < 0 for n in shape) or len(data) != math.prod(shape) * dtype.itemsize:
        raise InvalidInputError(f"{len(data)} bytes do not fill a `{dtype.name}` tensor of shape {shape}")
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype.name))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype.name)).reshape(shape)


register_codec(torch.Tensor, tag="torch.Tensor", to_tree=tensor_to_tree, from_tree=tensor_from_tree)
