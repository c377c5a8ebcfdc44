"""Optimizers to named tensors and an object of hyperparameters, and back, by parameter name.

In: optimizers, the table of parameters. Out: parts, objects, and the actions that install loaded state. Never steps an
optimizer, never gathers, and does not care for the order of parameter groups.

A slot is the tensor `<key>/<parameter>/<slot>`. The object `<key>` is
`{"groups": [{"params": [names], <hyperparameter>: value, ...}], "param_state": {name: {slot: value}}}`, the last for
values that are no tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ckpt.errors import InvalidInputError
from ckpt.format.objects import Tree, encode
from ckpt.format.spec import StoredObject, TensorSpec
from ckpt.state.groups import NamedGroup, group_actions, parse_hyperparameters, saved_groups
from ckpt.state.holders import Action, Saved, StoredTensors, Wanted
from ckpt.state.locate import Locator, Param, ParamTable
from ckpt.state.names import slot_name
from ckpt.state.rows import Rows
from ckpt.state.slots import locate_slot, new_slot
from ckpt.state.tensors import Part, part
from ckpt.state.trees import put_tensors, take_tensors

_NAMES_SHOWN_MAX = 10


@dataclass(kw_only=True)
class _Slots:
    """Loaded state of one parameter on its way into the optimizer."""

    param: Param
    state: MutableMapping[Any, Any]  # the optimizer's; not touched before the actions run
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by path below the parameter: "exp_avg", "list/0"


@dataclass(frozen=True, kw_only=True)
class ParamNames:
    """Names of the parameters of some optimizers. Holds no tensor."""

    groups: Sequence[Sequence[tuple[str, ...]]]  # of each group of each optimizer
    states: Sequence[tuple[str, ...]]  # of the parameters that have state, in order of the optimizers' states


def optimizer_object(name: str, optimizers: Sequence[Optimizer], names: ParamNames) -> StoredObject:
    """The hyperparameters and the state that is no tensor, as they are now. `name`: the state key."""
    all_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    groups = [NamedGroup(params=params, values=g) for params, g in zip(names.groups, all_groups, strict=True)]
    states = [state for optimizer in optimizers for state in inner_optimizer(optimizer).state.values() if state]
    param_state: dict[str, dict[str, Tree]] = {}
    for param, state in zip(names.states, states, strict=True):
        trees = {
            slot: take_tensors(value, slot_name(name, param[0], slot))[0]
            for slot, value in state.items()
            if not isinstance(value, torch.Tensor)
        }
        if trees:
            param_state.update(dict.fromkeys(param, trees))
    tree = {"groups": saved_groups(groups, name=name), "param_state": param_state}
    return StoredObject(name=name, kind="optimizer", payload=encode(tree, name=name))


class OptimizerHolder:
    """The optimizers under one state key. Owned by one walk."""

    def __init__(self, name: str, optimizers: Sequence[Optimizer], table: ParamTable, locator: Locator) -> None:
        self._name = name
        self._optimizers = list(optimizers)
        self._locator = locator
        self._params = self._named(table)

    @property
    def name(self) -> str:
        return self._name

    def save(self) -> Saved:
        """Every slot of every parameter that has state, and the hyperparameters."""
        parts: list[Part] = []
        for optimizer in self._optimizers:
            for param, state in self._states(optimizer):
                for slot, value in state.items():
                    _, tensors = take_tensors(value, slot_name(self._name, param.names[0], slot))
                    parts += [self._part(param, slot, path, tensor) for path, tensor in tensors.items()]
        return Saved(parts=parts, objects=[optimizer_object(self._name, self._optimizers, self.names())])

    def names(self) -> ParamNames:
        """Names of all parameters, for `optimizer_object`."""
        return ParamNames(
            groups=[group.params for group in self._groups()],
            states=[param.names for optimizer in self._optimizers for param, _ in self._states(optimizer)],
        )

    def load(self, stored: StoredTensors) -> Wanted:
        """All stored slots of this rank's parameters, in place where the optimizer has them already."""
        below = self._stored_slots(stored)
        is_stored = stored.any_below(f"{self._name}/")
        parts: list[Part] = []
        loaded: list[_Slots] = []
        for optimizer in self._optimizers:
            for param, group in self._local_params(optimizer):
                slots = _Slots(param=param, state=inner_optimizer(optimizer).state)
                wanted = below.get(id(param.tensor), {})
                if wanted:
                    parts += self._wanted(slots, wanted, group)
                loaded.append(slots)
        return Wanted(
            parts=parts,
            objects=[self._name],
            prepare=lambda rows: self._prepare(rows, loaded if is_stored or rows.of(self._name) else []),
        )

    def _wanted(self, slots: _Slots, wanted: Mapping[str, TensorSpec], group: Mapping[str, Any]) -> list[Part]:
        param, parts = slots.param, []
        for slot, value in slots.state.get(param.tensor, {}).items():  # what it has
            prefix = slot_name(self._name, param.names[0], "")
            _, tensors = take_tensors(value, prefix + slot)
            for path, tensor in tensors.items():
                slots.tensors[path[len(prefix) :]] = tensor
                parts.append(self._part(param, slot, path, tensor))
        on_device = bool(group.get("capturable") or group.get("fused"))
        for path, spec in wanted.items():  # what it does not have yet
            if path not in slots.tensors:
                name, slot = slot_name(self._name, param.names[0], path), path.split("/")[0]
                tensor, located = new_slot(name, slot, spec, param, step_on_device=on_device)
                slots.tensors[path] = tensor
                aliases = [slot_name(self._name, other, path) for other in param.names[1:]]
                parts.append(part(name, f"optim.{slot}", located, source=self._source, aliases=aliases))
        return parts

    def _prepare(self, rows: Rows, loaded: Sequence[_Slots]) -> list[Action]:
        saved = [parse_hyperparameters(rank, tree, name=self._name) for rank, tree in rows.trees(self._name)]
        param_state = {param: slots for one in saved for param, slots in one.param_state.items()}
        actions = []
        for slots in loaded:
            values = next((param_state[name] for name in slots.param.names if name in param_state), {})
            actions.append(_install_action(slots, {slot: _filled(slots, slot, tree) for slot, tree in values.items()}))
        actions += group_actions(self._groups(), saved, name=self._name)
        for optimizer in self._optimizers:
            if _is_zero(optimizer):
                actions.append(_sync_action(optimizer))
        return actions

    def _groups(self) -> list[NamedGroup]:
        return [
            NamedGroup(params=[self._params[id(tensor)].names for tensor in group["params"]], values=group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]

    @property
    def _source(self) -> str:
        return f"optimizer `{self._name}`"

    def _part(self, param: Param, slot: str, name: str, tensor: torch.Tensor) -> Part:
        located = locate_slot(name, slot, tensor, param, self._locator)
        path = name[len(slot_name(self._name, param.names[0], "")) :]
        aliases = [slot_name(self._name, other, path) for other in param.names[1:]]
        return part(name, f"optim.{slot}", located, source=self._source, aliases=aliases)

    def _named(self, table: ParamTable) -> dict[int, Param]:
        """Each parameter of all groups by identity; one error for all that no module names."""
        out: dict[int, Param] = {}
        nameless: list[str] = []
        for optimizer in self._optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for position, tensor in enumerate(group["params"]):
                    param = table.get(tensor)
                    if param is None:
                        nameless.append(f"group {index}, parameter {position}, shape {tuple(tensor.shape)}")
                    else:
                        out[id(tensor)] = param
        if nameless:
            more = "" if len(nameless) <= _NAMES_SHOWN_MAX else f", and {len(nameless) - _NAMES_SHOWN_MAX} more"
            raise InvalidInputError(
                f"optimizer `{self._name}` has parameters that no module in the state has, so they have no names: "
                + "; ".join(nameless[:_NAMES_SHOWN_MAX])
                + more,
                kind="unnamed-parameter",
                hints=(
                    "put the module that has them into the same state",
                    "or name them: `names=module.named_parameters()`",
                    "an optimizer made before `fully_shard` or `.to(...)` holds parameters that the module has no more",
                ),
            )
        return out

    def _states(self, optimizer: Optimizer) -> Iterator[tuple[Param, Mapping[str, Any]]]:
        for tensor, state in inner_optimizer(optimizer).state.items():
            if id(tensor) not in self._params:
                what = (
                    f"parameter of shape {tuple(tensor.shape)}"
                    if isinstance(tensor, torch.Tensor)
                    else f"key {tensor!r}"
                )
                raise InvalidInputError(
                    f"optimizer `{self._name}` has state for a {what} that is in none of its groups"
                )
            if state:
                yield self._params[id(tensor)], state

    def _local_params(self, optimizer: Optimizer) -> Iterator[tuple[Param, Mapping[str, Any]]]:
        for group in inner_optimizer(optimizer).param_groups:
            for tensor in group["params"]:
                yield self._params[id(tensor)], group

    def _stored_slots(self, stored: StoredTensors) -> dict[int, dict[str, TensorSpec]]:
        """Stored slots by path below each parameter; parameters by identity."""
        owner = {name: id(param.tensor) for param in self._params.values() for name in param.names}
        out: dict[int, dict[str, TensorSpec]] = {}
        for rest, spec in stored.below(f"{self._name}/"):
            cut = rest.find("/")
            while cut != -1 and rest[:cut] not in owner:
                cut = rest.find("/", cut + 1)
            if cut != -1:
                out.setdefault(owner[rest[:cut]], {})[rest[cut + 1 :]] = spec
        return out


def _is_zero(optimizer: Optimizer) -> bool:
    """True for a ZeroRedundancyOptimizer. Looked up, not imported: its package compiles TorchScript on import."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state: of a ZeroRedundancyOptimizer the one of this rank's share of the parameters."""
    if not _is_zero(optimizer):
        return optimizer
    zero: Any = optimizer
    zero._check_overlap_initialized()
    inner: Optimizer = zero.optim
    return inner


def _filled(slots: _Slots, slot: str, tree: Tree) -> Any:
    """A stored value that is no tensor itself, the tensors in it put back."""
    marker = f"/{slot}/"

    def tensor_of(name: str) -> torch.Tensor | None:
        for other in slots.param.names:
            found = name.find(f"/{other}{marker}")
            if found != -1:
                return slots.tensors.get(f"{slot}/{name[found + len(other) + 1 + len(marker) :]}")
        return slots.tensors.get(f"{slot}/{name.rpartition(marker)[2]}")

    return put_tensors(tree, tensor_of, name=slot)


def _install_action(slots: _Slots, values: Mapping[str, Any]) -> Action:
    """Replace the parameter's state by what was loaded; no stored state leaves it with none."""

    def install() -> None:
        key = slots.param.tensor
        if not slots.tensors and not values:
            slots.state.pop(key, None)
            return
        now: dict[str, Any] = slots.state.setdefault(key, {})
        for path, tensor in slots.tensors.items():
            if "/" in path:
                continue
            old = now.get(path)
            number = next((kind for kind in (int, float) if type(old) is kind), None)
            now[path] = tensor if number is None else number(tensor.item())
        now.update(values)

    return install


def _sync_action(optimizer: Any) -> Action:
    return lambda: optimizer._sync_param_groups(optimizer.param_groups, inner_optimizer(optimizer).param_groups)
