"""A pin keeps what its rule says, also of checkpoints that came after it, and one that cannot be read keeps everything."""

from __future__ import annotations

import pytest

from ckpt.commit import pins
from ckpt.commit.pins import Pin
from ckpt.commit.retention import Policy, StepRecord, decide
from ckpt.errors import InvalidInputError
from tests.commit.conftest import OpenStore

STEPS = [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, STEPS),
        ({"last": 2}, [40, 50]),
        ({"after": 20}, [30, 40, 50]),
        ({"after": 20, "last": 2}, [40, 50]),
        ({"after": 50}, []),
        ({"every": 20}, [20, 40]),
        ({"every": 20, "last": 1}, [40]),
    ],
)
def test_the_steps_of_a_rule(rule: dict[str, int], expected: list[int]) -> None:
    assert sorted(Pin(name="a", why="b", **rule).of(STEPS)) == expected


def test_pins_are_written_read_and_taken_away_on_every_store(any_open: OpenStore) -> None:
    store = any_open()
    pins.put(store, Pin(name="one", why="an average", last=1))
    pins.put(store, Pin(name="two", why="a person", after=30))
    assert pins.pinned(store, STEPS) == {40: "pinned: a person", 50: "pinned: an average"}
    pins.remove(store, "two")
    assert pins.pinned(store, [*STEPS, 60]) == {60: "pinned: an average"}
    pins.remove(store, "one")
    pins.remove(store, "one")
    assert pins.pinned(store, STEPS) == {}


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b'{"version": 2, "why": "x", "last": 1, "after": null, "every": 1}']
)
def test_one_that_cannot_be_read_pins_everything(posix_open: OpenStore, text: bytes) -> None:
    store = posix_open()
    store.put("pins/odd.json", text)
    store.put("pins/notes.txt", b"none of ours")
    assert sorted(pins.pinned(store, STEPS)) == STEPS


def test_a_policy_keeps_what_is_pinned() -> None:
    verdicts = decide([StepRecord(step=step) for step in STEPS], Policy(last=1), {20: "pinned: an average"})
    assert [(v.step, v.reason) for v in verdicts if v.keep] == [(20, "pinned: an average"), (50, "the newest")]


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="name of a pin"):
        Pin(name="../manifest", why="x")
