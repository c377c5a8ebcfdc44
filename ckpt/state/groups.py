"""Hyperparameters of parameter groups, by parameter name.

In: groups with the names of their parameters. Out: trees; actions that set hyperparameters. Never touches a
parameter.

A group of now need not be a group of then: each one takes what the checkpoint has for its parameters, whichever rank
stored it, and that must be one and the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ckpt.state.inline  # noqa: F401  (hyperparameters may be small tensors)
from ckpt.errors import DamagedError, MismatchError
from ckpt.format.objects import Tree, encode, rewrite
from ckpt.state.holders import Action

_NOT_HYPERPARAMETERS = ("params", "param_names")
_CONFLICTS_SHOWN_MAX = 10


@dataclass(frozen=True, kw_only=True)
class NamedGroup:
    """A parameter group of an optimizer."""

    params: Sequence[tuple[str, ...]]  # names of each parameter; more than one when it is tied
    values: MutableMapping[str, Any]  # the optimizer's own dict


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What one rank stored of its optimizers."""

    rank: int
    groups: Sequence[Mapping[str, Tree]]  # each with "params"
    param_state: Mapping[str, Mapping[str, Tree]]


def saved_groups(groups: Sequence[NamedGroup], *, name: str) -> list[dict[str, Tree]]:
    """The groups as they are stored. `name`: the state key, for messages."""
    return [
        {"params": [param for names in group.params for param in names]}
        | {
            key: _within_object(value, name=f"{name}.groups[{index}].{key}")
            for key, value in group.values.items()
            if key not in _NOT_HYPERPARAMETERS
        }
        for index, group in enumerate(groups)
    ]


def parse_hyperparameters(rank: int, tree: Tree, *, name: str) -> Hyperparameters:
    """A stored object of kind `optimizer`, its form checked."""
    if isinstance(tree, dict):
        groups, param_state = tree.get("groups"), tree.get("param_state")
        if (
            isinstance(groups, list)
            and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
            and isinstance(param_state, dict)
            and all(isinstance(slots, dict) for slots in param_state.values())
        ):
            return Hyperparameters(rank=rank, groups=groups, param_state=param_state)
    raise DamagedError(f"object `{name}` of rank {rank} is not an optimizer: expected `groups` and `param_state`")


def group_actions(groups: Sequence[NamedGroup], saved: Sequence[Hyperparameters], *, name: str) -> list[Action]:
    """What sets the groups' hyperparameters. Parameters that the checkpoint does not have keep what they have.

    Raises MismatchError that lists every group for whose parameters different values were stored.
    """
    stored = _by_param(saved, name=name)
    actions: list[Action] = []
    conflicts: list[str] = []
    for index, group in enumerate(groups):
        found: dict[bytes, tuple[str, Mapping[str, Tree]]] = {}
        for names in group.params:
            for param in names:
                for key, values in stored.get(param, {}).items():
                    found.setdefault(key, (param, values))
        if len(found) > 1:
            conflicts.append(f"group {index}: {_differences(list(found.values()))}")
        elif found:
            (_, values), *_ = found.values()
            actions.append(_set_action(group.values, values))
    if conflicts:
        more = len(conflicts) - _CONFLICTS_SHOWN_MAX
        raise MismatchError(
            f"optimizer `{name}`: parameters of one group were saved with different hyperparameters: "
            + "; ".join(conflicts[:_CONFLICTS_SHOWN_MAX])
            + (f"; and {more} more" if more > 0 else ""),
            kind="ambiguous-hyperparameters",
            hints=("split the optimizer's groups as they were when saving",),
        )
    return actions


def _by_param(saved: Sequence[Hyperparameters], *, name: str) -> dict[str, dict[bytes, Mapping[str, Tree]]]:
    out: dict[str, dict[bytes, Mapping[str, Tree]]] = {}
    for one in saved:
        for group in one.groups:
            values = {key: group[key] for key in sorted(group) if key not in _NOT_HYPERPARAMETERS}
            encoded = encode(values, name=name)
            for param in group["params"]:
                out.setdefault(param, {})[encoded] = values
    return out


def _differences(found: Sequence[tuple[str, Mapping[str, Tree]]]) -> str:
    keys = sorted({key for _, values in found for key in values})
    differing = [key for key in keys if len({repr(values.get(key)) for _, values in found}) > 1]
    return " and ".join(
        f"`{param}` has " + ", ".join(f"{key} {values.get(key)!r}" for key in differing) for param, values in found
    )


def _set_action(group: MutableMapping[str, Any], values: Mapping[str, Tree]) -> Action:
    def install() -> None:
        for key, value in values.items():
            group[key] = _like(group[key], value) if key in group else value

    return install


def _like(current: Any, stored: Any) -> Any:
    """The stored value as the kind of thing the current one is; a tensor is filled in place and stays the same one."""
    if isinstance(current, torch.Tensor) and isinstance(stored, (int, float, torch.Tensor)):
        current.copy_(torch.as_tensor(stored))
        return current
    if type(current) in (tuple, list) and type(stored) in (tuple, list) and len(current) == len(stored):
        return type(stored)(_like(one, other) for one, other in zip(current, stored, strict=True))
    if isinstance(stored, torch.Tensor) and isinstance(current, (int, float)) and stored.numel() == 1:
        return stored.item()
    return stored


def _within_object(value: Any, *, name: str) -> Tree:
    """A hyperparameter with its tensors (a learning rate for CUDA graphs) as the object's codec wants them: plain."""
    return rewrite(value, lambda path, item: item.detach() if isinstance(item, torch.Tensor) else item, name=name)
