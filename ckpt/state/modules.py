"""Modules to named tensors: parameters, persistent buffers and extra state, each tied tensor once.

In: one module, or the modules of one rank (pipeline chunks). Out: parts, objects. Never runs a forward, never gathers.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ckpt.errors import InvalidInputError
from ckpt.format.objects import decode, encode
from ckpt.format.spec import StoredObject
from ckpt.state.fsdp1 import ShardedParams, sharded_params
from ckpt.state.holders import Action, Saved, StoredTensors, Wanted
from ckpt.state.locate import Locator, ParamTable
from ckpt.state.names import join, walk_module
from ckpt.state.rows import Rows
from ckpt.state.tensors import Located, Part, memory_problem, part
from ckpt.state.trees import put_tensors, take_tensors


@dataclass(frozen=True, kw_only=True)
class _Found:
    name: str  # fully qualified, without the key
    role: str
    tensor: torch.Tensor
    located: Located | None  # where FSDP1 says, else None


class ModuleHolder:
    """The modules under one state key. Owned by one walk; looks at the modules once, when it is made."""

    def __init__(self, name: str, modules: Sequence[nn.Module], locator: Locator) -> None:
        self._name = name
        self._locator = locator
        self._extra: dict[str, nn.Module] = {}
        self._tied = self._collect(modules)

    @property
    def name(self) -> str:
        return self._name

    def add_params(self, table: ParamTable, prefix: str) -> None:
        """Name all parameters for the optimizers, with `prefix` before their names."""
        for group, located in self._tied:
            for found in group:
                if found.role == "param":
                    table.add((prefix + found.name,), found.tensor, located)

    def save(self) -> Saved:
        """Parameters, buffers, extra state."""
        parts, objects = self._parts(), []
        for name, module in self._extra.items():
            tree, tensors = take_tensors(module.get_extra_state(), name)
            parts += [self._extra_part(path, tensor) for path, tensor in tensors.items()]
            objects.append(StoredObject(name=name, kind="replicated", payload=encode(tree, name=name)))
        return Saved(parts=parts, objects=objects)

    def load(self, stored: StoredTensors) -> Wanted:
        """Parameters and buffers in place; extra state through `set_extra_state`."""
        parts, tensors = self._parts(), dict[str, torch.Tensor]()
        for name, module in self._extra.items():
            # What get_extra_state gives may be the module's own memory; only set_extra_state may change that.
            _, now = take_tensors(module.get_extra_state(), name)
            tensors.update({path: torch.empty_like(tensor) for path, tensor in now.items()})
        parts += [self._extra_part(path, tensor) for path, tensor in tensors.items()]
        return Wanted(parts=parts, objects=list(self._extra), prepare=lambda rows: self._prepare(rows, tensors))

    def _prepare(self, rows: Rows, tensors: dict[str, torch.Tensor]) -> list[Action]:
        actions: list[Action] = []
        for name, module in self._extra.items():
            row = rows.chosen(name)
            if row is not None:
                tree = put_tensors(decode(row.payload, name=name), tensors.get, name=name)
                actions.append(_set_extra_state(module, tree))
        return actions

    def _parts(self) -> list[Part]:
        return [self._part(group, located) for group, located in self._tied]

    def _part(self, group: list[_Found], located: Located) -> Part:
        names = [join(self._name, found.name) for found in group]
        return part(names[0], group[0].role, located, source=f"module `{self._name}`", aliases=names[1:])

    def _extra_part(self, path: str, tensor: torch.Tensor) -> Part:
        located = self._locator.locate(path, tensor, strict=False)
        return part(path, "tensor", located, source=f"extra state in module `{self._name}`")

    def _collect(self, modules: Sequence[nn.Module]) -> list[tuple[list[_Found], Located]]:
        """Groups of tied tensors, each sorted by name, with their place."""
        per_module = [list(self._tensors(module)) for module in modules]
        prefixes = _prefixes(per_module)
        groups: dict[object, list[_Found]] = {}
        for module, found_list, prefix in zip(modules, per_module, prefixes, strict=True):
            for found in found_list:
                named = _Found(name=prefix + found.name, role=found.role, tensor=found.tensor, located=found.located)
                groups.setdefault((found.role, _identity(found)), []).append(named)
            for inner, child in walk_module(module):
                if type(child).get_extra_state is not nn.Module.get_extra_state:
                    self._extra[join(self._name, f"{prefix}{inner}_extra_state")] = child
        tied = [sorted({f.name: f for f in group}.values(), key=lambda f: f.name) for group in groups.values()]
        plain = [group[0] for group in tied if group[0].located is None]
        self._locator.check_rules((join(self._name, found.name), found.tensor) for found in plain)
        out = []
        for unique in tied:
            first = unique[0]
            located = first.located or self._locator.locate(join(self._name, first.name), first.tensor)
            out.append((unique, located))
        return out

    def _tensors(self, root: nn.Module) -> Iterator[_Found]:
        for _, module in walk_module(root):
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without a backward the root still shows unsharded parameters
        shards: ShardedParams = sharded_params(root, key=self._name)
        for prefix, module in walk_module(root):
            for name, param in module._parameters.items():
                if param is None:
                    continue
                tensor, located = shards.get((id(module), name), (param, None))
                yield _Found(name=prefix + name, role="param", tensor=tensor, located=located)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield _Found(name=prefix + name, role="buffer", tensor=buffer, located=None)


def _set_extra_state(module: nn.Module, tree: Any) -> Action:
    return lambda: module.set_extra_state(tree)


def _identity(found: _Found) -> object:
    """Equal for two names of the same memory. Sharded tensors by object, so that all ranks see the same ties."""
    tensor = found.tensor
    if isinstance(tensor, DTensor) or found.located is not None or memory_problem(tensor) or tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _prefixes(per_module: Sequence[Sequence[_Found]]) -> list[str]:
    """What goes before the names of each module: nothing when they are disjoint, else its index."""
    owners: dict[str, set[int]] = collections.defaultdict(set)
    for found_list in per_module:
        for found in found_list:
            owners[found.name].add(id(found.tensor))
    disjoint = all(len(ids) == 1 for ids in owners.values())
    return ["" if disjoint else f"{index}." for index in range(len(per_module))]


def check_modules(name: str, modules: Sequence[object]) -> None:
    """InvalidInputError unless every one is a module."""
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise InvalidInputError(
                f"`{name}[{index}]` is a {type(module).__name__}, expected a module like the others in the list"
            )
