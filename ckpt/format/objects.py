"""The typed tree: non-tensor state as canonical UTF-8 JSON, and back, with every type and bit.

In: a tree of plain values (docs/reference/objects.md), or its bytes. Out: the bytes, or the tree. Pure: no I/O, no torch.
Never runs or imports anything that the bytes name; never returns a value other than the one stored.
"""

from __future__ import annotations

import collections
import json
import math
import re
import struct
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ckpt.config import OBJECT_BYTES_MAX, OBJECT_DEPTH_MAX, OBJECT_NODES_MAX
from ckpt.errors import CheckpointError, DamagedError, InvalidInputError
from ckpt.format import object_arrays as arrays

TAG = "$type"
_PLAIN_INT = range(-(2**63), 2**63)  # written as JSON numbers
_CODEC_TAG = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+")
_CODEC_TAG_MAX = 200  # characters
_FACTORIES: dict[str, type | None] = {
    "none": None,
    **{kind.__name__: kind for kind in (bool, int, float, str, bytes, list, tuple, dict, set)},
}
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}

Tree = Any  # a value of the typed tree
Node = Any  # its JSON form


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Stands in a tree for a tensor that is stored as a tensor."""

    name: str  # of the tensor in the checkpoint

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name or not _is_unicode(self.name):
            raise InvalidInputError(f"not a tensor name: {self.name!r}", kind="bad-name")


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How values of one class become trees and back."""

    type: type
    tag: str
    to_tree: Callable[[Any], Tree]
    from_tree: Callable[[Tree], Any]


_codecs_by_type: dict[type, Codec] = {}
_codecs_by_tag: dict[str, Codec] = {}
_codecs_lock = threading.Lock()


def register_codec(
    type: type,  # noqa: A002
    *,
    tag: str,
    to_tree: Callable[[Any], Tree],
    from_tree: Callable[[Tree], Any],
) -> None:
    """Let checkpoints hold values of exactly this class (not of its subclasses).

    `to_tree(value)` gives a tree of storable values; `from_tree(tree)` gives an equal value back. Only the tag is stored, so
    the program that loads must register the same tag. Call it at import time, on every rank; any thread may. A class that is
    defined again (a notebook cell run twice) replaces its codec; anything else that is taken is InvalidInputError.

    Args:
        type: the class.
        tag: what stands in the file, for ever: dotted, with your package first, as `acme.Curriculum`.
        to_tree: from a value to a tree.
        from_tree: from a tree to a value; what it raises becomes DamagedError.
    """
    if len(tag) > _CODEC_TAG_MAX or _CODEC_TAG.fullmatch(tag) is None:
        raise InvalidInputError(
            f"not a codec tag: {tag!r}; expected dotted words, as `acme.Curriculum`", kind="bad-codec"
        )
    if type in _ENCODERS or issubclass(type, (np.generic, np.dtype)):
        raise InvalidInputError(f"`{_type_name(type)}` is stored without a codec", kind="bad-codec")
    with _codecs_lock:
        old = _codecs_by_tag.get(tag)
        if old is not None and _type_name(old.type) != _type_name(type):
            raise InvalidInputError(f"tag `{tag}` belongs to `{_type_name(old.type)}` already", kind="bad-codec")
        other = _codecs_by_type.get(type)
        if other is not None and other.tag != tag:
            raise InvalidInputError(f"`{_type_name(type)}` has the tag `{other.tag}` already", kind="bad-codec")
        codec = Codec(type=type, tag=tag, to_tree=to_tree, from_tree=from_tree)
        if old is not None:
            _codecs_by_type.pop(old.type, None)
        _codecs_by_tag[tag] = codec
        _codecs_by_type[type] = codec


