"""Where a tensor of the state lies in its global tensor, whatever way this rank knows it.

In: names and tensors. Out: `Located`. Never copies data. The order of precedence: an annotation, FSDP1's own records, a
DTensor's placements, the layout that the user gave, and else the tensor is the whole of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

from ckpt.errors import InvalidInputError
from ckpt.layout.assign import Faults
from ckpt.layout.layout import Layout
from ckpt.state.tensors import DTensorPlaces, Located, annotated, locate_plain, plain_memory


@dataclass(frozen=True, kw_only=True)
class Locator:
    """What this rank knows of where tensors lie. Made for one walk."""

    rank: int
    layout: Layout | None = None
    dtensors: DTensorPlaces = field(default_factory=DTensorPlaces)

    def locate(self, name: str, tensor: torch.Tensor, *, strict: bool = True) -> Located:
        """A tensor's place. With a layout, a plain tensor of no rule is an error if `strict`, else it is whole."""
        known = annotated(name, tensor)
        if known is not None:
            return known
        if isinstance(tensor, DTensor):
            return self.dtensors.locate(name, tensor)
        if self.layout is not None and tensor.dim() > 0 and (strict or self.layout.candidates(name)):
            return self._by_layout(self.layout, name, tensor)
        return locate_plain(name, tensor)

    def check_rules(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raise one InvalidInputError for all plain tensors that the layout has no rule for, or several.

        A pattern that matches none of them is no fault: it may be for tensors of other ranks.
        """
        if self.layout is None:
            return
        faults = Faults()
        names = [name for name, tensor in named if self._needs_rule(name, tensor)]
        self.layout.index.assign_all(names, faults)
        faults.idle.clear()
        faults.raise_any()

    def _needs_rule(self, name: str, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, DTensor) and tensor.dim() > 0 and annotated(name, tensor) is None

    def _by_layout(self, layout: Layout, name: str, tensor: torch.Tensor) -> Located:
        memory = plain_memory(name, tensor)
        shape = layout.infer_global_shape(name, memory.shape)
        placement = layout.place(name, shape, self.rank)
        if placement is None or placement.local_shape != tuple(memory.shape):
            expected = "nothing of it" if placement is None else f"local shape {placement.local_shape}"
            raise InvalidInputError(
                f"tensor `{name}`: the layout gives rank {self.rank} {expected} of global shape {shape}, "
                f"found local shape {tuple(memory.shape)}",
                kind="layout-mismatch",
            )
        return Located(shape=shape, placed=placement.placed, memory=memory)


@dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter that optimizers may hold."""

    names: tuple[str, ...]  # sorted, without the key of its module; more than one when it is tied
    tensor: torch.Tensor
    located: Located


class ParamTable:
    """Parameters of all modules of a state by identity. Built once per walk, then only read."""

    def __init__(self) -> None:
        self._params: dict[int, Param] = {}

    def add(self, names: Iterable[str], tensor: torch.Tensor, located: Located) -> None:
        """Name a parameter; further names of one that is known are added."""
        known = self._params.get(id(tensor))
        merged = {*names, *(known.names if known is not None else ())}
        self._params[id(tensor)] = Param(names=tuple(sorted(merged)), tensor=tensor, located=located)

    def get(self, tensor: torch.Tensor) -> Param | None:
        """The parameter, or None when no module of the state has it."""
        found = self._params.get(id(tensor))
        return found if found is not None and found.tensor is tensor else None
