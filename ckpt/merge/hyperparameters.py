"""What a source's optimizers say of each parameter: the decay of second moments, and how many steps were taken.

In: the objects of kind `optimizer` of one checkpoint. Out: numbers by parameter. The typed trees are read as the JSON that they
are (docs/reference/objects.md): a program that merges need not have the codecs of the one that trained, nor torch. Never reads
a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError

KIND = "optimizer"
BETA2 = "beta2"
STEP = "step"
_COUNTERS = ("step", "steps", "t")
_BETAS = ("betas", "adam_betas")


def hyperparameters_of(stored: StoredCheckpoint) -> dict[str, dict[str, float]]:
    """By parameter (its name without a state key): `beta2` and `step`, those that are known.

    A number that ranks or groups contradict each other in is left out: nothing can be made of it.
    """
    found: dict[str, dict[str, set[float]]] = {}
    seen: set[str] = set()
    for row in stored.objects:
        if row.kind == KIND and row.digest not in seen:
            seen.add(row.digest)
            for param, name, value in _said(_tree(stored.read_object(row), row.name)):
                found.setdefault(param, {}).setdefault(name, set()).add(value)
    return {
        param: {name: next(iter(values)) for name, values in sorted(numbers.items()) if len(values) == 1}
        for param, numbers in found.items()
    }


def _tree(payload: bytes, name: str) -> Mapping[str, Any]:
    try:
        tree = json.loads(payload)
    except ValueError:
        raise DamagedError(f"object `{name}` is damaged: it is no tree") from None
    if not isinstance(tree, dict):
        raise DamagedError(f"object `{name}` is not an optimizer: expected `groups` and `param_state`")
    return tree


def _said(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for group in _items(tree.get("groups")):
        numbers = dict(_of_group(group)) if isinstance(group, dict) else {}
        for param in _items(group.get("params")) if isinstance(group, dict) else []:
            if isinstance(param, str):
                yield from ((param, name, value) for name, value in numbers.items())
    states = tree.get("param_state")
    for param, slots in states.items() if isinstance(states, dict) else ():
        for counter in _COUNTERS:
            step = _number(slots.get(counter)) if isinstance(slots, dict) else None
            if step is not None:
                yield param, STEP, step


def _of_group(group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key in _BETAS:
        betas = [_number(item) for item in _items(group.get(key))]
        if len(betas) >= 2 and betas[1] is not None:
            yield BETA2, betas[1]
            break
    for key in _COUNTERS:
        step = _number(group.get(key))
        if step is not None:
            yield STEP, step
            break


def _items(node: Any) -> list[Any]:
    """A list, or a tuple as the tree has it."""
    if isinstance(node, dict) and node.get("$type") == "tuple":
        node = node.get("items")
    return node if isinstance(node, list) else []


def _number(node: Any) -> float | None:
    return float(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None
