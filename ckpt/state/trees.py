"""Tensors out of nested values, and back in.

In: nested plain values that hold tensors. Out: typed trees with `TensorRef`s, and the tensors by name. Never changes a
value, except that `merge` fills the containers it is given.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt.config import OBJECT_DEPTH_MAX
from ckpt.errors import InvalidInputError, MismatchError
from ckpt.format.objects import TensorRef, Tree, register_codec, rewrite
from ckpt.state.dtypes import dtype_name, torch_dtype

DICTS = (dict, collections.OrderedDict, collections.defaultdict)
_LISTS = (list, tuple, collections.deque)
CONTAINERS = frozenset((*DICTS, *_LISTS))
LEAVES = frozenset((int, float, str, bool, bytes, type(None)))
PLAIN_KINDS = LEAVES | {torch.Tensor, torch.nn.Parameter, DTensor}

register_codec(torch.Size, tag="torch.Size", to_tree=list, from_tree=torch.Size)
register_codec(torch.device, tag="torch.device", to_tree=str, from_tree=torch.device)
register_codec(
    torch.dtype, tag="torch.dtype", to_tree=lambda dtype: dtype_name(dtype, tensor="<value>"), from_tree=torch_dtype
)


def take_tensors(value: Any, name: str) -> tuple[Tree, dict[str, torch.Tensor]]:
    """A copy of the value with each tensor replaced by a `TensorRef`, and the tensors by name `<name>/<path>`."""
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return TensorRef(name=name), tensors
    return _taken(value, name, 0, tensors, name), tensors


def _taken(item: Any, path: str, depth: int, tensors: dict[str, torch.Tensor], root: str) -> Any:
    """A copy of a value that is no tensor; the tensors in it are added to `tensors`."""
    kind = type(item)
    if kind not in CONTAINERS:
        return item
    if depth >= OBJECT_DEPTH_MAX:
        raise InvalidInputError(f"`{path[:200]}` is nested deeper than {OBJECT_DEPTH_MAX}", kind="too-deep")
    taken: list[Any] = []
    for key, one in item.items() if kind in DICTS else enumerate(item):
        if type(one) in LEAVES:
            taken.append(one)
        elif isinstance(one, torch.Tensor):
            below = f"{path}/{key}"
            if below in tensors:
                raise InvalidInputError(f"two values in `{root}` have the name `{below}`", kind="duplicate-name")
            tensors[below] = one
            taken.append(_ref(below))
        else:
            taken.append(_taken(one, f"{path}/{key}", depth + 1, tensors, root))
    return _refilled(item, taken)


@functools.lru_cache(maxsize=131072)
def _ref(name: str) -> TensorRef:
    return TensorRef(name=name)


def _refilled(container: Any, items: list[Any]) -> Any:
    """A container of the same kind, and with the same keys, that holds these items."""
    kind = type(container)
    if kind is list:
        return items
    if kind is tuple:
        return tuple(items)
    if kind is collections.deque:
        return collections.deque(items, container.maxlen)
    pairs = dict(zip(container, items, strict=True))
    if kind is collections.defaultdict:
        return collections.defaultdict(container.default_factory, pairs)
    return collections.OrderedDict(pairs) if kind is collections.OrderedDict else pairs


def put_tensors(tree: Tree, tensor_of: Callable[[str], torch.Tensor | None], *, name: str) -> Tree:
    """The tree with each `TensorRef` replaced by its tensor; MismatchError for one that is not there."""

    def swap(path: str, value: Any) -> Any:
        if not isinstance(value, TensorRef):
            return value
        tensor = tensor_of(value.name)
        if tensor is None:
            raise MismatchError(f"`{path}` refers to tensor `{value.name}`, which is not loaded with `{name}`")
        return tensor

    return rewrite(tree, swap, name=name)


def holds_only_plain(value: Any, is_special: Callable[[Any], bool], depth: int = 0) -> bool:
    """True when nothing in the nested value is special."""
    if depth > OBJECT_DEPTH_MAX or is_special(value):
        return depth > OBJECT_DEPTH_MAX
    if type(value) in CONTAINERS:
        items = value.values() if type(value) in DICTS else value
        if set(map(type, items)) <= PLAIN_KINDS:  # of thousands of tensors, told by their classes at once
            return True
        for item in items:
            if not (isinstance(item, torch.Tensor) or holds_only_plain(item, is_special, depth + 1)):
                return False
    return True


def merge(current: Any, stored: Any) -> Any:
    """The stored value, in the very containers and tensors of the current one as far as they fit.

    Keys that only the current value has stay. Tensors are taken as they are: their bytes were loaded in place.
    """
    if type(current) in DICTS and type(stored) in DICTS:
        for key, value in stored.items():
            current[key] = merge(current[key], value) if key in current else value
        return current
    if type(current) is list and type(stored) is list:
        if len(current) == len(stored):
            current[:] = [merge(one, other) for one, other in zip(current, stored, strict=True)]
        else:
            current[:] = stored
        return current
    return stored
