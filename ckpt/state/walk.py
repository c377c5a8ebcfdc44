"""A user's state to named tensors with boxes and typed objects.

In: a state dict. Out: `LocalState` for a save, and the holders that a load works with. Called on every rank,
communicates with nobody, changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ckpt.collector import collector_paused
from ckpt.errors import InvalidInputError
from ckpt.format.spec import LocalState, StoredObject, TensorSpec
from ckpt.layout.layout import Layout
from ckpt.state.describe import describe, lies
from ckpt.state.entries import Entry, all_are, as_list, entries_of
from ckpt.state.flat import FlatOptimizerHolder, FlatOptimizerState, FlatShard, FlatShardHolder
from ckpt.state.holders import Holder
from ckpt.state.loader import is_loader
from ckpt.state.locate import Locator, ParamTable
from ckpt.state.memory import SourceMemory
from ckpt.state.modules import ModuleHolder
from ckpt.state.optimizers import OptimizerHolder, ParamNames, optimizer_object
from ckpt.state.per_rank import LoaderHolder, RngHolder
from ckpt.state.rng import RNG
from ckpt.state.sight import Facts, Sight, look, same_leaf
from ckpt.state.tensors import Part
from ckpt.state.values import PlainHolder, StatefulHolder, value_object

Named = Iterable[tuple[str, torch.Tensor]]


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


@dataclass(frozen=True, kw_only=True)
class _Last:
    """What the last full walk gave, and the facts that it followed from. Holds no tensor of the user's."""

    arguments: tuple[int, int, bool]  # rank, world, stage_devices
    layout: Layout | None
    facts: Facts
    leaves: Mapping[str, list[Any]]
    local: LocalState  # without owners of memory
    owner_of: Sequence[int]  # of each spec: which of the tensors in sight has its memory
    names: Mapping[str, ParamNames]  # of the optimizers, by state key


class Collector:
    """Collects the state of one run again and again. Owned by one thread; keeps no tensor between the calls.

    A state that looks as it did the last time (`ckpt.state.sight`) is not walked again: specs and pieces are given out as
    the very same objects, which those who work with them can tell at once; only objects are made anew. Any other state
    is walked, and what comes out as it did the last time is given out as the same objects too.
    """

    def __init__(self) -> None:
        self._specs: list[TensorSpec] = []
        self._sources = SourceMemory()
        self._last: _Last | None = None

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
        arguments, named = (rank, world, stage_devices), list(names)
        with torch.no_grad(), collector_paused():
            entries = entries_of(state)
            sight, last = look(entries, named), self._last
            if sight is not None and last is not None:
                if arguments == last.arguments and layout is last.layout and sight.facts.same(last.facts):
                    return self._again(entries, sight, last)
            self._last = None
            return self._walk(entries, named, sight, arguments, layout)

    def _walk(
        self,
        entries: Sequence[Entry],
        named: Named,
        sight: Sight | None,
        arguments: tuple[int, int, bool],
        layout: Layout | None,
    ) -> LocalState:
        rank, _, stage_devices = arguments
        taken = {} if sight is None else sight.values
        holders = _open(entries, rank=rank, layout=layout, names=named, taken=taken)
        saved = [holder.save() for holder in holders]
        parts = sorted_parts(part for one in saved for part in one.parts)
        specs = [part.spec for part in parts]
        if specs != self._specs:
            self._specs = specs
        memory = self._sources.of(parts, stage_devices=stage_devices)
        places, specs = [lies(part) for part in parts], self._specs
        local = LocalState(
            specs=specs,
            pieces=memory.pieces,
            objects=_sorted_objects([item for one in saved for item in one.objects]),
            describe=lambda: describe(specs, places),
            storage_of_piece=memory.storage,
            on_device=memory.on_device,
        )
        owner_of = None if sight is None else _owners(sight.facts, memory.keep_alive)
        if sight is not None and owner_of is not None:
            self._last = _Last(
                arguments=arguments,
                layout=layout,
                facts=sight.facts,
                leaves=sight.leaves,
                local=local,
                owner_of=owner_of,
                names={holder.name: holder.names() for holder in holders if isinstance(holder, OptimizerHolder)},
            )
        seen = local.seen if sight is None else sight.seen
        return dataclasses.replace(local, keep_alive=memory.keep_alive, seen=seen)

    def _again(self, entries: Sequence[Entry], sight: Sight, last: _Last) -> LocalState:
        """The state of the last walk with the objects of now."""
        known = {item.name: item for item in last.local.objects}
        objects = [item for entry in entries for item in _objects_again(entry, sight, last, known)]
        local = dataclasses.replace(last.local, objects=_sorted_objects(objects))
        self._last = dataclasses.replace(last, leaves=sight.leaves, local=local)
        owners = sight.owners
        keep_alive = tuple([owners[index] for index in last.owner_of])
        return dataclasses.replace(local, keep_alive=keep_alive, seen=sight.seen)


