"""The tags of the typed tree: one pair of functions for each built-in type.

In: a value, or the fields of its tagged node. Out: the node, or the value. Pure. `docs/reference/objects.md` says the
same in words; a tag is never given another meaning.
"""

from __future__ import annotations

import collections
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.format import object_arrays as arrays
from ckpt.format.object_walk import TAG, Decoder, Encoder, FaultError, Node, Walk, is_unicode, misfit, step_text

PLAIN_INT = range(-(2**63), 2**63)  # written as JSON numbers
_FACTORIES: dict[str, type | None] = {
    "none": None,
    **{kind.__name__: kind for kind in (bool, int, float, str, bytes, list, tuple, dict, set)},
}
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRef:
    """Stands in a tree for a tensor that is stored as a tensor."""

    name: str  # of the tensor in the checkpoint

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name or not is_unicode(self.name):
            raise InvalidInputError(f"not a tensor name: {self.name!r}", kind="bad-name")


def _encode_int(walk: Walk, value: int, depth: int) -> Node:
    return value if value in PLAIN_INT else {TAG: "int", "hex": hex(value)}


def _decode_int(walk: Walk, text: Node, depth: int) -> int:
    if type(text) is not str or re.fullmatch(r"-?0x[1-9a-f][0-9a-f]*", text) is None:
        raise ValueError("not a hexadecimal integer")
    return int(text, 16)


def _encode_float(walk: Walk, value: float, depth: int) -> Node:
    if math.isfinite(value) and (value != 0.0 or math.copysign(1.0, value) > 0.0):
        return value
    return {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _decode_float(walk: Walk, bits: Node, depth: int) -> float:
    if type(bits) is not str or re.fullmatch(r"[0-9a-f]{16}", bits) is None:
        raise ValueError("bits must be 16 hexadecimal digits")
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


def _encode_complex(walk: Walk, value: complex, depth: int) -> Node:
    return {TAG: "complex", "real": _encode_float(walk, value.real, 0), "imag": _encode_float(walk, value.imag, 0)}


def _decode_complex(walk: Walk, real: Node, imag: Node, depth: int) -> complex:
    parts = walk.decode_items([real, imag], depth)
    if type(parts[0]) is not float or type(parts[1]) is not float:
        raise ValueError("real and imag must be floats")
    return complex(*parts)


def _encode_str(walk: Walk, value: str, depth: int) -> Node:
    if is_unicode(value):
        return value
    return {TAG: "str", "base64": arrays.bytes_text(value.encode("utf-8", "surrogatepass"))}


def _encode_dict(walk: Walk, value: dict[Any, Any], depth: int) -> Node:
    if TAG in value or not all(type(key) is str and (key.isascii() or is_unicode(key)) for key in value):
        return {TAG: "dict", "items": walk.encode_pairs(value, depth)}
    out = {}
    try:
        for key, item in value.items():
            out[key] = walk.encode(item, depth + 1)
    except FaultError as fault:
        fault.steps.append(step_text(key))
        raise
    return out


def _encode_set(walk: Walk, value: set[Any] | frozenset[Any], depth: int) -> Node:
    nodes = [walk.encode(item, depth + 1) for item in value]
    nodes.sort(key=lambda node: json.dumps(node, separators=(",", ":")))  # a set has no order: by ASCII text
    return {TAG: type(value).__name__, "items": nodes}


def _decode_set(walk: Walk, items: Node, depth: int) -> set[Any]:
    out = set(walk.decode_items(items, depth))
    if len(out) != len(items):
        raise ValueError("an element stands twice")
    return out


def _encode_defaultdict(walk: Walk, value: collections.defaultdict[Any, Any], depth: int) -> Node:
    factory = value.default_factory
    if not (factory is None or isinstance(factory, type)) or factory not in _FACTORY_NAMES:
        misfit(value, f"has the default factory {factory!r}; known are {', '.join(_FACTORIES)}")
    return {TAG: "defaultdict", "factory": _FACTORY_NAMES[factory], "items": walk.encode_pairs(value, depth)}


def _decode_defaultdict(walk: Walk, factory: Node, items: Node, depth: int) -> collections.defaultdict[Any, Any]:
    if type(factory) is not str or factory not in _FACTORIES:
        raise ValueError("unknown default factory")
    return collections.defaultdict(_FACTORIES[factory], walk.decode_pairs(items, depth))


def _encode_deque(walk: Walk, value: collections.deque[Any], depth: int) -> Node:
    return {TAG: "deque", "maxlen": value.maxlen, "items": walk.encode_items(value, depth)}


def _decode_deque(walk: Walk, maxlen: Node, items: Node, depth: int) -> collections.deque[Any]:
    out = walk.decode_items(items, depth)
    if not (maxlen is None or (type(maxlen) is int and maxlen >= len(out))):
        raise ValueError("maxlen must be null or at least the number of items")
    return collections.deque(out, maxlen)


def _encode_span(walk: Walk, value: slice | range, depth: int) -> Node:
    parts = {part: walk.encode(getattr(value, part), depth + 1) for part in ("start", "stop", "step")}
    return {TAG: type(value).__name__, **parts}


def _encode_array(walk: Walk, value: np.ndarray[Any, Any], depth: int) -> Node:
    try:
        return {TAG: "numpy-array", **arrays.encode_array(value)}
    except ValueError as error:
        misfit(value, f"cannot be held: {error}")


def _encode_items_as(tag: str) -> Encoder:
    return lambda walk, value, depth: {TAG: tag, "items": walk.encode_items(value, depth)}


def _encode_pairs_as(tag: str) -> Encoder:
    return lambda walk, value, depth: {TAG: tag, "items": walk.encode_pairs(value, depth)}


ENCODERS: Mapping[type, Encoder] = {
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
DECODERS: Mapping[str, tuple[tuple[str, ...], Decoder]] = {
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
