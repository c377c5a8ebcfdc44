"""Values of a recipe with the place where they stand: YAML text, or plain data.

In: text or data. Out: `Node` trees. Errors (`bad-recipe`) say the line, and for an unknown key the nearest known one. Never opens
a file, and never runs a YAML tag.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ckpt.config import MERGE_RECIPE_BYTES_MAX, MERGE_RECIPE_DEPTH_MAX, MERGE_RECIPE_NODES_MAX
from ckpt.errors import InvalidInputError

KIND = "bad-recipe"
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Node:
    """A value and where it stands."""

    value: dict[str, Node] | list[Node] | str | int | float | bool | None
    at: str  # "recipe.yaml line 7", or "merge() sources[0]" for data without lines

    def fail(self, message: str, *hints: str) -> InvalidInputError:
        return InvalidInputError(f"{self.at}: {message}", kind=KIND, hints=hints)

    @property
    def kind(self) -> str:
        names = {dict: "a mapping", list: "a list", type(None): "nothing"}
        return names.get(type(self.value), repr(self.value))

    def mapping(self, subject: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Node]:
        """The entries that are set (not null); an error for keys beyond `known`, naming the nearest one."""
        entries = self.entries(subject)
        for key, node in entries.items():
            if key not in known:
                raise node.fail(f"unknown key `{key}` in {subject}", nearest(key, known))
        for key in required:
            if key not in entries or entries[key].value is None:
                raise self.fail(f"{subject} has no `{key}`")
        return {key: node for key, node in entries.items() if node.value is not None}

    def entries(self, subject: str) -> dict[str, Node]:
        if not isinstance(self.value, dict):
            raise self.fail(f"{subject} must be a mapping, found {self.kind}")
        return self.value

    def items(self, subject: str) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.fail(f"{subject} must be a list, found {self.kind}")
        return self.value

    def text(self, subject: str) -> str:
        if not isinstance(self.value, str):
            raise self.fail(f"{subject} must be text, found {self.kind}")
        return self.value

    def choice(self, subject: str, known: Sequence[str]) -> str:
        if self.value not in known:
            raise self.fail(f"{subject} must be one of {', '.join(known)}, found {self.kind}")
        return str(self.value)

    def flag(self, subject: str) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail(f"{subject} must be true or false, found {self.kind}")
        return self.value

    def whole(self, subject: str, least: int = 0) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < least:
            raise self.fail(f"{subject} must be a whole number from {least} on, found {self.kind}")
        return self.value

    def number(self, subject: str) -> float:
        """A finite number; also one that YAML takes for text, such as `1e-3`."""
        value = self.value
        try:
            found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            found = None
        if found is None or found != found or found in (float("inf"), float("-inf")):
            raise self.fail(f"{subject} must be a number, found {self.kind}")
        return found

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is none of the known ones."""
    near = difflib.get_close_matches(word, known, n=3)
    if near:
        return f"did you mean {' or '.join(f'`{one}`' for one in near)}?"
    return f"known: {', '.join(known)}"


def nodes_of(data: object, at: str, depth: int = 0) -> Node:
    """Plain data as nodes; every node's place is its path."""
    if depth > MERGE_RECIPE_DEPTH_MAX:
        raise InvalidInputError(f"{at}: nested deeper than {MERGE_RECIPE_DEPTH_MAX} levels", kind=KIND)
    if isinstance(data, Mapping):
        return Node({str(key): nodes_of(value, f"{at} {key}", depth + 1) for key, value in data.items()}, at)
    if isinstance(data, (list, tuple)):
        return Node([nodes_of(value, f"{at}[{i}]", depth + 1) for i, value in enumerate(data)], at)
    if data is None or isinstance(data, (str, int, float, bool)):
        return Node(data, at)
    raise InvalidInputError(f"{at}: a value must be text, a number, a list or a mapping, found {data!r}", kind=KIND)


def read_yaml(text: str, *, source: str) -> Node:
    """The nodes of YAML (or JSON) text."""
    if len(text.encode()) > MERGE_RECIPE_BYTES_MAX:
        raise InvalidInputError(f"{source}: a recipe has at most {MERGE_RECIPE_BYTES_MAX:,} bytes", kind=KIND)
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")  # JSON is YAML but for tabs between its tokens
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it holds characters that YAML does not allow"
        raise InvalidInputError(f"{source}{line}: not YAML: {problem}", kind=KIND) from None
    except RecursionError:
        raise InvalidInputError(f"{source}: nested too deep", kind=KIND) from None
    if root is None:
        raise InvalidInputError(f"{source}: the file is empty", kind=KIND)
    return _Unfolder(source).node(root, 0)


class _Unfolder:
    """Turns composed YAML into nodes with lines, within limits. Used once."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._left = MERGE_RECIPE_NODES_MAX

    def node(self, item: yaml.Node, depth: int) -> Node:
        at = f"{self._source} line {item.start_mark.line + 1}"
        self._left -= 1
        if depth > MERGE_RECIPE_DEPTH_MAX or self._left < 0:
            raise InvalidInputError(f"{at}: nested too deep or too large", kind=KIND)
        if isinstance(item, yaml.MappingNode):
            return Node(self._entries(item, depth), at)
        if isinstance(item, yaml.SequenceNode):
            return Node([self.node(child, depth + 1) for child in item.value], at)
        return Node(_scalar(item), at)

    def _entries(self, item: yaml.MappingNode, depth: int) -> dict[str, Node]:
        out: dict[str, Node] = {}
        for key, value in item.value:
            at = f"{self._source} line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidInputError(f"{at}: a key must be text", kind=KIND)
            if key.value in out:
                raise InvalidInputError(f"{at}: key `{key.value}` twice", kind=KIND)
            # An unknown key is reported at the key, which may stand lines above its value.
            out[key.value] = Node(self.node(value, depth + 1).value, at)
        return out


def _scalar(item: yaml.Node) -> str | int | float | bool | None:
    """A scalar of one of JSON's types; anything else (a date, a tag) is its text."""
    text = str(item.value)
    try:
        if item.tag == _TAG + "null":
            return None
        if item.tag == _TAG + "bool":
            return text.lower() in ("true", "yes", "on")
        if item.tag == _TAG + "int":
            return int(text.replace("_", ""))
        if item.tag == _TAG + "float":
            return float(text.replace("_", ""))
    except ValueError:
        pass  # `0x10`, `1:30`: as written
    return text