def _objects_again(entry: Entry, sight: Sight, last: _Last, known: Mapping[str, StoredObject]) -> list[StoredObject]:
    """The objects of an entry of which only values that are no tensors may have changed."""
    name, value = entry.name, entry.value
    if entry.kind == "module" or isinstance(value, torch.Tensor):
        return []
    if name in last.names:
        return [optimizer_object(name, as_list(value), last.names[name])]
    if name not in sight.leaves:
        return (RngHolder(name, value) if isinstance(value, RNG) else LoaderHolder(name, value)).save().objects
    now, then = sight.leaves[name], last.leaves[name]
    if len(now) == len(then) and all(map(same_leaf, now, then)):
        return [known[name]]
    return [value_object(name, sight.values.get(name, value))]


def _owners(facts: Facts, tensors: Sequence[Any]) -> list[int] | None:
    """Which of the tensors in sight has the memory of each part; None where that is not in sight: it is a copy."""
    numbers = dict(zip(zip(facts.starts, facts.dtypes, strict=True), range(len(facts.starts)), strict=True))
    keys = [(tensor.untyped_storage().data_ptr(), tensor.dtype) for tensor in tensors]
    return [numbers[key] for key in keys] if all(key in numbers for key in keys) else None


def open_state(state: Mapping[str, Any], *, rank: int, layout: Layout | None = None, names: Named = ()) -> list[Holder]:
    """A holder for each entry: modules first, random streams last (loading the others may draw numbers)."""
    return _open(entries_of(state), rank=rank, layout=layout, names=names, taken={})


def _open(
    entries: Sequence[Entry], *, rank: int, layout: Layout | None, names: Named, taken: Mapping[str, Any]
) -> list[Holder]:
    """`taken`: what `state_dict()` gave already, by entry."""
    locator, table = Locator(rank=rank, layout=layout), ParamTable()
    modules = [ModuleHolder(entry.name, as_list(entry.value), locator) for entry in entries if entry.kind == "module"]
    for module in modules:
        module.add_params(table, "" if len(modules) == 1 or module.name == "model" else f"{module.name}/")
    plain = [PlainHolder(e.name, e.value, e.assign, locator) for e in entries if e.kind == "plain"]
    for holder in plain:
        holder.add_params(table)
    for name, tensor in names:
        if table.get(tensor) is None:
            table.add((name,), tensor, locator.locate(name, tensor))
    rest: list[Holder] = [_special(entry, table, locator, taken) for entry in entries if entry.kind == "other"]
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


def _special(entry: Entry, table: ParamTable, locator: Locator, taken: Mapping[str, Any]) -> Holder:
    value = entry.value
    if all_are(value, Optimizer):
        return OptimizerHolder(entry.name, as_list(value), table, locator)
    if isinstance(value, FlatOptimizerState):
        return FlatOptimizerHolder(entry.name, value)
    if isinstance(value, FlatShard):
        return FlatShardHolder(entry.name, value)
    if isinstance(value, RNG):
        return RngHolder(entry.name, value)
    if is_loader(value):
        return LoaderHolder(entry.name, value)
    return StatefulHolder(entry.name, value, locator, taken)
