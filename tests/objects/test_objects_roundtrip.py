"""Goal: every value of the typed tree comes back with its exact type and bits, from bytes that are the same every time.

Method: hypothesis draws trees; `same` compares types and bit patterns; an independent reading with `json` alone checks
the documented form.
"""

from __future__ import annotations

import collections
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckpt.format.objects import TensorRef, decode, encode, rewrite


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits; dicts also in order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and type(a) is float:
        return struct.pack("<d", a) == struct.pack("<d", b)
    if type(a) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        factories = [getattr(x, "default_factory", None) for x in (a, b)]
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and factories[0] is factories[1] and all(same(x, y) for x, y in pairs)
    if isinstance(a, collections.deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return sorted(map(form, a)) == sorted(map(form, b))
    return bool(a == b)


def form(value: Any) -> bytes:
    return encode(value, name="x")


any_text = st.text(st.characters(exclude_categories=())) | st.sampled_from(["$type", "", "\ud800\udc00", "a\0"])
any_float = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]) | st.floats()
numpy_dtypes = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)), hnp.datetime64_dtypes(), hnp.timedelta64_dtypes(),
    hnp.byte_string_dtypes(), hnp.unicode_string_dtypes(),
)  # fmt: skip
native_dtypes = numpy_dtypes.map(lambda dtype: dtype.newbyteorder("<"))
arrays = native_dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3)))
np_scalars = native_dtypes.flatmap(lambda dtype: hnp.arrays(dtype, (1,))).map(lambda array: array[0])
hashable = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | any_float | any_text | st.binary(max_size=8)
    | st.complex_numbers() | np_scalars,
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4,
)  # fmt: skip
small = st.integers(-9, 9)
leaves = st.one_of(
    hashable,
    st.binary().map(bytearray),
    arrays,
    np_scalars,
    numpy_dtypes,
    st.slices(9),
    st.builds(range, small, small, st.integers(1, 3)),
    st.builds(lambda name: TensorRef(name=name), st.text(min_size=1)),
)
factories = st.sampled_from([None, int, float, list, dict, set, str])
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashable, max_size=3),
        st.dictionaries(any_text, inner, max_size=4),
        st.dictionaries(hashable, inner, max_size=3),
        st.dictionaries(hashable, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(hashable, st.integers(), max_size=3).map(collections.Counter),
        st.tuples(factories, st.dictionaries(hashable, inner, max_size=2)).map(
            lambda pair: collections.defaultdict(*pair)
        ),
        st.tuples(st.lists(inner, max_size=3), st.none() | st.just(3)).map(lambda pair: collections.deque(*pair)),
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(trees)
def test_every_tree_comes_back_with_types_and_bits(tree: Any) -> None:
    data = encode(tree, name="tree")
    again = decode(data + b"   ", name="tree")
    assert same(again, tree)
    assert encode(again, name="tree") == data


@pytest.mark.parametrize("bits", [0x8000000000000000, 0x7FF0000000000000, 0xFFF8DEADBEEF0001, 0x7FF0000000000001, 1])
def test_special_floats_keep_their_bits(bits: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    assert struct.pack("<d", decode(form(value), name="x")) == struct.pack("<Q", bits)


def test_plain_state_reads_as_plain_json() -> None:
    tree = {"lr": 0.1, "steps": [1, 2, 3], "name": "cosine ü", "on": True, "none": None}
    assert json.loads(form(tree)) == tree
    assert form(tree) == '{"lr":0.1,"steps":[1,2,3],"name":"cosine ü","on":true,"none":null}'.encode()


def test_documented_form_of_each_tag() -> None:
    cases: list[tuple[Any, Any]] = [
        (2**63, {"$type": "int", "hex": "0x8000000000000000"}),
        (-(2**63), -(2**63)),
        (math.inf, {"$type": "float", "bits": "7ff0000000000000"}),
        (-0.0, {"$type": "float", "bits": "8000000000000000"}),
        (complex(1, -0.0), {"$type": "complex", "real": 1.0, "imag": {"$type": "float", "bits": "8000000000000000"}}),
        ("\ud800", {"$type": "str", "base64": "7aCA"}),
        (b"\x00\xff", {"$type": "bytes", "base64": "AP8="}),
        (bytearray(b"a"), {"$type": "bytearray", "base64": "YQ=="}),
        ((1, "a"), {"$type": "tuple", "items": [1, "a"]}),
        ({2, 10, 1}, {"$type": "set", "items": [1, 10, 2]}),
        (frozenset(), {"$type": "frozenset", "items": []}),
        ({1: "a"}, {"$type": "dict", "items": [[1, "a"]]}),
        ({"$type": 1}, {"$type": "dict", "items": [["$type", 1]]}),
        (collections.OrderedDict(a=1), {"$type": "ordered-dict", "items": [["a", 1]]}),
        (collections.Counter([30]), {"$type": "counter", "items": [[30, 1]]}),
        (collections.defaultdict(list), {"$type": "defaultdict", "factory": "list", "items": []}),
        (collections.deque([1], 2), {"$type": "deque", "maxlen": 2, "items": [1]}),
        (slice(1, None), {"$type": "slice", "start": 1, "stop": None, "step": None}),
        (range(3), {"$type": "range", "start": 0, "stop": 3, "step": 1}),
        (np.array([[1, 2]], ">i2"), {"$type": "numpy-array", "dtype": "<i2", "shape": [1, 2], "base64": "AQACAA=="}),
        (np.float32(1), {"$type": "numpy-scalar", "dtype": "<f4", "base64": "AACAPw=="}),
        (np.str_("a"), {"$type": "numpy-scalar", "dtype": "str", "base64": "YQ=="}),
        (np.dtype(">f8"), {"$type": "numpy-dtype", "dtype": ">f8"}),
        (TensorRef(name="a/b"), {"$type": "tensor", "name": "a/b"}),
    ]
    assert [json.loads(form(value)) for value, _ in cases] == [expected for _, expected in cases]


def test_integers_of_any_size_come_back() -> None:
    for value in (0, -1, 2**63 - 1, -(2**63) - 1, 3**20_000, -(7**9_999)):
        assert decode(form(value), name="x") == value


def test_big_endian_and_fortran_arrays_keep_their_values() -> None:
    array = np.asfortranarray(np.arange(12, dtype=">f8").reshape(3, 4)[:, ::2])
    again = decode(form(array), name="x")
    assert np.array_equal(again, array) and again.dtype == np.dtype("<f8") and again.flags.writeable


def test_dict_order_is_kept() -> None:
    for keys in (["b", "a", "c"], [3, 1, 2]):
        assert list(decode(form(dict.fromkeys(keys)), name="x")) == keys


def test_rewrite_swaps_leaves_and_keeps_containers() -> None:
    tree = {"a": [1, (2, collections.deque([3], 5))], 7: collections.OrderedDict(x=4), "s": {5}}
    seen: list[str] = []

    def swap(path: str, leaf: Any) -> Any:
        seen.append(path)
        return leaf * 10 if type(leaf) is int else leaf

    out = rewrite(tree, swap, name="opt")
    assert same(out, {"a": [10, (20, collections.deque([30], 5))], 7: collections.OrderedDict(x=40), "s": {5}})
    assert seen == ["opt/a[0]", "opt/a[1][0]", "opt/a[1][1][0]", "opt[7]/x", "opt/s"]