def encode(tree: Tree, *, name: str) -> bytes:
    """The tree as bytes, the same bytes for the same tree. `name` is the state key, for messages.

    Raises InvalidInputError (`not-storable`) that names the key path and type of a value that does not fit.
    """
    walk = _Walk()
    try:
        text = json.dumps(walk.encode(tree, 0), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except _FaultError as fault:
        raise fault.as_error(InvalidInputError, name, "cannot be stored") from fault.__cause__
    except RecursionError:
        raise InvalidInputError(
            f"`{name}` is nested too deep for the stack it is saved from", kind="too-deep"
        ) from None
    data = text.encode("utf-8")
    if len(data) > OBJECT_BYTES_MAX:
        raise InvalidInputError(
            f"`{name}` takes {len(data)} bytes; an object may have {OBJECT_BYTES_MAX}",
            kind="too-large",
            hints=("hold large data in tensors: they are sharded, objects are not",),
        )
    return data


def decode(data: bytes, *, name: str) -> Tree:
    """The tree of these bytes; ASCII spaces after the document are ignored. `name` is for messages.

    Raises DamagedError for bytes that are no tree, InvalidInputError (`unknown-codec`) for a tag that nobody registered here.
    """
    text = _document(data, name)
    try:
        node = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_int_literal,
            parse_float=_float_literal,
            parse_constant=_no_constant,
        )
        return _Walk().decode(node, 0)
    except _FaultError as fault:
        raise fault.as_error(DamagedError, name, "is damaged") from fault.__cause__
    except json.JSONDecodeError as error:
        raise DamagedError(f"object `{name}` is damaged: not JSON: {error}") from None
    except RecursionError:
        raise DamagedError(f"object `{name}` is damaged: nested deeper than {OBJECT_DEPTH_MAX}") from None


