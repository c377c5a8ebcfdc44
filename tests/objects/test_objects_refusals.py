"""Goal: what does not fit is refused by name, and damaged or hostile bytes end in DamagedError, not in a crash.

Method: hand-made cases for each rule; hypothesis mutates valid documents; every cut of one document.
"""

from __future__ import annotations

import collections
import datetime
import enum
import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import config
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.format import object_walk, objects
from ckpt.format.objects import decode, encode, register_codec, rewrite


class Colour(enum.Enum):
    RED = 1


class Warm(enum.IntEnum):
    UP = 1


Point = collections.namedtuple("Point", "x y")


class OtherList(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("tree", "path", "type_name"),
    [
        ({"lr_lambdas": [lambda step: step]}, "scheduler/lr_lambdas[0]", "function"),
        ({"a": {1: {"b": (0, Colour.RED)}}}, "scheduler/a[1]/b[1]", "test_objects_refusals.Colour"),
        ({"at": datetime.date(2020, 1, 1)}, "scheduler/at", "datetime.date"),
        ([Warm.UP], "scheduler[0]", "test_objects_refusals.Warm"),
        (Point(1, 2), "scheduler", "test_objects_refusals.Point"),
        ([OtherList()], "scheduler[0]", "test_objects_refusals.OtherList"),
        ({"t": np.array([None])}, "scheduler/t", "numpy.ndarray"),
        ({"t": np.zeros(2, [("a", "i4")])}, "scheduler/t", "numpy.ndarray"),
        ({"t": np.longdouble(1)}, "scheduler/t", "numpy.longdouble"),
        ({"d": collections.defaultdict(lambda: 0)}, "scheduler/d", "collections.defaultdict"),
        ({(1, len): 2}, "scheduler[(1, <built-in function len>)][1]", "builtin_function_or_method"),
        ({"c": int}, "scheduler/c", "type"),
    ],
)
def test_a_value_that_does_not_fit_is_named_by_path_and_type(tree: Any, path: str, type_name: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        encode(tree, name="scheduler")
    assert caught.value.kind == "not-storable"
    assert f"`{path}`" in caught.value.message and f"{type_name}`" in caught.value.message
    assert caught.value.hints


def test_a_tree_within_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for act in (lambda: encode(loop, name="x"), lambda: rewrite(loop, lambda path, leaf: leaf, name="x")):
        with pytest.raises(InvalidInputError) as caught:
            act()
        assert caught.value.kind == "too-deep"


def test_the_depth_limit_is_the_same_for_both_ways() -> None:
    def nested(depth: int, wrap: Any) -> Any:
        tree: Any = 1
        for _ in range(depth):
            tree = wrap(tree)
        return tree

    deepest = nested(config.OBJECT_DEPTH_MAX, lambda tree: [tree])
    assert decode(encode(deepest, name="x"), name="x") == deepest
    with pytest.raises(InvalidInputError):
        encode([deepest], name="x")
    with pytest.raises(DamagedError):
        decode(b"[" + encode(deepest, name="x") + b"]", name="x")
    pairs = nested(config.OBJECT_DEPTH_MAX - 1, lambda tree: {(1,): tree})  # the most JSON levels per level
    assert decode(encode(pairs, name="x"), name="x") == pairs


def test_a_tree_that_explodes_ends_at_the_limit_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_walk, "OBJECT_NODES_MAX", 1000)
    tree: Any = 1
    for _ in range(60):
        tree = [tree, tree]
    with pytest.raises(InvalidInputError) as caught:
        encode(tree, name="x")
    assert caught.value.kind == "too-large"
    with pytest.raises(DamagedError):
        decode(json.dumps([0] * 2000).encode(), name="x")


