"""A user's state to named tensors with boxes and typed objects.

In: a state dict. Out: `LocalState` for a save, and the holders that a load works with. Called on every rank,
communicates with nobody, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.errors import InvalidInputError
from ckpt.format.spec import LocalState, StoredObject, TensorSpec
from ckpt.layout.layout import Layout
from ckpt.state.describe import describe_parts
from ckpt.state.flat import FlatOptimizerHolder, FlatOptimizerState, FlatShard, FlatShardHolder
from ckpt.state.holders import Holder
from ckpt.state.loader import is_loader
from ckpt.state.locate import Locator, ParamTable
from ckpt.state.memory import SourceMemory, collector_paused
from ckpt.state.modules import ModuleHolder
from ckpt.state.names import check_key
from ckpt.state.optimizers import OptimizerHolder
from ckpt.state.per_rank import LoaderHolder, RngHolder
from ckpt.state.rng import RNG
from ckpt.state.tensors import Part
from ckpt.state.trees import holds_only_plain
from ckpt.state.values import PlainHolder, StatefulHolder

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    value: Any
    assign: Callable[[Any], None]
    kind: Literal["module", "plain", "other"]


def collect(
    state: Mapping[str, Any],
    *,
    rank: int,
    world: int,
    layout: Layout | None = None,
    names: Named = (),
    stage_devices: bool = True,
) -> LocalState:
    """What this rank holds of the state, for a save.

    Args:
        state: modules, optimizers, tensors, numbers, nested containers, objects with `state_dict()`, by key.
        rank: of this process among those that save.
        world: number of processes that save.
        layout: says of plain tensors which part of a global tensor they are.
        names: names of parameters that optimizers hold and no module in the state has, as `module.named_parameters()`.
        stage_devices: copy CUDA tensors to pinned host memory. False: give their memory on the device (`on_device`).

    Returns:
        Specs and objects sorted by name. Pieces point into the tensors' own host memory, or into pinned copies of those
        on a device. Boxes without elements have no piece.

    Errors: InvalidInputError that names the key and what is wrong with it. Called on every rank; no communication.
    """
    return Collector().collect(state, rank=rank, world=world, layout=layout, names=names, stage_devices=stage_devices)


class Collector:
    """Collects the state of one run again and again. Owned by one thread; keeps no tensor between the calls.

    Every call walks the whole state and looks at every tensor. What comes out as it did the last time (specs, boxes,
    addresses) is given out as the very same objects, which those who work with them can tell at once.
    """

    def __init__(self) -> None:
        self._specs: list[TensorSpec] = []
        self._sources = SourceMemory()

    def collect(
        self,
        state: Mapping[str, Any],
        *,
        rank: int,
        world: int,
        layout: Layout | None = None,
        names: Named = (),
        stage_devices: bool = True,
    ) -> LocalState:
        """As the function `collect`."""
        with torch.no_grad(), collector_paused():
            saved = [holder.save() for holder in open_state(state, rank=rank, layout=layout, names=names)]
            parts = sorted_parts(part for one in saved for part in one.parts)
            specs = [part.spec for part in parts]
            if specs != self._specs:
                self._specs = specs
            memory = self._sources.of(parts, stage_devices=stage_devices)
        return LocalState(
            specs=self._specs,
            pieces=memory.pieces,
            objects=_sorted_objects([item for one in saved for item in one.objects]),
            keep_alive=memory.keep_alive,
            describe=lambda: describe_parts(parts),
            storage_of_piece=memory.storage,
            on_device=memory.on_device,
        )


def open_state(state: Mapping[str, Any], *, rank: int, layout: Layout | None = None, names: Named = ()) -> list[Holder]:
    """A holder for each entry: modules first, random streams last (loading the others may draw numbers)."""
    locator, table = Locator(rank=rank, layout=layout), ParamTable()
    entries = _entries(state)
    modules = [ModuleHolder(entry.name, _as_list(entry.value), locator) for entry in entries if entry.kind == "module"]
    for module in modules:
        module.add_params(table, "" if len(modules) == 1 or module.name == "model" else f"{module.name}/")
    plain = [PlainHolder(e.name, e.value, e.assign, locator) for e in entries if e.kind == "plain"]
    for holder in plain:
        holder.add_params(table)
    for name, tensor in names:
        if table.get(tensor) is None:
            table.add((name,), tensor, locator.locate(name, tensor))
    rest: list[Holder] = [_special(entry, table, locator) for entry in entries if entry.kind == "other"]
    rest.sort(key=lambda holder: isinstance(holder, RngHolder))
    return [*modules, *plain, *rest]


def sorted_parts(parts: Iterable[Part]) -> list[Part]:
    """By name; one error for all names that two things have."""
    out = sorted(parts, key=lambda part: part.spec.name)
    if len({part.spec.name for part in out}) == len(out) and not any(part.spec.aliases for part in out):
        return out
    seen: dict[str, Part] = {}
    twice = []
    for part in out:
        for name in (part.spec.name, *part.spec.aliases):
            other = seen.setdefault(name, part)
            if other is not part:
                twice.append(f"`{name}` from {other.source} and from {part.source}")
    if twice:
        raise InvalidInputError(f"two tensors have one name: {'; '.join(twice[:10])}", kind="duplicate-name")
    return out


def _sorted_objects(objects: Sequence[StoredObject]) -> list[StoredObject]:
    out = sorted(objects, key=lambda item: item.name)
    for one, other in zip(out, out[1:], strict=False):
        if one.name == other.name:
            raise InvalidInputError(f"two objects have the name `{one.name}`", kind="duplicate-name")
    return out


def _entries(state: Mapping[str, Any]) -> list[_Entry]:
    """Keys and values; containers that hold modules, optimizers and the like are opened, their keys joined by `/`."""
    if not isinstance(state, Mapping):
        raise InvalidInputError(f"a state must be a mapping, found {type(state).__name__}")
    return [entry for key, value in state.items() for entry in _opened(check_key(key), value, state, key)]


def _opened(name: str, value: Any, parent: Any, key: Any) -> list[_Entry]:
    kind: Literal["module", "plain", "other"] | None = None
    if _all_are(value, nn.Module):
        kind = "module"
    elif _is_special(value) or _all_are(value, Optimizer):
        kind = "other"
    elif holds_only_plain(value, _is_special):
        kind = "plain"
    if kind is not None:
        return [_Entry(name=name, value=value, assign=_assign_in(name, parent, key), kind=kind)]
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


def _special(entry: _Entry, table: ParamTable, locator: Locator) -> Holder:
    value = entry.value
    if _all_are(value, Optimizer):
        return OptimizerHolder(entry.name, _as_list(value), table, locator)
    if isinstance(value, FlatOptimizerState):
        return FlatOptimizerHolder(entry.name, value)
    if isinstance(value, FlatShard):
        return FlatShardHolder(entry.name, value)
    if isinstance(value, RNG):
        return RngHolder(entry.name, value)
    if is_loader(value):
        return LoaderHolder(entry.name, value)
    return StatefulHolder(entry.name, value, locator)


def _is_special(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, int, float, str)):
        return False
    if isinstance(value, (nn.Module, Optimizer, FlatShard, FlatOptimizerState, RNG)):
        return True
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _all_are(value: Any, kind: type) -> bool:
    """True for one of this kind, and for a list or tuple of nothing else."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, kind) for item in value)
    return isinstance(value, kind)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
