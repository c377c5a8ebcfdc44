"""Plain values and objects with `state_dict()` to named tensors and typed trees, and back.

In: values of a state. Out: parts, objects, actions. Never calls `load_state_dict` before its action runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckpt.format.objects import Tree, decode, encode
from ckpt.format.spec import StoredObject
from ckpt.state.dtypes import torch_dtype
from ckpt.state.holders import Action, Saved, StoredTensors, Wanted
from ckpt.state.locate import Locator, ParamTable
from ckpt.state.rows import Rows
from ckpt.state.tensors import Part, part
from ckpt.state.trees import merge, put_tensors, take_tensors


def value_object(name: str, value: Any) -> StoredObject:
    """A plain value or what `state_dict()` gave, its tensors replaced by references. `name`: the state key."""
    return _object(name, take_tensors(value, name)[0])


def _object(name: str, tree: Tree) -> StoredObject:
    return StoredObject(name=name, kind="replicated", payload=encode(tree, name=name))


class _TreeHolder:
    """Common to both: a tree and the tensors in it."""

    def __init__(self, name: str, locator: Locator) -> None:
        self._name = name
        self._locator = locator
        self._taken: tuple[Any, Tree, dict[str, torch.Tensor]] | None = None

    @property
    def name(self) -> str:
        return self._name

    def _take(self) -> tuple[Any, Tree, dict[str, torch.Tensor]]:
        """The value, its tree and its tensors; looked at once, as a holder lives for one walk."""
        if self._taken is None:
            value = self._value()
            self._taken = (value, *take_tensors(value, self._name))
        return self._taken

    def _value(self) -> Any:
        raise NotImplementedError

    def _install(self, tree: Tree) -> None:
        raise NotImplementedError

    def save(self) -> Saved:
        """The tensors, and the tree with references in their place."""
        value, tree, tensors = self._take()
        parts = [self._part(name, tensor) for name, tensor in tensors.items()]
        if isinstance(value, torch.Tensor):
            return Saved(parts=parts)
        return Saved(parts=parts, objects=[_object(self._name, tree)])

    def load(self, stored: StoredTensors) -> Wanted:
        """Tensors in place where the value has them, else new ones; the tree once their bytes are there."""
        value, _, tensors = self._take()
        parts = [self._part(name, tensor) for name, tensor in tensors.items()]
        if isinstance(value, torch.Tensor):
            return Wanted(parts=parts)
        for rest, spec in stored.below(f"{self._name}/"):
            name = f"{self._name}/{rest}"
            if name not in tensors:
                tensors[name] = torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype))
                parts.append(self._part(name, tensors[name]))
        return Wanted(parts=parts, objects=[self._name], prepare=lambda rows: self._prepare(rows, tensors))

    def _prepare(self, rows: Rows, tensors: dict[str, torch.Tensor]) -> list[Action]:
        row = rows.chosen(self._name)
        if row is None:
            return []
        tree = put_tensors(decode(row.payload, name=self._name), tensors.get, name=self._name)
        return [lambda: self._install(tree)]

    def _part(self, name: str, tensor: torch.Tensor) -> Part:
        located = self._locator.locate(name, tensor, strict=False)
        return part(name, "tensor", located, source=f"`{self._name}`")


class PlainHolder(_TreeHolder):
    """Numbers, strings, tensors and nested containers of them. `assign` puts a new value where this one came from."""

    def __init__(self, name: str, value: Any, assign: Callable[[Any], None], locator: Locator) -> None:
        super().__init__(name, locator)
        self._plain = value
        self._assign = assign

    def add_params(self, table: ParamTable) -> None:
        """Name tensors that an optimizer may hold and no module has."""
        for name, tensor in self._take()[2].items():
            if tensor.requires_grad and table.get(tensor) is None:
                table.add((name,), tensor, self._locator.locate(name, tensor, strict=False))

    def _value(self) -> Any:
        return self._plain

    def _install(self, tree: Tree) -> None:
        merged = merge(self._plain, tree)
        if merged is not self._plain:
            self._assign(merged)


class StatefulHolder(_TreeHolder):
    """Anything with `state_dict()` and `load_state_dict()`: schedulers, scalers, a user's own classes."""

    def __init__(self, name: str, owner: Any, locator: Locator, taken: Mapping[str, Any]) -> None:
        super().__init__(name, locator)
        self._owner = owner
        self._taken_before = taken  # by key: what a `state_dict()` of this walk gave already

    def _value(self) -> Any:
        known = self._name in self._taken_before
        return self._taken_before[self._name] if known else self._owner.state_dict()

    def _install(self, tree: Tree) -> None:
        self._owner.load_state_dict(tree)
