"""Checkpoints that retention leaves, because somebody still needs them: an average that is kept up while training goes on.

In: small records `pins/<name>.json` in the run, each a rule. Out: which steps they pin, and why. A rule, not a list of steps: it
holds for checkpoints that come after it was written, so that no new one can be forgotten before its pin is there. `keep_last` and
the rules of `ckpt forget` keep what is pinned; steps that a user names are forgotten all the same, but `gc` leaves their data
while the pin stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ckpt.commit.receipts import read_record
from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.store.base import Store

FOLDER = "pins/"
VERSION = 1
_NAME = re.compile(r"[0-9A-Za-z._-]{1,100}")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One rule: of the steps after `after` that `every` divides, the newest `last`. What is None does not limit it."""

    name: str
    why: str  # for people: "the average in runs/gpt-average"
    last: int | None = None
    after: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInputError(f"the name of a pin is made of letters, digits, `.`, `_`, `-`, found {self.name!r}")

    def of(self, steps: Iterable[int]) -> set[int]:
        """The steps that it pins."""
        found = sorted(step for step in steps if (self.after is None or step > self.after) and step % self.every == 0)
        return set(found if self.last is None else found[max(0, len(found) - self.last) :])


def put(store: Store, pin: Pin) -> None:
    """Write a pin, or write it anew."""
    store.put(_key(pin.name), json.dumps({"version": VERSION, **asdict(pin)}).encode())


def remove(store: Store, name: str) -> None:
    """Take a pin away. Nothing when there is none."""
    store.delete([_key(name)])


def read(store: Store) -> list[Pin]:
    """All pins of a run, by name. One that cannot be read pins everything."""
    out = []
    for entry in sorted(store.list(FOLDER), key=lambda entry: entry.key):
        name = entry.key.removeprefix(FOLDER).removesuffix(".json")
        if entry.key != _key(name) or not _NAME.fullmatch(name):
            continue  # none of ours
        try:
            out.append(_parsed(name, read_record(store.read(entry.key))))
        except NotFoundError:
            continue  # taken away meanwhile
    return out


def pinned(store: Store, steps: Iterable[int]) -> dict[int, str]:
    """Which of these steps are pinned, and by whom."""
    known = list(steps)
    return {step: f"pinned: {pin.why}" for pin in reversed(read(store)) for step in pin.of(known)}


def _parsed(name: str, record: dict[str, object]) -> Pin:
    last, after, why, every = (record.get(key) for key in ("last", "after", "why", "every"))
    sound = record.get("version") == VERSION and isinstance(why, str) and isinstance(every, int) and every > 0
    if not sound or not all(value is None or (isinstance(value, int) and value >= 0) for value in (last, after)):
        return Pin(name=name, why=f"`{_key(name)}` cannot be read")
    return Pin(
        name=name,
        why=str(why),
        last=last if isinstance(last, int) else None,
        after=after if isinstance(after, int) else None,
        every=every if isinstance(every, int) else 1,
    )


def _key(name: str) -> str:
    return f"{FOLDER}{name}.json"