def test_an_object_beyond_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "OBJECT_BYTES_MAX", 100)
    with pytest.raises(InvalidInputError) as caught:
        encode("a" * 99, name="x")
    assert caught.value.kind == "too-large"
    assert decode(encode("a" * 98, name="x") + b" " * 50, name="x") == "a" * 98
    with pytest.raises(DamagedError):
        decode(b'"' + b"a" * 99 + b'"', name="x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"nul",
        b"[1,]",
        b"[1] 2",
        b"\xef\xbb\xbf[1]",
        b"\xff",
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b'{"\\ud800":1}',
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"01",
        b"-0",
        b"9223372036854775808",
        b"1" * 5000,
        b'{"a":1,"a":1}',
        b'{"$type":"nonsense"}',
        b'{"$type":1}',
        b'{"$type":null}',
        b'{"$type":["tuple"]}',
        b'{"$type":"tuple"}',
        b'{"$type":"tuple","items":{}}',
        b'{"$type":"tuple","items":[],"more":1}',
        b'{"$type":"set","items":[1,1.0]}',
        b'{"$type":"set","items":[[]]}',
        b'{"$type":"dict","items":[[1,2],[1,3]]}',
        b'{"$type":"dict","items":[[[],2]]}',
        b'{"$type":"dict","items":[[1]]}',
        b'{"$type":"int","hex":"10"}',
        b'{"$type":"int","hex":"0x"}',
        b'{"$type":"float","bits":"7ff"}',
        b'{"$type":"complex","real":1,"imag":0.0}',
        b'{"$type":"bytes","base64":"YQ"}',
        b'{"$type":"bytes","base64":"YR=="}',
        b'{"$type":"bytes","base64":"Y Q="}',
        b'{"$type":"bytes","base64":7}',
        b'{"$type":"str","base64":"/w=="}',
        b'{"$type":"deque","maxlen":1,"items":[1,2]}',
        b'{"$type":"defaultdict","factory":"os.system","items":[]}',
        b'{"$type":"range","start":0,"stop":1,"step":0}',
        b'{"$type":"range","start":0.5,"stop":1,"step":1}',
        b'{"$type":"tensor","name":""}',
        b'{"$type":"tensor","name":1}',
        b'{"$type":"numpy-dtype","dtype":"O"}',
        b'{"$type":"numpy-dtype","dtype":"f4,f4"}',
        b'{"$type":"numpy-array","dtype":"|O","shape":[1],"base64":"AAAAAAAAAAA="}',
        b'{"$type":"numpy-array","dtype":"<f4","shape":[2],"base64":"AACAPw=="}',
        b'{"$type":"numpy-array","dtype":">f4","shape":[1],"base64":"AACAPw=="}',
        b'{"$type":"numpy-array","dtype":"<f4","shape":[-1],"base64":""}',
        b'{"$type":"numpy-array","dtype":"<f4","shape":[1.0],"base64":"AACAPw=="}',
        b'{"$type":"numpy-array","dtype":"<f4","shape":[0,9223372036854775807,9223372036854775807],"base64":""}',
        b'{"$type":"numpy-array","dtype":"|b1","shape":[1],"base64":"Ag=="}',
        b'{"$type":"numpy-array","dtype":"<U1","shape":[1],"base64":"/////w=="}',
        b'{"$type":"numpy-array","dtype":"|S999999999","shape":[1],"base64":""}',
        b'{"$type":"numpy-scalar","dtype":"<U1","base64":"YQAAAA=="}',
        b'{"$type":"numpy-scalar","dtype":"<f4","base64":""}',
    ],
    ids=lambda data: repr(data)[:40],
)
def test_bytes_that_are_no_tree_are_damaged(data: bytes) -> None:
    with pytest.raises(DamagedError) as caught:
        decode(data, name="scheduler")
    assert "`scheduler" in caught.value.message and len(caught.value.message) < 500


@pytest.mark.parametrize("text", ["[", '{"a":', '{"$type":"tuple","items":['])
def test_deep_nesting_is_damaged_and_not_a_recursion_error(text: str) -> None:
    for closing in ("", "1" + {"[": "]", '{"a":': "}"}.get(text, "]}") * 20_000):
        with pytest.raises(DamagedError):
            decode((text * 20_000 + closing).encode(), name="x")


def test_deep_nesting_is_damaged_in_a_thread_too() -> None:
    caught: list[BaseException] = []

    def act() -> None:
        try:
            decode(b"[" * 20_000 + b"]" * 20_000, name="x")
        except DamagedError as error:
            caught.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join(30)
    assert len(caught) == 1


def test_damage_is_named_by_path() -> None:
    with pytest.raises(DamagedError, match=r"`sched/a\[1\]/b`"):
        decode(b'{"a":[0,{"b":{"$type":"int","hex":"x"}}]}', name="sched")


