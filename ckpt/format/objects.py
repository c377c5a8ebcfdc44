"""The typed tree: non-tensor state as canonical UTF-8 JSON, and back, with every type and bit.

In: a tree of plain values (docs/reference/objects.md), or its bytes. Out: the bytes, or the tree. No I/O, no torch.
Never runs or imports anything that the bytes name; never returns a value other than the one stored.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from ckpt.config import OBJECT_BYTES_MAX, OBJECT_DEPTH_MAX
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.format.object_nodes import DECODERS, ENCODERS, PLAIN_INT, TensorRef
from ckpt.format.object_walk import Codec, Codecs, FaultError, Node, Tree, Walk, short, step_text, type_name

__all__ = ["TensorRef", "Tree", "decode", "encode", "register_codec", "rewrite"]

_codecs = Codecs()


def register_codec(
    type: type,  # noqa: A002
    *,
    tag: str,
    to_tree: Callable[[Any], Tree],
    from_tree: Callable[[Tree], Any],
) -> None:
    """Let checkpoints hold values of exactly this class (not of its subclasses).

    `to_tree(value)` gives a tree of storable values; `from_tree(tree)` gives an equal value back. Only the tag is
    stored, so the program that loads must register the same tag. Call it at import time, on every rank; any thread may.
    A class that is defined again (a notebook cell run twice) replaces its codec; a tag or class taken otherwise is
    InvalidInputError (`bad-codec`).

    Args:
        type: the class.
        tag: what stands in the file, for ever: dotted, with your package first, as `acme.Curriculum`.
        to_tree: from a value to a tree.
        from_tree: from a tree to a value; what it raises becomes DamagedError.
    """
    if type in ENCODERS or issubclass(type, (np.generic, np.dtype)):
        raise InvalidInputError(f"`{type_name(type)}` is stored without a codec", kind="bad-codec")
    _codecs.add(Codec(type=type, tag=tag, to_tree=to_tree, from_tree=from_tree))


def encode(tree: Tree, *, name: str) -> bytes:
    """The tree as bytes, the same bytes for the same tree. `name` is the state key, for messages.

    Raises InvalidInputError (`not-storable`) that names the key path and type of a value that does not fit.
    """
    walk = _walk()
    try:
        text = json.dumps(walk.encode(tree, 0), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except FaultError as fault:
        raise fault.on_encode(name) from fault.__cause__
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

    Raises DamagedError for bytes that are no tree, InvalidInputError (`unknown-codec`) for a tag that nobody
    registered.
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
        return _walk().decode(node, 0)
    except FaultError as fault:
        raise fault.on_decode(name) from fault.__cause__
    except json.JSONDecodeError as error:
        raise DamagedError(f"object `{name}` is damaged: not JSON: {error}") from None
    except RecursionError:
        raise DamagedError(f"object `{name}` is damaged: nested deeper than {OBJECT_DEPTH_MAX}") from None


def rewrite(tree: Tree, swap: Callable[[str, Any], Any], *, name: str) -> Tree:
    """A copy of the tree with each leaf replaced by `swap(path, leaf)`.

    Leaves are all values that are not a list, tuple, dict, OrderedDict, defaultdict or deque; keys stay. `path` begins
    with `name` and reads as in error messages. The state side turns tensors into `TensorRef` with it, and back.
    """

    def visit(value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind not in _CONTAINERS:
            return swap(path, value)
        if depth >= OBJECT_DEPTH_MAX:
            raise InvalidInputError(f"`{path[:200]}` is nested deeper than {OBJECT_DEPTH_MAX}", kind="too-deep")
        if kind in _DICTS:
            pairs = {key: visit(item, path + step_text(key), depth + 1) for key, item in value.items()}
            if kind is collections.defaultdict:
                return collections.defaultdict(value.default_factory, pairs)
            return collections.OrderedDict(pairs) if kind is collections.OrderedDict else pairs
        items = [visit(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        if kind is collections.deque:
            return collections.deque(items, value.maxlen)
        return tuple(items) if kind is tuple else items

    return visit(tree, name, 0)


_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
_CONTAINERS = (list, tuple, *_DICTS, collections.deque)


def _walk() -> Walk:
    return Walk(encoders=ENCODERS, decoders=DECODERS, codecs=_codecs)


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
        raise FaultError("a key stands twice in one JSON object")
    return out


def _int_literal(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**63
    if value not in PLAIN_INT or text == "-0":
        raise FaultError(f"not an integer of 64 bits: {short(text, 40)}")
    return value


def _float_literal(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FaultError(f"not a finite number: {short(text, 40)}")
    return value


def _no_constant(text: str) -> NoReturn:
    raise FaultError(f"`{text}` is not JSON")