def rewrite(tree: Tree, swap: Callable[[str, Any], Any], *, name: str) -> Tree:
    """A copy of the tree with each leaf replaced by `swap(path, leaf)`.

    Leaves are all values that are not a list, tuple, dict, OrderedDict, defaultdict or deque; keys stay. `path` begins with
    `name` and reads as in error messages. The state side turns tensors into `TensorRef` with it, and back.
    """

    def visit(value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind not in _CONTAINERS:
            return swap(path, value)
        if depth >= OBJECT_DEPTH_MAX:
            raise InvalidInputError(f"`{path[:200]}` is nested deeper than {OBJECT_DEPTH_MAX}", kind="too-deep")
        if kind in _DICTS:
            pairs = ((key, visit(item, path + _step(key), depth + 1)) for key, item in value.items())
            return (
                collections.defaultdict(value.default_factory, pairs)
                if kind is collections.defaultdict
                else kind(pairs)
            )
        items = [visit(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        return collections.deque(items, value.maxlen) if kind is collections.deque else kind(items)

    return visit(tree, name, 0)


_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
_CONTAINERS = (list, tuple, *_DICTS, collections.deque)


# Walking a tree: down with the depth, up (in an error) with the path.


class _FaultError(Exception):
    """A value that does not fit, with the steps from it up to the root."""

    def __init__(self, message: str, *, kind: str | None = None, hints: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.hints = hints
        self.steps: list[str] = []

    def as_error(self, error: type[CheckpointError], name: str, verdict: str) -> CheckpointError:
        path = name + "".join(reversed(self.steps))
        if self.kind == "unknown-codec":
            error = InvalidInputError
            verdict = "cannot be read"
        return error(f"`{_short(path, 300)}` {verdict}: {self}", kind=self.kind, hints=self.hints)


@dataclass(slots=True)
class _Walk:
    """One pass over a tree. Not shared between threads."""

    num_nodes: int = 0

    def _enter(self, depth: int) -> None:
        self.num_nodes += 1
        if self.num_nodes > OBJECT_NODES_MAX:
            raise _FaultError(f"more than {OBJECT_NODES_MAX} values", kind="too-large")
        if depth > OBJECT_DEPTH_MAX:
            raise _FaultError(f"nested deeper than {OBJECT_DEPTH_MAX}, or within itself", kind="too-deep")

    def encode(self, value: Any, depth: int) -> Node:
        self._enter(depth)
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value, depth)
        try:
            if isinstance(value, np.generic):
                return {TAG: "numpy-scalar", **arrays.encode_scalar(value)}
            if isinstance(value, np.dtype):
                return {TAG: "numpy-dtype", "dtype": arrays.dtype_text(value)}
        except ValueError as error:
            _misfit(value, str(error))
        return self._encode_registered(value, depth)

    def _encode_registered(self, value: Any, depth: int) -> Node:
        codec = _codecs_by_type.get(type(value))
        if codec is None:
            _misfit(value, "has no place in a checkpoint")
        try:
            tree = codec.to_tree(value)
        except Exception as error:  # whatever the user's codec raises, with the path of the value
            raise _FaultError(f"the codec `{codec.tag}` failed: {error!r}", kind="not-storable") from error
        return {TAG: codec.tag, "value": self.encode(tree, depth + 1)}

    def encode_items(self, items: Iterable[Any], depth: int) -> list[Node]:
        out: list[Node] = []
        try:
            for item in items:
                out.append(self.encode(item, depth + 1))
        except _FaultError as fault:
            fault.steps.append(f"[{len(out)}]")
            raise
        return out

    def encode_pairs(self, items: dict[Any, Any], depth: int) -> list[list[Node]]:
        out: list[list[Node]] = []
        for key, item in items.items():
            try:
                out.append([self.encode(key, depth + 1), self.encode(item, depth + 1)])
            except _FaultError as fault:
                fault.steps.append(_step(key))
                raise
        return out

    def decode(self, node: Node, depth: int) -> Any:
        self._enter(depth)
        kind = type(node)
        if kind is list:
            return self.decode_items(node, depth)
        if kind is dict:
            return self._decode_tagged(node, depth) if TAG in node else self._decode_plain(node, depth)
        if kind is str and not _is_unicode(node):
            raise _FaultError("text holds a lone surrogate")
        return node

    def _decode_plain(self, node: dict[str, Node], depth: int) -> dict[str, Any]:
        out = {}
        for key, item in node.items():
            try:
                if not _is_unicode(key):
                    raise _FaultError("a key holds a lone surrogate")
                out[key] = self.decode(item, depth + 1)
            except _FaultError as fault:
                fault.steps.append(_step(key))
                raise
        return out

    def _decode_tagged(self, node: dict[str, Node], depth: int) -> Any:
        tag = node[TAG]
        names, decoder = _DECODERS.get(tag, (("value",), None)) if type(tag) is str else ((), None)
        if decoder is None and (type(tag) is not str or _CODEC_TAG.fullmatch(tag) is None):
            raise _FaultError(f"unknown type {_short(repr(tag), 80)}", hints=("a newer ckpt may have written it",))
        if len(node) != len(names) + 1 or any(name not in node for name in names):
            raise _FaultError(f"a `{_short(tag, 80)}` must have the fields {', '.join(names)}")
        if decoder is None:
            return self._decode_registered(tag, node["value"], depth)
        try:
            return decoder(self, *[node[name] for name in names], depth)
        except (ValueError, TypeError) as error:  # contradicting fields; unhashable keys
            if isinstance(error, CheckpointError):
                raise
            raise _FaultError(f"not a `{tag}`: {error}") from None

    def _decode_registered(self, tag: str, value: Node, depth: int) -> Any:
        codec = _codecs_by_tag.get(tag)
        if codec is None:
            raise _FaultError(
                f"nothing is registered for the type `{_short(tag, 80)}`",
                kind="unknown-codec",
                hints=(f'import the package that calls ckpt.register_codec(..., tag="{_short(tag, 80)}", ...)',),
            )
        tree = self.decode(value, depth + 1)
        try:
            return codec.from_tree(tree)
        except Exception as error:  # whatever the user's codec raises, with the path of the value
            raise _FaultError(f"the codec `{tag}` failed: {error!r}") from error

    def decode_items(self, items: Node, depth: int) -> list[Any]:
        if type(items) is not list:
            raise ValueError("items must be a list")
        out: list[Any] = []
        try:
            for item in items:
                out.append(self.decode(item, depth + 1))
        except _FaultError as fault:
            fault.steps.append(f"[{len(out)}]")
            raise
        return out

    def decode_pairs(self, items: Node, depth: int) -> dict[Any, Any]:
        if type(items) is not list or not all(type(pair) is list and len(pair) == 2 for pair in items):
            raise ValueError("items must be a list of [key, value]")
        out: dict[Any, Any] = {}
        for key_node, item in items:
            key = self.decode(key_node, depth + 1)
            try:
                out[key] = self.decode(item, depth + 1)
            except _FaultError as fault:
                fault.steps.append(_step(key))
                raise
        if len(out) != len(items):
            raise ValueError("a key stands twice")
        return out


# Leaves and containers, one pair of functions per tag.


def _encode_int(walk: _Walk, value: int, depth: int) -> Node:
    return value if value in _PLAIN_INT else {TAG: "int", "hex": hex(value)}


def _decode_int(walk: _Walk, text: Node, depth: int) -> int:
    if type(text) is not str or re.fullmatch(r"-?0x[1-9a-f][0-9a-f]*", text) is None:
        raise ValueError("not a hexadecimal integer")
    return int(text, 16)


def _encode_float(walk: _Walk, value: float, depth: int) -> Node:
    if math.isfinite(value) and (value != 0.0 or math.copysign(1.0, value) > 0.0):
        return value
    return {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _decode_float(walk: _Walk, bits: Node, depth: int) -> float:
    if type(bits) is not str or re.fullmatch(r"[0-9a-f]{16}", bits) is None:
        raise ValueError("bits must be 16 hexadecimal digits")
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


def _encode_complex(walk: _Walk, value: complex, depth: int) -> Node:
    return {TAG: "complex", "real": _encode_float(walk, value.real, 0), "imag": _encode_float(walk, value.imag, 0)}


def _decode_complex(walk: _Walk, real: Node, imag: Node, depth: int) -> complex:
    parts = walk.decode_items([real, imag], depth)
    if type(parts[0]) is not float or type(parts[1]) is not float:
        raise ValueError("real and imag must be floats")
    return complex(*parts)


def _encode_str(walk: _Walk, value: str, depth: int) -> Node:
    if _is_unicode(value):
        return value
    return {TAG: "str", "base64": arrays.bytes_text(value.encode("utf-8", "surrogatepass"))}


def _encode_dict(walk: _Walk, value: dict[Any, Any], depth: int) -> Node:
    if TAG in value or not all(type(key) is str and _is_unicode(key) for key in value):
        return {TAG: "dict", "items": walk.encode_pairs(value, depth)}
    out = {}
    for key, item in value.items():
        try:
            out[key] = walk.encode(item, depth + 1)
        except _FaultError as fault:
            fault.steps.append(_step(key))
            raise
    return out


def _encode_set(walk: _Walk, value: set[Any] | frozenset[Any], depth: int) -> Node:
    nodes = [walk.encode(item, depth + 1) for item in value]
    nodes.sort(key=lambda node: json.dumps(node, separators=(",", ":")))  # a set has no order: by ASCII text
    return {TAG: type(value).__name__, "items": nodes}


def _decode_set(walk: _Walk, items: Node, depth: int) -> set[Any]:
    out = set(walk.decode_items(items, depth))
    if len(out) != len(items):
        raise ValueError("an element stands twice")
    return out


def _encode_defaultdict(walk: _Walk, value: collections.defaultdict[Any, Any], depth: int) -> Node:
    factory = value.default_factory
    if not (factory is None or isinstance(factory, type)) or factory not in _FACTORY_NAMES:
        _misfit(value, f"has the default factory {factory!r}; known are {', '.join(_FACTORIES)}")
    return {TAG: "defaultdict", "factory": _FACTORY_NAMES[factory], "items": walk.encode_pairs(value, depth)}


def _decode_defaultdict(walk: _Walk, factory: Node, items: Node, depth: int) -> collections.defaultdict[Any, Any]:
    if type(factory) is not str or factory not in _FACTORIES:
        raise ValueError("unknown default factory")
    return collections.defaultdict(_FACTORIES[factory], walk.decode_pairs(items, depth))


def _encode_deque(walk: _Walk, value: collections.deque[Any], depth: int) -> Node:
    return {TAG: "deque", "maxlen": value.maxlen, "items": walk.encode_items(value, depth)}


def _decode_deque(walk: _Walk, maxlen: Node, items: Node, depth: int) -> collections.deque[Any]:
    out = walk.decode_items(items, depth)
    if not (maxlen is None or (type(maxlen) is int and maxlen >= len(out))):
        raise ValueError("maxlen must be null or at least the number of items")
    return collections.deque(out, maxlen)


def _encode_span(walk: _Walk, value: slice | range, depth: int) -> Node:
    parts = {part: walk.encode(getattr(value, part), depth + 1) for part in ("start", "stop", "step")}
    return {TAG: type(value).__name__, **parts}


def _encode_array(walk: _Walk, value: np.ndarray[Any, Any], depth: int) -> Node:
    try:
        return {TAG: "numpy-array", **arrays.encode_array(value)}
    except ValueError as error:
        _misfit(value, str(error))


def _encode_items_as(tag: str) -> Callable[[_Walk, Any, int], Node]:
    return lambda walk, value, depth: {TAG: tag, "items": walk.encode_items(value, depth)}


def _encode_pairs_as(tag: str) -> Callable[[_Walk, Any, int], Node]:
    return lambda walk, value, depth: {TAG: tag, "items": walk.encode_pairs(value, depth)}


_ENCODERS: dict[type, Callable[[_Walk, Any, int], Node]] = {
    type(None): lambda walk, value, depth: value,
    bool: lambda walk, value, depth: value,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    str: _encode_str,
    bytes: lambda walk, value, depth: {TAG: "bytes", "base64": arrays.bytes_text(value)},
    bytearray: lambda walk, value, depth: {TAG: "bytearray", "base64": arrays.bytes_text(value)},
    list: lambda walk, value, depth: walk.encode_items(value, depth),
    tuple: _encode_items_as("tuple"),
    dict: _encode_dict,
    set: _encode_set,
    frozenset: _encode_set,
    collections.OrderedDict: _encode_pairs_as("ordered-dict"),
    collections.Counter: _encode_pairs_as("counter"),
    collections.defaultdict: _encode_defaultdict,
    collections.deque: _encode_deque,
    slice: _encode_span,
    range: _encode_span,
    np.ndarray: _encode_array,
    TensorRef: lambda walk, value, depth: {TAG: "tensor", "name": value.name},
}

# tag: its fields, and what makes the value of them
_DECODERS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "int": (("hex",), _decode_int),
    "float": (("bits",), _decode_float),
    "complex": (("real", "imag"), _decode_complex),
    "str": (("base64",), lambda walk, text, depth: arrays.bytes_from(text).decode("utf-8", "surrogatepass")),
    "bytes": (("base64",), lambda walk, text, depth: arrays.bytes_from(text)),
    "bytearray": (("base64",), lambda walk, text, depth: bytearray(arrays.bytes_from(text))),
    "tuple": (("items",), lambda walk, items, depth: tuple(walk.decode_items(items, depth))),
    "dict": (("items",), lambda walk, items, depth: walk.decode_pairs(items, depth)),
    "set": (("items",), _decode_set),
    "frozenset": (("items",), lambda walk, items, depth: frozenset(_decode_set(walk, items, depth))),
    "ordered-dict": (("items",), lambda walk, items, depth: collections.OrderedDict(walk.decode_pairs(items, depth))),
    "counter": (("items",), lambda walk, items, depth: collections.Counter(walk.decode_pairs(items, depth))),
    "defaultdict": (("factory", "items"), _decode_defaultdict),
    "deque": (("maxlen", "items"), _decode_deque),
    "slice": (("start", "stop", "step"), lambda walk, *parts: slice(*walk.decode_items(list(parts[:3]), parts[3]))),
    "range": (("start", "stop", "step"), lambda walk, *parts: range(*walk.decode_items(list(parts[:3]), parts[3]))),
    "numpy-array": (("dtype", "shape", "base64"), lambda walk, *parts: arrays.decode_array(*parts[:3])),
    "numpy-scalar": (("dtype", "base64"), lambda walk, *parts: arrays.decode_scalar(*parts[:2])),
    "numpy-dtype": (("dtype",), lambda walk, text, depth: arrays.dtype_from(text)),
    "tensor": (("name",), lambda walk, name, depth: TensorRef(name=name)),
}


# The JSON layer.


def _document(data: bytes, name: str) -> str:
    data = data.rstrip(b" ")
    if len(data) > OBJECT_BYTES_MAX:
        raise DamagedError(f"object `{name}` is damaged: {len(data)} bytes; at most {OBJECT_BYTES_MAX} are allowed")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"object `{name}` is damaged: not UTF-8 at byte {error.start}") from None


def _unique(pairs: Sequence[tuple[str, Node]]) -> dict[str, Node]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _FaultError("a key stands twice in one JSON object")
    return out


def _int_literal(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**63
    if value not in _PLAIN_INT or text == "-0":
        raise _FaultError(f"not an integer of 64 bits: {_short(text, 40)}")
    return value


def _float_literal(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _FaultError(f"not a finite number: {_short(text, 40)}")
    return value


def _no_constant(text: str) -> NoReturn:
    raise _FaultError(f"`{text}` is not JSON")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _step(key: Hashable) -> str:
    return f"/{key}" if type(key) is str else f"[{_short(repr(key), 60)}]"


def _short(text: str, num_chars: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _misfit(value: object, why: str) -> NoReturn:
    name = _type_name(type(value))
    raise _FaultError(
        f"a `{name}` {why}" if why.startswith("has ") else f"a `{name}`: {why}",
        kind="not-storable",
        hints=(
            f'teach ckpt the type: ckpt.register_codec({name}, tag="<package>.{type(value).__name__}", '
            "to_tree=..., from_tree=...)",
            "or keep plain values in the state: numbers, strings, lists, dicts, tuples, NumPy arrays, tensors",
        ),
    )
