"""Down a tree and up again: depth, size, key paths, registered codecs.

In: tables of functions per type and per tag. Out: `Walk`, which turns values into JSON nodes and back. Pure but for the
table of registered codecs. Never looks a class up by a name that stands in a file.
"""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ckpt.config import OBJECT_DEPTH_MAX, OBJECT_NODES_MAX
from ckpt.errors import CheckpointError, DamagedError, InvalidInputError
from ckpt.format import object_arrays as arrays

TAG = "$type"
CODEC_TAG = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+")
_REGISTERED: tuple[tuple[str, ...], None] = (("value",), None)  # the fields of a tag that is not built in
CODEC_TAG_MAX = 200  # characters

Tree = Any  # a value of the typed tree
Node = Any  # its JSON form
Encoder = Callable[["Walk", Any, int], Node]  # value, depth
Decoder = Callable[..., Any]  # walk, the fields of the tag, depth


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How values of one class become trees and back."""

    type: type
    tag: str
    to_tree: Callable[[Any], Tree]
    from_tree: Callable[[Tree], Any]


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """The codecs that users registered. Any thread may use it."""

    by_type: dict[type, Codec] = field(default_factory=dict)
    by_tag: dict[str, Codec] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, codec: Codec) -> None:
        """Add a codec, or replace the one of the same class and tag; InvalidInputError when either is taken."""
        name, tag = type_name(codec.type), codec.tag
        if len(tag) > CODEC_TAG_MAX or CODEC_TAG.fullmatch(tag) is None:
            raise InvalidInputError(
                f"not a codec tag: {tag!r}; expected dotted words, as `acme.Curriculum`", kind="bad-codec"
            )
        with self._lock:
            old, other = self.by_tag.get(tag), self.by_type.get(codec.type)
            if old is not None and type_name(old.type) != name:
                raise InvalidInputError(f"tag `{tag}` belongs to `{type_name(old.type)}` already", kind="bad-codec")
            if other is not None and other.tag != tag:
                raise InvalidInputError(f"`{name}` has the tag `{other.tag}` already", kind="bad-codec")
            if old is not None:
                del self.by_type[old.type]
            self.by_tag[tag] = codec
            self.by_type[codec.type] = codec


class FaultError(Exception):
    """A value that does not fit, with the steps from it up to the root."""

    def __init__(self, message: str, *, kind: str | None = None, hints: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.hints = hints
        self.steps: list[str] = []

    def on_encode(self, name: str) -> CheckpointError:
        """The error for the caller of `encode`."""
        return InvalidInputError(f"`{self._path(name)}` cannot be stored: {self}", kind=self.kind, hints=self.hints)

    def on_decode(self, name: str) -> CheckpointError:
        """The error for the caller of `decode`."""
        if self.kind == "unknown-codec":
            return InvalidInputError(f"`{self._path(name)}` cannot be read: {self}", kind=self.kind, hints=self.hints)
        return DamagedError(f"object `{self._path(name)}` is damaged: {self}", hints=self.hints)

    def _path(self, name: str) -> str:
        return short(name + "".join(reversed(self.steps)), 300)


@dataclass(slots=True, kw_only=True)
class Walk:
    """One pass over a tree. Not shared between threads."""

    encoders: Mapping[type, Encoder]
    decoders: Mapping[str, tuple[tuple[str, ...], Decoder]]  # tag: its fields, and what makes the value of them
    codecs: Codecs
    num_nodes: int = 0

    def _enter(self, depth: int) -> None:
        self.num_nodes += 1
        if self.num_nodes > OBJECT_NODES_MAX:
            raise FaultError(f"more than {OBJECT_NODES_MAX} values", kind="too-large")
        if depth > OBJECT_DEPTH_MAX:
            raise FaultError(f"nested deeper than {OBJECT_DEPTH_MAX}, or within itself", kind="too-deep")

    def encode(self, value: Any, depth: int) -> Node:
        """The node of a value that lies `depth` containers deep."""
        self._enter(depth)
        encoder = self.encoders.get(type(value))
        if encoder is not None:
            return encoder(self, value, depth)
        try:
            if isinstance(value, np.generic):
                return {TAG: "numpy-scalar", **arrays.encode_scalar(value)}
            if isinstance(value, np.dtype):
                return {TAG: "numpy-dtype", "dtype": arrays.dtype_text(value)}
        except ValueError as error:
            misfit(value, f"cannot be held: {error}")
        return self._encode_registered(value, depth)

    def _encode_registered(self, value: Any, depth: int) -> Node:
        codec = self.codecs.by_type.get(type(value))
        if codec is None:
            misfit(value, "has no place in a checkpoint without pickle")
        try:
            tree = codec.to_tree(value)
        except Exception as error:  # whatever the user's codec raises, with the path of the value
            raise FaultError(f"the codec `{codec.tag}` failed: {error!r}", kind="not-storable") from error
        return {TAG: codec.tag, "value": self.encode(tree, depth + 1)}

    def encode_items(self, items: Iterable[Any], depth: int) -> list[Node]:
        """The nodes of the items of a container at `depth`."""
        out: list[Node] = []
        try:
            for item in items:
                out.append(self.encode(item, depth + 1))
        except FaultError as fault:
            fault.steps.append(f"[{len(out)}]")
            raise
        return out

    def encode_pairs(self, items: dict[Any, Any], depth: int) -> list[list[Node]]:
        """The [key, value] nodes of a dict at `depth`, in its order."""
        out: list[list[Node]] = []
        for key, item in items.items():
            try:
                out.append([self.encode(key, depth + 1), self.encode(item, depth + 1)])
            except FaultError as fault:
                fault.steps.append(step_text(key))
                raise
        return out

    def decode(self, node: Node, depth: int) -> Any:
        """The value of a node that lies `depth` containers deep."""
        self._enter(depth)
        kind = type(node)
        if kind is list:
            return self.decode_items(node, depth)
        if kind is dict:
            return self._decode_tagged(node, depth) if TAG in node else self._decode_plain(node, depth)
        if kind is str and not is_unicode(node):
            raise FaultError("text holds a lone surrogate")
        return node

    def _decode_plain(self, node: dict[str, Node], depth: int) -> dict[str, Any]:
        out = {}
        try:
            for key, item in node.items():
                if not (key.isascii() or is_unicode(key)):
                    raise FaultError("a key holds a lone surrogate")
                out[key] = self.decode(item, depth + 1)
        except FaultError as fault:
            fault.steps.append(step_text(key))
            raise
        return out

    def _decode_tagged(self, node: dict[str, Node], depth: int) -> Any:
        tag = node[TAG]
        names, decoder = self.decoders.get(tag, _REGISTERED) if type(tag) is str else ((), None)
        if decoder is None and (type(tag) is not str or CODEC_TAG.fullmatch(tag) is None):
            raise FaultError(f"unknown type {short(repr(tag), 80)}", hints=("a newer ckpt may have written it",))
        if len(node) != len(names) + 1 or not node.keys() >= set(names):
            raise FaultError(f"a `{short(tag, 80)}` must have the fields {', '.join(names)}")
        if decoder is None:
            return self._decode_registered(tag, node["value"], depth)
        try:
            return decoder(self, *[node[name] for name in names], depth)
        except (ValueError, TypeError) as error:  # contradicting fields; unhashable keys
            raise FaultError(f"not a `{tag}`: {error}") from None

    def _decode_registered(self, tag: str, value: Node, depth: int) -> Any:
        codec = self.codecs.by_tag.get(tag)
        if codec is None:
            raise FaultError(
                f"nothing is registered for the type `{short(tag, 80)}`",
                kind="unknown-codec",
                hints=(f'import the package that calls ckpt.register_codec(..., tag="{short(tag, 80)}", ...)',),
            )
        tree = self.decode(value, depth + 1)
        try:
            return codec.from_tree(tree)
        except Exception as error:  # whatever the user's codec raises, with the path of the value
            raise FaultError(f"the codec `{tag}` failed: {error!r}") from error

    def decode_items(self, items: Node, depth: int) -> list[Any]:
        """The values of a list of nodes."""
        if type(items) is not list:
            raise ValueError("items must be a list")
        out: list[Any] = []
        try:
            for item in items:
                out.append(self.decode(item, depth + 1))
        except FaultError as fault:
            fault.steps.append(f"[{len(out)}]")
            raise
        return out

    def decode_pairs(self, items: Node, depth: int) -> dict[Any, Any]:
        """The dict of a list of [key, value] nodes; ValueError for a key that stands twice."""
        if type(items) is not list or not all(type(pair) is list and len(pair) == 2 for pair in items):
            raise ValueError("items must be a list of [key, value]")
        out: dict[Any, Any] = {}
        for key_node, item in items:
            key = self.decode(key_node, depth + 1)
            try:
                out[key] = self.decode(item, depth + 1)
            except FaultError as fault:
                fault.steps.append(step_text(key))
                raise
        if len(out) != len(items):
            raise ValueError("a key stands twice")
        return out


def is_unicode(text: str) -> bool:
    """False when the text holds a lone surrogate, which UTF-8 has no bytes for."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def step_text(key: Hashable) -> str:
    """One step of a key path."""
    return f"/{key}" if type(key) is str else f"[{short(repr(key), 60)}]"


def short(text: str, num_chars: int) -> str:
    """The text, cut to `num_chars`, with nothing in it that a log could not take."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


def type_name(kind: type) -> str:
    """Module and name of a class."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def misfit(value: object, why: str) -> NoReturn:
    """Raise the fault of a value that cannot be stored; `why` ends the sentence that begins with its type."""
    name = type_name(type(value))
    plain = "keep plain values in the state: numbers, strings, lists, dicts, tuples, NumPy arrays of numbers, tensors"
    codec = f'teach ckpt the type: ckpt.register_codec({name}, tag="<package>.{type(value).__name__}", '
    hints: tuple[str, ...] = (codec + "to_tree=..., from_tree=...)", f"or {plain}")
    if isinstance(value, (np.ndarray, np.generic, np.dtype, collections.defaultdict)):
        hints = (plain,)
    raise FaultError(f"a value of type `{name}` {why}", kind="not-storable", hints=hints)
