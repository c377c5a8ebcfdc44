"""Flat ZeRO ranges: a 1-d buffer that holds elements [start, stop) of tensors put one after the other.

In: a buffer, the names and shapes that it was made of. Out: parts with the boxes of the ordinary tensors. Never
copies data.

A `FlatOptimizerState` stores under the names that a torch optimizer has, `<key>/<parameter>/<slot>`, so either one
loads what the other saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ckpt.errors import InvalidInputError, MismatchError
from ckpt.format.objects import encode
from ckpt.format.spec import StoredObject
from ckpt.layout.box import boxes_of_flat_range
from ckpt.layout.placement import Placed
from ckpt.state.dtypes import torch_dtype
from ckpt.state.groups import NamedGroup, group_actions, parse_hyperparameters, saved_groups
from ckpt.state.holders import Action, Saved, StoredTensors, Wanted
from ckpt.state.names import join, slot_name
from ckpt.state.rows import Rows
from ckpt.state.tensors import Located, Part, locate_plain, part, plain_memory


class FlatShard:
    """A value for the state dict: this rank's range of a flat buffer.

    Args:
        buffer: 1-d, `stop - start` elements.
        layout: (name, shape) of the tensors in the whole flat buffer, in order; a name of None is padding.
        start, stop: the range that `buffer` holds, elements. It may begin and end in the middle of tensors, and reach
            beyond the last one into padding.
    """

    def __init__(
        self, buffer: torch.Tensor, layout: Sequence[tuple[str | None, Sequence[int]]], *, start: int, stop: int
    ) -> None:
        if buffer.dim() != 1 or not 0 <= start <= stop or buffer.numel() != stop - start:
            raise InvalidInputError(
                f"a flat shard of elements {start} to {stop} needs a 1-d buffer of {stop - start} elements, "
                f"found shape {tuple(buffer.shape)}"
            )
        names = [name for name, _ in layout if name is not None]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidInputError(f"a flat shard has the names {twice} twice")
        self.buffer = buffer
        self.layout = tuple((name, tuple(shape)) for name, shape in layout)
        self.start = start
        self.stop = stop

    def names(self) -> list[str]:
        """Names of all tensors in the whole flat buffer, in order."""
        return [name for name, _ in self.layout if name is not None]

    def located(self) -> Iterator[tuple[str, Located]]:
        """Each named tensor of the whole flat buffer with the boxes that this range holds of it."""
        memory, begin = plain_memory("flat buffer", self.buffer), 0
        for name, shape in self.layout:
            size = math.prod(shape)
            first, last = max(self.start, begin), min(self.stop, begin + size)
            if name is not None:
                placed, at = [], first - self.start
                for box in boxes_of_flat_range(shape, first - begin, last - begin) if first < last else []:
                    placed.append(Placed(box=box, local_offsets=(at,)))
                    at += box.volume
                yield name, Located(shape=shape, placed=tuple(placed), memory=memory)
            begin += size


class FlatOptimizerState:
    """A value for the state dict: flat optimizer state (ZeRO-1), equivalent to that of a torch optimizer.

    Args:
        slots: a flat shard per slot, e.g. {"exp_avg": FlatShard(...), "exp_avg_sq": FlatShard(...)}; the names in their
            layouts are the parameters' names.
        step: number of steps, common to all parameters: a tensor of one element (loaded in place), or a number (then
            `.step` holds the loaded one). None: there is no such slot.
        groups: hyperparameters as in `param_groups`, "params" being names; loaded in place.
    """

    def __init__(
        self,
        slots: Mapping[str, FlatShard],
        *,
        step: torch.Tensor | int | float | None = None,
        groups: Sequence[MutableMapping[str, Any]] = (),
    ) -> None:
        if isinstance(step, torch.Tensor) and step.numel() != 1:
            raise InvalidInputError(f"`step` must have one element, found shape {tuple(step.shape)}")
        self.slots = dict(slots)
        self.step = step
        self.groups = list(groups)

    def names(self) -> list[str]:
        """Names of all parameters, sorted."""
        return sorted({name for shard in self.slots.values() for name in shard.names()})


class FlatShardHolder:
    """A `FlatShard` under one state key."""

    def __init__(self, name: str, shard: FlatShard) -> None:
        self._name = name
        self._shard = shard

    @property
    def name(self) -> str:
        return self._name

    def save(self) -> Saved:
        return Saved(parts=self._parts())

    def load(self, stored: StoredTensors) -> Wanted:
        return Wanted(parts=self._parts())

    def _parts(self) -> list[Part]:
        return [
            part(join(self._name, name), "tensor", located, source=f"flat shard `{self._name}`")
            for name, located in self._shard.located()
        ]


class FlatOptimizerHolder:
    """A `FlatOptimizerState` under one state key."""

    def __init__(self, name: str, state: FlatOptimizerState) -> None:
        self._name = name
        self._state = state

    @property
    def name(self) -> str:
        return self._name

    def save(self) -> Saved:
        """All slots, the step once per parameter as torch has it, the hyperparameters."""
        parts, step = self._parts(), self._state.step
        if step is not None:
            memory = step.reshape(()) if isinstance(step, torch.Tensor) else torch.tensor(float(step))
            parts += [self._step_part(name, memory) for name in self._state.names()]
        tree = {"groups": saved_groups(self._groups(), name=self._name), "param_state": {}}
        payload = encode(tree, name=self._name)
        return Saved(parts=parts, objects=[StoredObject(name=self._name, kind="optimizer", payload=payload)])

    def load(self, stored: StoredTensors) -> Wanted:
        """All slots in place; the steps of all parameters, which must be one and the same."""
        parts, names = self._parts(), self._state.names()
        steps = torch.zeros(0)
        if self._state.step is not None and names:
            spec = stored.by_name.get(slot_name(self._name, names[0], "step"))
            steps = torch.zeros(len(names), dtype=torch.float32 if spec is None else torch_dtype(spec.dtype))
            parts += [self._step_part(name, steps[index]) for index, name in enumerate(names)]
        return Wanted(parts=parts, objects=[self._name], prepare=lambda rows: self._prepare(rows, names, steps))

    def _prepare(self, rows: Rows, names: Sequence[str], steps: torch.Tensor) -> list[Action]:
        saved = [parse_hyperparameters(rank, tree, name=self._name) for rank, tree in rows.trees(self._name)]
        actions = [lambda: self._set_step(names, steps)] if len(steps) else []
        return actions + group_actions(self._groups(), saved, name=self._name)

    def _set_step(self, names: Sequence[str], steps: torch.Tensor) -> None:
        first = steps[0].item()
        for name, step in zip(names, steps.tolist(), strict=True):
            if step != first:
                raise MismatchError(
                    f"flat optimizer state `{self._name}` has one step for all parameters, but the checkpoint has "
                    f"{first:g} for `{names[0]}` and {step:g} for `{name}`"
                )
        if isinstance(self._state.step, torch.Tensor):
            self._state.step.fill_(first)
        else:
            self._state.step = int(first) if isinstance(self._state.step, int) else float(first)

    def _parts(self) -> list[Part]:
        return [
            part(slot_name(self._name, name, slot), f"optim.{slot}", located, source=self._source)
            for slot, shard in self._state.slots.items()
            for name, located in shard.located()
        ]

    def _step_part(self, name: str, memory: torch.Tensor) -> Part:
        full = slot_name(self._name, name, "step")
        return part(full, "optim.step", locate_plain(full, memory), source=self._source)

    def _groups(self) -> list[NamedGroup]:
        return [NamedGroup(params=[(name,) for name in group["params"]], values=group) for group in self._state.groups]

    @property
    def _source(self) -> str:
        return f"flat optimizer state `{self._name}`"