VALID = encode(
    {
        "lr": 0.1, "big": 2**70, "nan": float("nan"), "t": (1, "ü", None), 5: {1, 2}, "array": np.arange(3.0),
        "when": np.datetime64("2020-01-01"), "d": collections.defaultdict(list, {"$type": [b"x"]}), "s": slice(1),
    },
    name="x",
)  # fmt: skip


def check_outcome(data: bytes) -> None:
    try:
        tree = decode(data, name="x")
    except DamagedError:
        return
    except InvalidInputError as error:
        assert error.kind == "unknown-codec"
        return
    encode(tree, name="x")  # whatever it is, it is a tree


def test_every_cut_of_a_document_is_damaged() -> None:
    for length in range(len(VALID)):
        with pytest.raises(DamagedError):
            decode(VALID[:length], name="x")


def test_every_flipped_bit_gives_a_tree_or_damaged() -> None:
    for bit in range(len(VALID) * 8):
        data = bytearray(VALID)
        data[bit // 8] ^= 1 << bit % 8
        check_outcome(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes_give_a_tree_or_damaged(data: Any) -> None:
    text = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 12)))
        text[start:stop] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"[", b"]", b"{", b'"', b"1e9", b"-", b'{"$type":', b"\\u", b",", b":"])
        )
    check_outcome(bytes(text))


def test_random_bytes_give_a_tree_or_damaged() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        check_outcome(random.bytes(int(random.integers(0, 40))))


# codecs


class Curriculum:
    def __init__(self, stage: int) -> None:
        self.stage = stage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curriculum) and other.stage == self.stage

    def __hash__(self) -> int:
        return hash(self.stage)


def _from_tree(tree: Any) -> Curriculum:
    return Curriculum(tree["stage"])


def test_a_registered_type_comes_back_also_as_a_key() -> None:
    register_codec(
        Curriculum, tag="tests.Curriculum", to_tree=lambda value: {"stage": value.stage}, from_tree=_from_tree
    )
    tree = {"a": [Curriculum(3)], Curriculum(1): 2}
    data = encode(tree, name="x")
    assert decode(data, name="x") == tree
    assert b'{"$type":"tests.Curriculum","value":{"stage":3}}' in data
    with pytest.raises(DamagedError, match=r"`x/a\[0\]`.*tests\.Curriculum.*KeyError"):
        decode(b'{"a":[{"$type":"tests.Curriculum","value":{}}]}', name="x")
    with pytest.raises(InvalidInputError, match="codec `tests.Curriculum` failed"):
        encode(Curriculum.__new__(Curriculum), name="x")


def test_an_unknown_tag_is_named_and_nothing_is_imported() -> None:
    with pytest.raises(InvalidInputError) as caught:
        decode(b'{"a":[{"$type":"os.system","value":"true"}]}', name="sched")
    assert caught.value.kind == "unknown-codec"
    assert "`os.system`" in caught.value.message and "`sched/a[0]`" in caught.value.message
    assert "register_codec" in caught.value.hints[0]


def test_a_class_defined_again_replaces_its_codec() -> None:
    def define() -> type:
        class Again:
            pass

        register_codec(Again, tag="tests.Again", to_tree=lambda value: None, from_tree=lambda tree: Again())
        return Again

    first, second = define(), define()
    assert type(decode(encode(second(), name="x"), name="x")) is second
    with pytest.raises(InvalidInputError):
        encode(first(), name="x")


@pytest.mark.parametrize(
    ("kind", "tag"),
    [
        (dict, "tests.Dict"),
        (np.float32, "tests.F"),
        (Colour, "colour"),
        (Colour, ""),
        (Colour, "a..b"),
        (Colour, "tests.Taken"),
    ],
)
def test_a_codec_that_would_be_ambiguous_is_refused(kind: type, tag: str) -> None:
    register_codec(Warm, tag="tests.Taken", to_tree=int, from_tree=Warm)
    with pytest.raises(InvalidInputError) as caught:
        register_codec(kind, tag=tag, to_tree=str, from_tree=str)
    assert caught.value.kind == "bad-codec"
    with pytest.raises(InvalidInputError):
        register_codec(Warm, tag="tests.Second", to_tree=int, from_tree=Warm)
