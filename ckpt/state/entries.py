"""The entries of a state: its keys with their values, and what kind of thing each one is.

In: a state dict. Out: `Entry`s. Never changes a state, except that an entry's `assign` puts a loaded value into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.errors import InvalidInputError
from ckpt.state.flat import FlatOptimizerState, FlatShard
from ckpt.state.names import check_key
from ckpt.state.rng import RNG
from ckpt.state.trees import holds_only_plain

Kind = Literal["module", "plain", "other"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key of a state; where it is nested, keys joined by `/`."""

    name: str
    value: Any
    assign: Callable[[Any], None]  # put another value in its place
    kind: Kind


def entries_of(state: Mapping[str, Any]) -> list[Entry]:
    """Keys and values; containers that hold modules, optimizers and the like are opened, their keys joined by `/`."""
    if not isinstance(state, Mapping):
        raise InvalidInputError(f"a state must be a mapping, found {type(state).__name__}")
    return [entry for key, value in state.items() for entry in _opened(check_key(key), value, state, key)]


def _opened(name: str, value: Any, parent: Any, key: Any) -> list[Entry]:
    kind: Kind | None = None
    if all_are(value, nn.Module):
        kind = "module"
    elif _is_special(value) or all_are(value, Optimizer):
        kind = "other"
    elif holds_only_plain(value, _is_special):
        kind = "plain"
    if kind is not None:
        return [Entry(name=name, value=value, assign=_assign_in(name, parent, key), kind=kind)]
    if isinstance(value, Mapping):
        return [e for k, v in value.items() for e in _opened(f"{name}/{check_key(k)}", v, value, k)]
    return [e for i, v in enumerate(value) for e in _opened(f"{name}/{i}", v, value, i)]


def _assign_in(name: str, parent: Any, key: Any) -> Callable[[Any], None]:
    def assign(value: Any) -> None:
        if not isinstance(parent, (MutableMapping, list)):
            raise InvalidInputError(
                f"`{name}` cannot be loaded: it is in a {type(parent).__name__}, which cannot change"
            )
        parent[key] = value

    return assign


def _is_special(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, int, float, str)):
        return False
    if isinstance(value, (nn.Module, Optimizer, FlatShard, FlatOptimizerState, RNG)):
        return True
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def all_are(value: Any, kind: type) -> bool:
    """True for one of this kind, and for a list or tuple of nothing else."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, kind) for item in value)
    return isinstance(value, kind)


def as_list(value: Any) -> list[Any]:
    """The members of a list or tuple, or the one value."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
