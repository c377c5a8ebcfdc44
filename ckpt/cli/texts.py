"""Numbers and names as text for people.

In: bytes, times, names from a checkpoint. Out: text in binary units and local time, harmless to a terminal. Pure but for the
time zone. Never used for `--json`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from ckpt.errors import InvalidInputError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)


def size(nbytes: float) -> str:
    """`1.5 GiB`; whole numbers below 1 KiB."""
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"


def parse_size(text: str) -> int:
    """Bytes of `4GiB`, `512M`, `1000000`; letters are binary units."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInputError(f"not a size: {text!r}", hints=("write it like 512MiB or 4GiB",))
    power = "BKMGT".index((match[2] or "B")[0].upper())
    return int(float(match[1]) * 1024**power)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def local_time(created: str) -> str:
    """An RFC 3339 time in the local zone; as it stands when it is none."""
    try:
        return datetime.datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return visible(created)


def utc(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC; the epoch itself for what no calendar has."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return datetime.datetime.fromtimestamp(0, datetime.UTC).isoformat(timespec="milliseconds")


def shape(lengths: Sequence[int]) -> str:
    """`[4096, 512]`."""
    return "[" + ", ".join(str(length) for length in lengths) + "]"


def visible(text: str) -> str:
    """The text with everything that could steer a terminal shown as an escape; line feeds stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def numbers(values: Sequence[int]) -> str:
    """`0-3, 7`; `-` for none."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "-"
