"""A checkpoint back into a user's state.

In: a state, the checkpoint's tensors and objects. Out: writable memory for the wanted tensors, and the step that
installs the rest. Nothing of the state changes before the bytes are read into that memory; optimizers, schedulers and
the like change in `restore` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ckpt.collector import collector_paused
from ckpt.format.spec import LocalState, TensorSpec
from ckpt.layout.layout import Layout
from ckpt.state.holders import Action, StoredTensors, Wanted
from ckpt.state.memory import HostMemory, target_memory
from ckpt.state.rows import Rows, SavedWorld, StoredObjectRow
from ckpt.state.walk import Named, open_state, sorted_parts


@dataclass(frozen=True, kw_only=True)
class LoadTarget:
    """What a load fills. Owned by the thread that loads.

    In order: `check` once the objects are read, then the bytes into `local.pieces`, then `restore`.
    """

    local: LocalState  # specs and writable pieces; no objects
    wants_objects: list[str]  # sorted
    _wanted: list[Wanted]
    _memory: HostMemory
    _rank: int
    _world: int
    _checked: list[tuple[Mapping[str, Sequence[StoredObjectRow]], SavedWorld, list[Action]]] = field(
        default_factory=list
    )

    def check(self, objects: Mapping[str, Sequence[StoredObjectRow]], saved: SavedWorld) -> None:
        """Decode all objects and raise what `restore` would raise, before a byte of the target changes."""
        self._checked[:] = [(objects, saved, self._prepare(objects, saved))]

    def restore(self, objects: Mapping[str, Sequence[StoredObjectRow]], saved: SavedWorld) -> None:
        """Install everything once the bytes are in place. Objects that are not given stay as they are.

        Errors: MismatchError where rows differ and none is known to be this rank's, DamagedError for bytes that are no
        object.
        """
        found = self._checked.pop() if self._checked else None
        if found is not None and found[0] is objects and found[1] is saved:
            actions = found[2]
        else:
            actions = self._prepare(objects, saved)
        with torch.no_grad(), collector_paused():
            self._memory.to_device()
            for action in actions:
                action()

    def _prepare(self, objects: Mapping[str, Sequence[StoredObjectRow]], saved: SavedWorld) -> list[Action]:
        rows = Rows(objects=objects, saved=saved, rank=self._rank, world=self._world)
        with torch.no_grad(), collector_paused():
            return [action for wanted in self._wanted for action in wanted.prepare(rows)]


def target(
    state: Mapping[str, Any],
    stored: Sequence[TensorSpec],
    *,
    rank: int,
    world: int,
    layout: Layout | None = None,
    names: Named = (),
) -> LoadTarget:
    """Memory and objects that this rank wants from a checkpoint with the tensors `stored`.

    The arguments are those of `collect`. Optimizer slots that are stored and that the optimizer does not have yet
    are made here and installed by `restore`.
    """
    tensors = StoredTensors.build(stored)
    with torch.no_grad(), collector_paused():
        wanted = [holder.load(tensors) for holder in open_state(state, rank=rank, layout=layout, names=names)]
        parts = sorted_parts(part for one in wanted for part in one.parts)
        filled = [any(name in tensors.by_name for name in (p.spec.name, *p.spec.aliases)) for p in parts]
        memory = target_memory(parts, filled=filled)
    local = LocalState(
        specs=[part.spec for part in parts],
        pieces=memory.pieces,
        objects=[],
        keep_alive=memory.keep_alive,
        storage_of_piece=memory.storage,
        on_device=memory.on_device,
    )
    return LoadTarget(
        local=local,
        wants_objects=sorted(name for one in wanted for name in one.objects),
        _wanted=wanted,
        _memory=memory,
        _rank=rank,
        _world=world,
    )
