"""One event as one line of JSON, and back.

In: an `Event`, or the bytes of a line from anywhere. Out: bytes, or an `Event`. Pure. Never raises over what it reads: a line
that is no event is None. Fields are only ever added; a reader passes over those it does not know (docs/reference/events.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from ckpt import config
from ckpt.events import Event

VERSION = 1
_TEXT_CHARS_MAX = 1000  # of one text in a line that was too long
_WORDS = {"operation": ("save", "load"), "outcome": ("ok", "failed", "skipped")}
_TEXTS = ("phase", "run", "attempt")
_COUNTS = ("step", "rank", "world", "nbytes")
_COUNT_MAX = 1 << 62
_NUMBERS = ("start_s", "seconds")


def encode(event: Event) -> bytes:
    """The line, with its line feed. Never longer than `EVENT_LINE_BYTES_MAX`."""
    document = {"v": VERSION, **dataclasses.asdict(event)}
    line = _dump(document)
    if len(line) > config.EVENT_LINE_BYTES_MAX:
        error = str(event.detail.get("error", ""))[:_TEXT_CHARS_MAX]
        line = _dump({**document, "run": event.run[:_TEXT_CHARS_MAX], "detail": {"error": error, "clipped": True}})
    return line


def decode(line: bytes) -> Event | None:
    """The event of a line; None for what is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _event(found) if isinstance(found, dict) else None


def _dump(document: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(document, separators=(",", ":"), default=str, allow_nan=False)
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # a detail with NaN, odd keys or a loop: as text, rather than not at all
        document = {**document, "detail": {"text": repr(document["detail"])[:_TEXT_CHARS_MAX]}}
        text = json.dumps(document, separators=(",", ":"), default=str)
    return text.encode("ascii") + b"\n"


def _event(found: dict[str, Any]) -> Event | None:
    fields = {"nbytes": 0, "outcome": "ok", "detail": {}, **found}
    right = (
        all(fields.get(name) in words for name, words in _WORDS.items() if isinstance(fields.get(name), str))
        and all(isinstance(fields.get(name), str) for name in (*_TEXTS, *_WORDS))
        and all(type(fields.get(name)) is int and 0 <= fields[name] < _COUNT_MAX for name in _COUNTS)
        and all(type(fields.get(name)) in (int, float) and math.isfinite(fields[name]) for name in _NUMBERS)
        and isinstance(fields["detail"], dict)
    )
    if not right or fields["seconds"] < 0 or not fields["rank"] < fields["world"] <= config.WORLD_MAX:
        return None
    return Event(**{field.name: fields[field.name] for field in dataclasses.fields(Event)})
