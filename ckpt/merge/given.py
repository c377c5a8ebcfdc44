"""Put what is given on the command line, or in a call, beside a recipe: it wins, and places of the recipe's own values stay.

In: the nodes of a recipe, or none, and what was given. Out: nodes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.merge.nodes import Node, nodes_of
from ckpt.merge.recipe import VERSION


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is given besides a recipe; what is None, empty or False changes nothing."""

    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    base: Any = None
    rules: Sequence[Mapping[str, Any]] = ()  # before those of the recipe
    selection: Mapping[str, Any] = field(default_factory=dict)  # last, every, fraction: of every run
    state: Mapping[str, Any] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    random: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    output: Mapping[str, Any] = field(default_factory=dict)
    intersect: bool = False


def recipe_nodes(sources: Sequence[Any], at: str) -> Node:
    """A recipe of sources alone."""
    return nodes_of({"recipe": VERSION, "sources": list(sources), "method": "uniform"}, at)


def overlaid(root: Node, given: Given, at: str) -> Node:
    """A recipe with what was given.

    Args:
        at: how errors call the place of what was given.
    """
    entries = dict(root.entries("a recipe"))
    _set_combine(entries, given, at)
    for key in ("state", "numerics", "random", "limits", "output"):
        said = {name: value for name, value in getattr(given, key).items() if value is not None}
        if said:
            before = entries[key].entries(f"`{key}`") if key in entries and entries[key].value is not None else {}
            entries[key] = Node({**before, **_children(said, f"{at} {key}")}, at)
    if given.base is not None:
        entries["base"] = nodes_of(given.base, f"{at} base")
    if given.rules:
        own = entries["rules"].items("`rules`") if "rules" in entries else []
        entries["rules"] = Node([*nodes_of(list(given.rules), f"{at} rules").items("`rules`"), *own], at)
    if given.intersect:
        entries["intersect"] = Node(True, at)
    if given.selection and "sources" in entries:
        selected = [_selected(one, given.selection, at) for one in entries["sources"].items("`sources`")]
        entries["sources"] = Node(selected, entries["sources"].at)
    return Node(entries, root.at)


def _set_combine(entries: dict[str, Node], given: Given, at: str) -> None:
    more = dict(given.parameters)
    if given.weights is not None:
        more["weights"] = list(given.weights)
    if given.method is None and not more:
        return
    method = entries.pop("method", None)
    combine = dict(entries["combine"].entries("`combine`")) if "combine" in entries else {}
    if method is not None:
        combine["method"] = method
    if given.method is not None:
        combine = {"method": Node(given.method, f"{at} method")}
    if given.weights is not None and combine["method"].value == "uniform":
        combine["method"] = Node("weights", f"{at} weights")
    entries["combine"] = Node({**combine, **_children(more, at)}, at)


def _children(values: Mapping[str, Any], at: str) -> dict[str, Node]:
    return {key: nodes_of(value, f"{at} {key}") for key, value in values.items()}


def _selected(source: Node, selection: Mapping[str, Any], at: str) -> Node:
    if isinstance(source.value, str):
        return Node({"run": source, **_children(selection, at)}, source.at)
    entries = source.entries("a source")
    return Node({**entries, **_children(selection, at)}, source.at) if "run" in entries else source
