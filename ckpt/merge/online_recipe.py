"""The rule of an average out of a YAML file, for `ckpt watch`.

In: nodes. Out: `OnlineAverage`. Errors say the line. Pure. The schema is in docs/reference/recipe.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ckpt.config import OnlineAverage
from ckpt.errors import InvalidInputError
from ckpt.merge.nodes import KIND, Node
from ckpt.merge.recipe import size_of

VERSION = 1
_FIELDS = tuple(field.name for field in dataclasses.fields(OnlineAverage))


def rule_from(root: Node) -> OnlineAverage:
    """The rule that a tree of nodes describes. InvalidInputError (`bad-recipe`) that names the place of the first fault."""
    entries = root.mapping("an online recipe", ("online", *_FIELDS), ("online", "into"))
    if entries.pop("online").value != VERSION:
        raise root.fail(f"online recipes of another version than {VERSION} are not known")
    values: dict[str, Any] = {name: _value(name, node) for name, node in entries.items()}
    try:
        return OnlineAverage(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{root.at}: {error.message}", kind=KIND, hints=error.hints) from None


def _value(name: str, node: Node) -> Any:
    subject = f"`{name}`"
    if name in ("into", "method", "dtype"):
        return node.text(subject)
    if name in ("half_life", "decay"):
        return node.number(subject)
    if name == "memory":
        return size_of(node)
    if name == "rules":
        return tuple(item.plain() for item in node.items(subject))
    return node.whole(subject)
