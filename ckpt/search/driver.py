"""What a search driver is, and how one is driven: ask for points, tell their scores.

In: a space, a seed, a budget, scores. Out: points to be scored next. Pure: a driver never merges, evaluates, or looks at a clock,
and draws random numbers from its session alone; so what it asks for follows from what it was told, and a search that was killed
goes on by telling it again (ckpt/search/log.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.merge import parameters
from ckpt.merge.method import Method
from ckpt.merge.nodes import Node, nearest, nodes_of
from ckpt.search.point import Point, Space
from ckpt.search.score import Objective, Score

Float64Array = NDArray[np.float64]
Proposals = Generator[Sequence[Point], Sequence[Score], None]
Products = Callable[[Sequence[int]], Float64Array]
BUDGET_MAX = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a driver works with."""

    space: Space
    budget: int  # evaluations
    rng: np.random.Generator
    objective: Objective = None
    products: Products | None = (
        None  # ranges' ends to [ranges, sources, sources]: sums of products of the sources' elements
    )

    def value(self, score: Score) -> float:
        """What is maximised; minus infinity of a failed evaluation."""
        return score.value(self.objective)

    def values(self, scores: Sequence[Score]) -> Float64Array:
        return np.array([self.value(score) for score in scores])


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Base of all drivers. Fields of a subclass are its parameters."""

    name: ClassVar[str] = ""

    def check(self, space: Space, budget: int) -> None:
        """Refuse what it cannot search: InvalidInputError."""

    def propose(self, session: Session) -> Proposals:
        """A generator: it yields points, is sent their scores in the same order, and ends when it has no more to ask."""
        raise NotImplementedError


_drivers: dict[str, type[Driver]] = {}


def search_driver(name: str) -> Callable[[type[Driver]], type[Driver]]:
    """Register a driver, a frozen dataclass made from `Driver`, under a name."""

    def register(cls: type[Driver]) -> type[Driver]:
        there = _drivers.get(name)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidInputError(f"search driver `{name}` is already {there.__qualname__}", kind="taken")
        cls.name = name
        _drivers[name] = cls
        return cls

    return register


def known() -> dict[str, type[Driver]]:
    """All drivers by name."""
    import ckpt.search.drivers  # noqa: F401  # they register themselves

    return dict(sorted(_drivers.items()))


def make_driver(node: Node) -> Driver:
    """A driver out of its name, or of a mapping of `name` and its parameters. InvalidInputError (`bad-recipe`) with the place."""
    entries = dict(node.entries("`driver`")) if isinstance(node.value, dict) else {"name": node}
    if "name" not in entries:
        raise node.fail("`driver` has no `name`")
    name = entries["name"].text("`driver`")
    del entries["name"]
    drivers = known()
    if name not in drivers:
        raise node.fail(f"unknown search driver `{name}`", nearest(name, list(drivers)))
    given = {key: value for key, value in entries.items() if value.value is not None}
    return cast(Driver, parameters.make(cast(type[Method], drivers[name]), given, node))


def driver_of(driver: str | Driver, given: dict[str, Any]) -> Driver:
    """The same for a call of Python."""
    if isinstance(driver, Driver):
        if given:
            raise InvalidInputError(f"parameters belong to the driver itself, found {', '.join(given)} beside it")
        if not driver.name:
            search_driver(type(driver).__qualname__)(type(driver))
        return driver
    return make_driver(nodes_of({"name": driver, **given}, "search()"))


def described(driver: Driver) -> dict[str, Any]:
    """Name and parameters, as JSON."""
    fields = {field.name: getattr(driver, field.name) for field in dataclasses.fields(driver)}
    return {"name": driver.name, **{key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}}


class AskTell:
    """Drives a driver. One owner.

    steps = AskTell(driver, session)
    while points := steps.ask():
        steps.tell([score(point) for point in points])
    """

    def __init__(self, driver: Driver, session: Session) -> None:
        driver.check(session.space, session.budget)
        self._proposals = driver.propose(session)
        self._asked: Sequence[Point] | None = None
        self._started = False

    def ask(self) -> Sequence[Point]:
        """The points to be scored next; the same until they are told. Empty: the driver has ended."""
        if not self._started:
            self._started = True
            self._advance(None)
        return self._asked or ()

    def tell(self, scores: Sequence[Score]) -> None:
        """The scores of the points that were asked for, in their order."""
        if self._asked is None or len(scores) != len(self._asked):
            raise InvalidInputError(
                f"{len(scores)} scores are told, {len(self._asked or ())} were asked for", kind="wrong-number"
            )
        self._advance(scores)

    def _advance(self, scores: Sequence[Score] | None) -> None:
        try:
            asked = next(self._proposals) if scores is None else self._proposals.send(scores)
        except StopIteration:
            self._asked = None
            return
        if not asked:
            raise AssertionError("a driver asked for no points and did not end")
        self._asked = asked
