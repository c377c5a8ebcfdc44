"""The torch side of the table of dtypes.

In: a `torch.dtype` or a name of ckpt.format.dtypes. Out: the other one. Pure. Never converts data.
"""

from __future__ import annotations

import torch

from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import DTYPES, dtype_of

_TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _TORCH.items()}


def dtype_name(dtype: torch.dtype, *, tensor: str) -> str:
    """The stored name of a torch dtype; `tensor` names the tensor in the error."""
    name = _NAMES.get(dtype)
    if name is None:
        raise InvalidInputError(
            f"tensor `{tensor}` has dtype {dtype}, which cannot be stored",
            kind="unknown-dtype",
            hints=(f"known: {', '.join(_TORCH)}",),
        )
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a stored name."""
    dtype_of(name)
    try:
        return _TORCH[name]
    except KeyError:
        raise InvalidInputError(
            f"dtype `{name}` is not known to torch {torch.__version__}", kind="unknown-dtype"
        ) from None
