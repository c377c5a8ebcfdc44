"""A quick look at a state: every fact that its specs and pieces follow from, as plain values.

In: entries of a state. Out: `Sight`: the facts, to be compared with those of an earlier look, and the owners of the
memory. Never makes a name of a tensor, and never goes by the identity of an object that may be gone: what is compared is
keys, shapes, strides, dtypes, addresses and placements themselves.

A state with equal facts has equal specs, boxes and addresses, so those of the last full walk can be given out again. A
look costs a tenth of a walk. Where it cannot know (FSDP1, flat shards, modules with extra state, subclasses of tensors,
ZeroRedundancyOptimizer) there is no sight, and every save walks.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckpt.config import OBJECT_DEPTH_MAX
from ckpt.state.entries import Entry, all_are, as_list
from ckpt.state.flat import FlatOptimizerState, FlatShard
from ckpt.state.loader import is_loader
from ckpt.state.names import walk_module
from ckpt.state.optimizers import inner_optimizer
from ckpt.state.rng import RNG
from ckpt.state.tensors import notes_of
from ckpt.state.trees import CONTAINERS, DICTS, LEAVES

# One pass takes facts of this many tensors: their headers stay in the processor's cache meanwhile (1.6 times as fast).
_TENSORS_PER_PASS = 512
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_TENSORS = _PLAIN | {DTensor}

_tensor: Any = torch.Tensor  # its methods, called for many tensors at the speed of C
_is_cpu, _dtype = operator.attrgetter("is_cpu"), operator.attrgetter("dtype")
_local, _mesh, _placements = (operator.attrgetter(name) for name in ("_local_tensor", "mesh", "placements"))
_spec = operator.attrgetter("_spec")


@dataclass(kw_only=True, eq=False)
class Facts:
    """Plain values; keeps no tensor alive, and no mesh."""

    structure: list[Any] = field(default_factory=list)  # keys, kinds of values, which tensors are one object
    sizes: list[torch.Size] = field(default_factory=list)  # global
    local_sizes: list[torch.Size] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of the storages
    nbytes: list[int] = field(default_factory=list)  # of the storages
    offsets: list[int] = field(default_factory=list)  # in the storage, elements
    lazy: list[Any] = field(default_factory=list)  # negated or conjugated on reading
    devices: list[Any] = field(default_factory=list)
    on: list[Any] = field(default_factory=list)  # of DTensors: the id of its mesh
    meshes: dict[int, Any] = field(default_factory=dict)  # what there is to say of a mesh, by its id in this look
    notes: list[Any] = field(default_factory=list)  # of annotated tensors: position and note
    placements: list[tuple[Any, ...]] = field(default_factory=list)  # of DTensors

    def same(self, other: Facts) -> bool:
        """Whether a full walk would give equal specs, boxes and addresses for both."""
        return all(getattr(self, name) == getattr(other, name) for name in _COMPARED) and _same_placements(
            self.placements, other.placements
        )


_COMPARED = [name for name in Facts.__dataclass_fields__ if name != "placements"]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one look saw. Belongs to one save; only `facts` and `leaves` outlive it."""

    facts: Facts
    owners: list[object]  # of the memory of each tensor that was looked at: its storage, or a tensor on a device
    leaves: dict[str, list[Any]]  # values that are no tensors, by entry
    values: dict[str, Any]  # what `state_dict()` gave, by entry
    tensors: list[torch.Tensor]  # that were looked at, in the order of the facts
    parts: list[torch.Tensor]  # this rank's part of each: the tensor itself, or of a DTensor the local one

    def seen(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        """The tensors, this rank's part of each, and where its storage begins."""
        return self.tensors, self.parts, self.facts.starts


class _NeedsWalkError(Exception):
    """Only a full walk can tell."""


def look(entries: Sequence[Entry], names: Iterable[tuple[str, torch.Tensor]]) -> Sight | None:
    """The sight of a state, or None where only a full walk can tell. Resharding modules of FSDP2 is all it changes."""
    looker = _Looker()
    try:
        looker.look(entries, names)
        looker.measure()
    except (_NeedsWalkError, NotImplementedError, RuntimeError):  # torch raises the others for what has no storage
        return None
    return Sight(
        facts=looker.facts,
        owners=looker.owners,
        leaves=looker.leaves,
        values=looker.values,
        tensors=looker.tensors,
        parts=looker.parts,
    )


def same_leaf(one: Any, other: Any) -> bool:
    """Whether two values are encoded alike; only sure for the plainest ones."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other) or kind not in LEAVES:
        return False
    return bool(one.hex() == other.hex() if kind is float else one == other)


class _Looker:
    """Gathers the tensors and the structure, then the facts of all tensors. Used once, by one thread."""

    def __init__(self) -> None:
        self.facts = Facts()
        self.owners: list[object] = []
        self.leaves: dict[str, list[Any]] = {}
        self.values: dict[str, Any] = {}
        self._structure = self.facts.structure
        self.tensors: list[torch.Tensor] = []
        self.parts: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}  # of the tensors by their ids

    def look(self, entries: Sequence[Entry], names: Iterable[tuple[str, torch.Tensor]]) -> None:
        """In the order of a full walk: modules first, as FSDP2 puts its shards in place there."""
        self._structure.append([(entry.name, entry.kind) for entry in entries])
        for entry in entries:
            if entry.kind == "module":
                self._modules(as_list(entry.value))
        for entry in entries:
            if entry.kind == "plain":
                self._value(entry.value, self.leaves.setdefault(entry.name, []))
        for name, tensor in names:
            self._structure.append(name)
            self.tensors.append(tensor)
        if any(entry.kind != "plain" for entry in entries):  # then it matters which of them are one and the same
            self._structure.append([self._numbers.setdefault(id(t), i) for i, t in enumerate(self.tensors)])
        for entry in entries:
            if entry.kind == "other":
                self._other(entry)

    def _modules(self, roots: Sequence[nn.Module]) -> None:
        walked = [list(walk_module(root)) for root in roots]
        for modules in walked:
            for _, module in modules:
                if isinstance(module, FSDPModule):
                    module.reshard()
        self._structure.append(len(roots))
        for modules in walked:
            for prefix, module in modules:
                self._module(prefix, module)
            self._structure.append(None)

    def _module(self, prefix: str, module: nn.Module) -> None:
        kind = type(module)
        if kind.get_extra_state is not nn.Module.get_extra_state or issubclass(kind, FullyShardedDataParallel):
            raise _NeedsWalkError
        self._structure.append(prefix)
        for name, tensor in module._parameters.items():
            if tensor is not None:
                self._structure.append(name)
                self.tensors.append(tensor)
        self._structure.append(None)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self._structure.append(name)
                self.tensors.append(buffer)

    def _other(self, entry: Entry) -> None:
        value = entry.value
        if all_are(value, Optimizer):
            self._structure.append("optimizers")
            for optimizer in as_list(value):
                self._optimizer(optimizer)
        elif isinstance(value, (FlatShard, FlatOptimizerState)):
            raise _NeedsWalkError
        elif isinstance(value, RNG) or is_loader(value):
            self._structure.append("no tensors")
        else:
            self._structure.append("stateful")
            self.values[entry.name] = value.state_dict()
            self._value(self.values[entry.name], self.leaves.setdefault(entry.name, []))

    def _optimizer(self, optimizer: Optimizer) -> None:
        if inner_optimizer(optimizer) is not optimizer:
            raise _NeedsWalkError
        self._structure.append([[self._number(tensor) for tensor in g["params"]] for g in optimizer.param_groups])
        for param, slots in optimizer.state.items():
            if type(slots) not in DICTS:
                raise _NeedsWalkError
            self._structure.append(self._number(param))
            self._container(slots, [], 0)
        self._structure.append(None)

    def _number(self, param: torch.Tensor) -> tuple[int, bool]:
        """Which of the tensors seen before a parameter is."""
        number = self._numbers.get(id(param))
        if number is None:
            raise _NeedsWalkError
        return number, param.requires_grad  # plain tensors name parameters only where they require it

    def _value(self, value: Any, leaves: list[Any], depth: int = 0) -> None:
        kind = type(value)
        if kind in CONTAINERS:
            self._container(value, leaves, depth)
        elif kind in _TENSORS:
            self._structure.append(kind)
            self.tensors.append(value)
        elif isinstance(value, torch.Tensor):
            raise _NeedsWalkError
        else:
            self._structure.append(kind)
            leaves.append(value if kind in LEAVES else object())  # what may change in place is unlike itself

    def _container(self, container: Any, leaves: list[Any], depth: int) -> None:
        kind = type(container)
        if depth >= OBJECT_DEPTH_MAX or kind is collections.defaultdict:
            raise _NeedsWalkError
        if kind in DICTS:
            keys, items = list(container), list(container.values())
            if not set(map(type, keys)) <= {str}:
                if not set(map(type, keys)) <= {str, int}:
                    raise _NeedsWalkError
                self._structure.append(list(map(type, keys)))
            self._structure.append(keys)
        else:
            items = list(container)
            self._structure.append((len(items), getattr(container, "maxlen", None)))
        kinds = list(map(type, items))
        self._structure += (kind, kinds)
        if set(kinds) <= _TENSORS:
            self.tensors += items
            return
        for item, item_kind in zip(items, kinds, strict=True):
            if item_kind in _TENSORS:
                self.tensors.append(item)
            elif item_kind in LEAVES:
                leaves.append(item)
            else:
                self._value(item, leaves, depth + 1)

    def measure(self) -> None:
        """Take the facts of all tensors, some at a time."""
        if not set(map(type, self.tensors)) <= _TENSORS:
            raise _NeedsWalkError
        self.facts.notes = notes_of(self.tensors)
        for start in range(0, len(self.tensors), _TENSORS_PER_PASS):
            tensors = self.tensors[start : start + _TENSORS_PER_PASS]
            self.facts.sizes += map(_tensor.size, tensors)
            parts = self._locals(tensors)
            self.parts += parts
            self._memory(parts)

    def _locals(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        kinds = set(map(type, tensors))
        if DTensor not in kinds:
            return tensors
        cut: list[Any] = [t for t in tensors if type(t) is DTensor] if len(kinds) > 1 else tensors
        specs = list(map(_spec, cut))
        meshes = list(map(_mesh, specs))
        self.facts.on += map(id, meshes)
        for mesh in {id(mesh): mesh for mesh in meshes}.values():
            if id(mesh) not in self.facts.meshes:
                where = mesh.get_coordinate()
                self.facts.meshes[id(mesh)] = (tuple(mesh.shape), mesh.mesh_dim_names, where and tuple(where))
        self.facts.placements += map(_placements, specs)
        if len(kinds) == 1:
            return list(map(_local, cut))
        return [t._local_tensor if type(t) is DTensor else t for t in tensors]

    def _memory(self, tensors: list[torch.Tensor]) -> None:
        """The facts of plain tensors."""
        facts = self.facts
        if not set(map(type, tensors)) <= _PLAIN:
            raise _NeedsWalkError
        storages = list(map(_tensor.untyped_storage, tensors))
        facts.starts += map(torch.UntypedStorage.data_ptr, storages)
        facts.nbytes += map(torch.UntypedStorage.nbytes, storages)
        facts.offsets += map(_tensor.storage_offset, tensors)
        facts.local_sizes += map(_tensor.size, tensors)
        facts.strides += map(_tensor.stride, tensors)
        facts.lazy += map(_tensor.is_neg, tensors)
        dtypes = list(map(_dtype, tensors))
        facts.dtypes += dtypes
        if any(dtype.is_complex for dtype in set(dtypes)):
            facts.lazy += map(_tensor.is_conj, tensors)
        if all(map(_is_cpu, tensors)):
            self.owners += storages
            return
        facts.devices += [len(facts.starts), *(tensor.device for tensor in tensors)]
        self.owners += [
            storage if tensor.is_cpu else tensor.detach() for storage, tensor in zip(storages, tensors, strict=True)
        ]


def _same_placements(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    """By the very same objects, which is fast; else by classes too: in some torches a strided Shard equals a plain one."""
    if len(one) == len(other) and all(map(operator.is_, one, other)):
        return True
    return one == other and [list(map(type, p)) for p in one] == [list(map(type, p)) for p in other]
