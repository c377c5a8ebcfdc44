"""Layout files: the documented form as YAML or JSON text.

In: text that the caller has read. Out: a `Layout`, or text. Errors say the line. Never opens a file, and never runs a
YAML tag.
"""

from __future__ import annotations

import re

import yaml

from ckpt.errors import InvalidInputError
from ckpt.layout.document import DEPTH_MAX, Node, layout_of, to_document
from ckpt.layout.layout import Layout

LAYOUT_BYTES_MAX = 16 * 1024 * 1024
UNFOLDED_NODES_MAX = 10_000  # aliases may make this many more values than the text has characters
_INTEGER = re.compile(r"[+-]?[0-9]+")
_TAG = "tag:yaml.org,2002:"


def read_layout(text: str, *, source: str = "layout") -> Layout:
    """The layout that a YAML or JSON text describes.

    Args:
        text: the content of a layout file.
        source: how errors call the file.

    Raises InvalidInputError (`bad-layout`) that names the line and, for an unknown key, the nearest known one.
    """
    if len(text) > LAYOUT_BYTES_MAX:
        raise InvalidInputError(f"{source}: a layout file has at most {LAYOUT_BYTES_MAX:,} bytes", kind="bad-layout")
    # JSON is YAML but for tabs between its tokens; inside of JSON strings there are none.
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it holds characters that YAML does not allow"
        raise InvalidInputError(f"{source}{line}: not YAML: {problem}", kind="bad-layout") from None
    except RecursionError:
        raise InvalidInputError(f"{source}: nested too deep", kind="bad-layout") from None
    if root is None:
        raise InvalidInputError(f"{source}: the file is empty", kind="bad-layout")
    return layout_of(_Unfolder(source, len(text) + UNFOLDED_NODES_MAX).node(root, 0))


class _Unfolder:
    """Turns composed YAML into nodes with lines, within limits. Used once."""

    def __init__(self, source: str, nodes_max: int) -> None:
        self._source = source
        self._left = nodes_max

    def node(self, item: yaml.Node, depth: int) -> Node:
        at = f"{self._source} line {item.start_mark.line + 1}"
        self._left -= 1
        if depth > DEPTH_MAX or self._left < 0:
            raise InvalidInputError(f"{at}: nested too deep or too large", kind="bad-layout")
        if isinstance(item, yaml.MappingNode):
            return Node(self._entries(item, depth, at), at)
        if isinstance(item, yaml.SequenceNode):
            return Node([self.node(child, depth + 1) for child in item.value], at)
        if item.tag == _TAG + "null":
            return Node(None, at)
        if item.tag == _TAG + "int" and _INTEGER.fullmatch(item.value) and len(item.value) <= 18:
            return Node(int(item.value), at)
        # As written: YAML 1.1 would make booleans of an axis named `on` or `y`.
        return Node(str(item.value), at)

    def _entries(self, item: yaml.MappingNode, depth: int, at: str) -> dict[str, Node]:
        out: dict[str, Node] = {}
        for key, value in item.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidInputError(f"{self._source} line {line}: a key must be text", kind="bad-layout")
            if key.value in out:
                raise InvalidInputError(f"{self._source} line {line}: key `{key.value}` twice", kind="bad-layout")
            node = self.node(value, depth + 1)
            # An unknown key is reported at the key, which may stand lines above its value.
            out[key.value] = Node(node.value, f"{self._source} line {line}")
        return out


def write_layout(layout: Layout) -> str:
    """The layout as YAML text that `read_layout` reads back as an equal layout."""
    return str(yaml.safe_dump(to_document(layout), sort_keys=False, default_flow_style=None, width=110))
