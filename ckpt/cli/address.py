"""How checkpoints are named on the command line: `URL`, `URL@STEP`, `URL@latest`, `URL@A..B`.

In: the text of an argument. Out: `Address`. Pure. Only an `@` in the last component counts, so that paths and URLs with
an `@` further left mean themselves; a slash at the end makes a folder name out of anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError, NotFoundError

_STEP = re.compile(r"[0-9]{1,12}")
_RANGE = re.compile(r"([0-9]{0,12})\.\.([0-9]{0,12})")
_NO_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*")

SYNTAX = "URL, URL@STEP, URL@latest or URL@A..B"


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Steps `first <= step <= last`; None is open."""

    first: int | None = None
    last: int | None = None

    def __contains__(self, step: int) -> bool:
        return (self.first is None or step >= self.first) and (self.last is None or step <= self.last)

    def __str__(self) -> str:
        return f"{'' if self.first is None else self.first}..{'' if self.last is None else self.last}"


@dataclass(frozen=True, kw_only=True)
class Address:
    """A run, and which of its checkpoints; `steps` is None when the argument does not say."""

    url: str
    steps: int | Literal["latest"] | StepRange | None = None

    def one(self) -> int | Literal["latest"]:
        """The step where exactly one is needed: the newest when none is named. InvalidInputError for a range."""
        if isinstance(self.steps, StepRange):
            raise InvalidInputError(
                f"one checkpoint is needed, found the range `{self.steps}`",
                kind="bad-address",
                hints=(f"write {self.url}@STEP or {self.url}@latest",),
            )
        return "latest" if self.steps is None else self.steps

    def among(self, complete: Sequence[int]) -> list[int]:
        """The steps meant, out of all complete ones, ascending. NotFoundError when none of them is there."""
        found = [step for step in sorted(complete) if self._means(step, complete)]
        if not found:
            wanted = "no checkpoint" if self.steps is None else f"no complete checkpoint `{self.steps}`"
            shown = ", ".join(str(step) for step in sorted(complete)[-20:])
            raise NotFoundError(
                f"{wanted} in {self.url}; {f'complete steps: {shown}' if shown else 'no step is complete'}",
                kind="no-checkpoint",
                hints=(f"ckpt ls {self.url}",),
            )
        return found

    def _means(self, step: int, complete: Sequence[int]) -> bool:
        if self.steps is None:
            return True
        if isinstance(self.steps, StepRange):
            return step in self.steps
        return step == (max(complete) if self.steps == "latest" else self.steps)


def parse(text: str) -> Address:
    """The address that the user wrote.

    Raises InvalidInputError (`bad-address`) for what follows the last `@` and is no step, unless a slash stands behind it.
    """
    start = text.rfind("/") + 1
    at = text.rfind("@")
    if at < start:
        return _checked(text, None, text)
    url, suffix = text[:at], text[at + 1 :]
    if suffix == "latest":
        return _checked(url, "latest", text)
    if _STEP.fullmatch(suffix):
        return _checked(url, int(suffix), text)
    match = _RANGE.fullmatch(suffix)
    if match is not None and (match[1] or match[2]):
        steps = StepRange(first=int(match[1]) if match[1] else None, last=int(match[2]) if match[2] else None)
        if steps.first is not None and steps.last is not None and steps.first > steps.last:
            raise _bad(text, f"the range `{steps}` ends before it begins", f"{url}@{steps.last}..{steps.first}")
        return _checked(url, steps, text)
    if _NO_PATH.fullmatch(text):
        return Address(url=text)  # `scheme://user@host`: what that means is the store's to say
    raise _bad(text, f"`{suffix}` is no step", f"{url}@latest, or {text}/ for a folder of that name")


def _checked(url: str, steps: int | Literal["latest"] | StepRange | None, text: str) -> Address:
    if not url:
        raise _bad(text, "the run is missing", "a path or URL first, as in runs/gpt@100")
    return Address(url=url, steps=steps)


def _bad(text: str, why: str, instead: str) -> InvalidInputError:
    return InvalidInputError(
        f"`{text}` names no checkpoint: {why}; expected {SYNTAX}", kind="bad-address", hints=(f"write {instead}",)
    )
