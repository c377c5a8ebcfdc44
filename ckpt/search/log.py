"""The state of a search beside its output: what it is, and one small object for each evaluation.

In: records. Out: the same records, after a crash. Each object is created once and whole (`Store.create`), so a search that is
killed loses the evaluation it was at and no more, and two searches cannot write into one state. Drivers have no state of
their own on disk: they are told all scores again.

    <output>.search/step-000000001000/search.json               what is searched: sources, space, driver, seed, budget
                                      evaluations/000012.json    a point and its score
                                      references/newest.json     scores of points outside the search
                                      result.json                when it has ended
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt.errors import AlreadyExistsError, DamagedError, MismatchError, NotFoundError, VersionError
from ckpt.search.point import Point
from ckpt.search.score import Score
from ckpt.store.base import Store

VERSION = 1
SUFFIX = ".search"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A point and what was said of it."""

    number: int
    point: Point
    score: Score
    seconds: float  # that the evaluator took

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"number": self.number, **self.point.plain(), **self.score.plain(), "seconds": round(self.seconds, 3)}


class SearchLog:
    """Owner of a state. One at a time."""

    def __init__(self, store: Store, step: int) -> None:
        self._store = store
        self._folder = f"step-{step:012d}"

    @property
    def url(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def exists(self) -> bool:
        """Whether a search was begun."""
        return self._store.exists(self._key("search.json"))

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Note what is searched; whether it was there before. MismatchError (`changed`) when that was another search."""
        record = json.loads(json.dumps({"version": VERSION, **identity}))
        there = self._read("search.json")
        if there is None:
            self._create("search.json", record)
            return False
        if there.get("version") != VERSION:
            raise VersionError(f"the search in {self.url} is of version {there.get('version')}, known is {VERSION}")
        changed = [key for key in sorted({*record, *there}) if record.get(key) != there.get(key)]
        if changed:
            raise MismatchError(
                f"the search in {self.url} was begun with other {', '.join(changed)}",
                kind="changed",
                hints=("write to another output, or remove that folder to begin anew",),
            )
        return True

    def evaluations(self) -> list[Evaluation]:
        """Those that were recorded, in their order, up to the last that did not fail: what failed at the end is tried again."""
        found: list[Evaluation] = []
        for entry in self._store.list(f"{self._folder}/evaluations/"):
            record = self._read(entry.key.removeprefix(f"{self._folder}/"))
            assert record is not None
            try:
                made = Evaluation(
                    number=int(record["number"]),
                    point=Point.of(record),
                    score=Score.of(record),
                    seconds=float(record["seconds"]),
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DamagedError(f"`{entry.key}` of {self._store.url} is no evaluation: {error!r}") from None
            if made.number != len(found):
                raise DamagedError(f"evaluation {len(found)} of {self.url} is missing")
            found.append(made)
        num = len(found)
        while num and found[num - 1].score.failure:
            num -= 1
        self._store.delete([self._key(f"evaluations/{one.number:06d}.json") for one in found[num:]])
        return found[:num]

    def add(self, evaluation: Evaluation) -> None:
        """Record one durably. AlreadyExistsError when another search did so meanwhile."""
        self._create(f"evaluations/{evaluation.number:06d}.json", evaluation.plain())

    def reference(self, name: str) -> Score | None:
        """The score of a point outside the search."""
        record = self._read(f"references/{name}.json")
        return None if record is None else Score.of(record)

    def add_reference(self, name: str, score: Score) -> None:
        """Record that."""
        self._store.put(self._key(f"references/{name}.json"), _text(score.plain()))

    def end(self, result: Mapping[str, Any]) -> None:
        """Record the result."""
        self._store.put(self._key("result.json"), _text(result))

    def result(self) -> dict[str, Any] | None:
        """What was recorded at the end."""
        return self._read("result.json")

    def _create(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            self._store.create(self._key(name), _text(record))
        except AlreadyExistsError:
            raise AlreadyExistsError(
                f"`{name}` of {self.url} was written by another search meanwhile: it goes on there", kind="held"
            ) from None

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            data = self._store.read(self._key(name))
        except NotFoundError:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DamagedError(f"`{name}` of {self.url} is no JSON object")
        return found

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode()
