"""Goal: a line of the log is the event, and what is no event is passed over.

Method: round trips, and lines made wrong field by field.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ckpt import config
from ckpt.events import Event
from ckpt.observe.lines import decode, encode

EVENT = Event(
    operation="save",
    phase="write",
    run="runs/gpt",
    step=7,
    attempt="0123456789abcdef",
    rank=1,
    world=4,
    start_s=1_790_000_000.25,
    seconds=0.5,
    nbytes=1 << 40,
    outcome="failed",
    detail={"error": "no\nspace \u2028 left", "direct": True},
)


def test_a_line_gives_the_event_back() -> None:
    line = encode(EVENT)

    assert decode(line) == EVENT
    assert line.endswith(b"\n") and line.count(b"\n") == 1


def test_fields_that_a_later_version_adds_are_passed_over() -> None:
    document = json.loads(encode(EVENT)) | {"v": 9, "colour": "red"}

    assert decode(json.dumps(document).encode()) == EVENT


WRONG: list[dict[str, Any]] = [
    {"operation": "delete"},
    {"operation": None},
    {"operation": []},
    {"phase": 3},
    {"step": -1},
    {"step": 1.5},
    {"step": True},
    {"step": 10**400},
    {"rank": 4},
    {"world": config.WORLD_MAX + 1},
    {"seconds": -0.1},
    {"seconds": float("nan")},
    {"start_s": float("inf")},
    {"start_s": "now"},
    {"nbytes": None},
    {"outcome": "splendid"},
    {"detail": []},
    {"run": None},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_line_with_a_wrong_field_is_no_event(change: dict[str, Any]) -> None:
    assert decode(json.dumps(json.loads(encode(EVENT)) | change).encode()) is None


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"seconds":1e999}', encode(EVENT)[:-20]],
)
def test_what_is_no_line_of_ours_is_no_event(line: bytes) -> None:
    assert decode(line) is None


def test_a_long_line_loses_its_details_and_keeps_its_numbers() -> None:
    line = encode(dataclasses.replace(EVENT, detail={"error": "x" * 100_000, "more": "y" * 100_000}))
    found = decode(line)

    assert len(line) <= config.EVENT_LINE_BYTES_MAX
    assert found is not None and found.seconds == EVENT.seconds
    assert found.detail == {"error": "x" * 1000, "clipped": True}


@pytest.mark.parametrize("detail", [{"x": float("nan")}, {"x": object()}, {("a", 1): 2}], ids=["nan", "object", "key"])
def test_details_that_json_cannot_say_are_told_as_text(detail: dict[Any, Any]) -> None:
    found = decode(encode(dataclasses.replace(EVENT, detail=detail)))

    assert found is not None and found.seconds == EVENT.seconds and found.detail
