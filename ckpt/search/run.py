"""Run a search: ask the driver, merge what it asks for, have it scored, tell it; in the end publish the best point.

In: an opened problem, a driver, evaluators, a log. Out: `Found`, and a checkpoint. A search that was killed goes on with the same
sequence of points: the driver is told again what the log holds, and must ask for the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.errors import BudgetError, CheckpointError, InvalidInputError, MismatchError
from ckpt.merge.lineage import KEY
from ckpt.merge.plan import MergePlan
from ckpt.merge.run import Merged, begin, carry_out
from ckpt.search import pareto
from ckpt.search.candidate import Candidate
from ckpt.search.driver import BUDGET_MAX, AskTell, Driver, Session, described
from ckpt.search.log import Evaluation, SearchLog
from ckpt.search.memory import Sources, nbytes_of, range_products
from ckpt.search.point import Point
from ckpt.search.problem import Problem
from ckpt.search.score import Evaluator, Objective, Score, evaluate, given, name_of
from ckpt.store.base import Store
from ckpt.store.open import open_store

REPEATS_MAX = 20  # times the budget: points that a driver asks for although they were scored
MEMORY_FRACTION = 2  # sources in memory may take half of what is free


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a search is run."""

    driver: Driver
    budget: int  # evaluations; references and hold-out scores are not counted
    seed: int = 0
    objective: Objective = None
    failures_max: int = 3  # failed evaluations in a row after which the search stops
    references: bool = True  # also score the newest source and the mean
    memory_bytes: int | None = None  # that sources may take; None: half of what is free

    def __post_init__(self) -> None:
        if not 1 <= self.budget <= BUDGET_MAX:
            raise InvalidInputError(f"`budget` must be 1 to {BUDGET_MAX} evaluations, found {self.budget}")
        if self.failures_max < 1:
            raise InvalidInputError(f"`failures_max` must be at least 1, found {self.failures_max}")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is reported after every evaluation."""

    number: int  # evaluations so far
    budget: int
    value: float  # of this one; minus infinity of a failed one
    best: float
    failure: str


Progress = Callable[[Told], None]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One line of the result."""

    name: str
    point: Point
    score: Score
    holdout: Score | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: Standing
    others: tuple[Standing, ...]  # for comparison: the newest source, the mean
    evaluations: tuple[Evaluation, ...]
    front: tuple[int, ...]  # numbers of the evaluations that no other one beats in every metric
    num_before: int  # evaluations that an earlier, killed run had done
    merged: Merged | None  # None: the best was published before, or there is no output
    step: int  # of the result
    sources: tuple[str, ...]  # in the order of a point's weights
    groups: tuple[str, ...]


class Searcher:
    """Scores points of one problem. One owner; `close` may be called twice."""

    def __init__(self, problem: Problem, scratch: str | None = None) -> None:
        self._problem = problem
        self._sources: Sources | None = None
        self._parent = scratch
        self._scratch: str | None = None

    def check_memory(self, memory_bytes: int | None) -> None:
        """BudgetError when the sources do not fit into what is allowed, or into half of what is free."""
        wanted = nbytes_of(self._problem.reference)
        allowed = memory_bytes or int(psutil.virtual_memory().available) // MEMORY_FRACTION
        if wanted > allowed:
            raise BudgetError(
                f"all sources in memory take {wanted >> 20} MiB, and may take {allowed >> 20} MiB",
                hints=("allow more `memory`, or use an evaluator that is given a checkpoint (`on_checkpoint`)",),
            )

    def load(self, memory_bytes: int | None) -> Sources:
        """Read the sources into memory, once. BudgetError when they do not fit; an error names what is not finite."""
        if self._sources is None:
            self.check_memory(memory_bytes)
            self._sources = Sources(self._problem.reference, self._problem.options)
            self._sources.merged(self._problem.reference)
        return self._sources

    def score(self, evaluator: Evaluator, point: Point, number: int) -> Score:
        """The score of a point."""
        with self.candidate(evaluator, point, number) as candidate:
            return candidate if isinstance(candidate, Score) else evaluate(evaluator, candidate)

    @contextlib.contextmanager
    def candidate(self, evaluator: Evaluator, point: Point, number: int) -> Iterator[Candidate | Score]:
        """A point as its evaluator wants it; a failed score where it cannot be merged (too large for its dtype)."""
        plan = self._problem.plan_of(point)
        if given(evaluator) == "memory":
            try:
                tensors = self.load(None).merged(plan)
            except CheckpointError as error:
                if error.kind != "not-finite":
                    raise
                yield Score(failure=error.message)
                return
            yield Candidate(number=number, point=point, tensors=tensors)
            return
        folder = os.path.join(self._folder(), f"{number:06d}" if number >= 0 else f"reference{-number}")
        try:
            try:
                publish(plan, folder, self._problem.options)
            except CheckpointError as error:
                if error.kind != "not-finite":
                    raise
                yield Score(failure=error.message)
                return
            yield Candidate(number=number, point=point, where=(folder, plan.step))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def products(self, stops: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """For drivers that want products of the sources over ranges of elements."""
        return range_products(self._problem.reference, self._problem.space, stops)

    def close(self) -> None:
        """Let go of memory, and remove what is left of candidates."""
        self._sources = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _folder(self) -> str:
        if self._scratch is None:
            self._scratch = tempfile.mkdtemp(prefix="ckpt-search-", dir=self._parent)
        return self._scratch


def publish(plan: MergePlan, into: str | Store, options: Options) -> Merged:
    """Merge one point into a run."""
    store = open_store(into, options=options) if isinstance(into, str) else into
    try:
        return carry_out(begin(plan, store, options))
    finally:
        if isinstance(into, str):
            store.close()


def identity(problem: Problem, settings: Settings, evaluator: Evaluator, holdout: Evaluator | None) -> dict[str, Any]:
    """What a search is: a state that differs in any of it is that of another one."""
    objective = settings.objective
    return {
        **problem.identity(),
        "driver": described(settings.driver),
        "budget": settings.budget,
        "seed": settings.seed,
        "objective": dict(objective) if isinstance(objective, Mapping) else objective,
        "evaluator": name_of(evaluator),
        "holdout": name_of(holdout),
    }


@dataclass(kw_only=True)
class Search:
    """One run of a search. Used once."""

    problem: Problem
    settings: Settings
    evaluator: Evaluator
    holdout: Evaluator | None
    log: SearchLog | None  # None: nothing is kept
    searcher: Searcher
    progress: Progress | None = None
    done: list[Evaluation] = field(default_factory=list)
    _known: dict[str, Score] = field(default_factory=dict)
    _recorded: list[Evaluation] = field(default_factory=list)
    _best: float = -np.inf

    def run(self) -> tuple[list[Evaluation], int]:
        """All evaluations, and how many of them were recorded before."""
        if given(self.evaluator) == "memory":
            self.searcher.check_memory(self.settings.memory_bytes)
        if self.log is not None:
            self.log.begin(identity(self.problem, self.settings, self.evaluator, self.holdout))
            self._recorded = self.log.evaluations()
        if given(self.evaluator) == "memory":
            self.searcher.load(self.settings.memory_bytes)
        steps = AskTell(self.settings.driver, self._session())
        repeats = 0
        while points := steps.ask():
            scores = []
            for point in points:
                repeats += point.key in self._known
                if len(self.done) == self.settings.budget and point.key not in self._known:
                    return self.done, len(self._recorded)
                if repeats > REPEATS_MAX * self.settings.budget:
                    return self.done, len(self._recorded)
                scores.append(self._score(point))
            steps.tell(scores)
        return self.done, len(self._recorded)

    def _session(self) -> Session:
        return Session(
            space=self.problem.space,
            budget=self.settings.budget,
            rng=np.random.default_rng(self.settings.seed),
            objective=self.settings.objective,
            products=self.searcher.products,
        )

    def _score(self, point: Point) -> Score:
        """A point that was scored costs nothing."""
        if point.key not in self._known:
            number = len(self.done)
            made = self._recorded[number] if number < len(self._recorded) else self._evaluate(point, number)
            if made.point != point:
                raise MismatchError(
                    f"evaluation {number} of the search was of another point than the driver asks for now",
                    kind="changed",
                    hints=(
                        "it was recorded by another version of the driver or of NumPy: begin anew, with another output",
                    ),
                )
            self.done.append(made)
            self._known[point.key] = made.score
            self._tell(made)
        return self._known[point.key]

    def _evaluate(self, point: Point, number: int) -> Evaluation:
        start = time.perf_counter()
        score = self.searcher.score(self.evaluator, point, number)
        score.value(self.settings.objective)  # an objective that is not there stops the search before it is recorded
        made = Evaluation(number=number, point=point, score=score, seconds=time.perf_counter() - start)
        if self.log is not None:
            self.log.add(made)
        last = [*self.done, made][-self.settings.failures_max :]
        if len(last) == self.settings.failures_max and all(one.score.failure for one in last):
            raise CheckpointError(
                f"{len(last)} evaluations in a row have failed, the last one: {score.failure}",
                kind="evaluator-failed",
                hints=("mend the evaluator and search again: those that failed last are tried anew",),
            )
        return made

    def _tell(self, made: Evaluation) -> None:
        value = made.score.value(self.settings.objective)
        self._best = max(self._best, value)
        if self.progress is not None:
            self.progress(
                Told(
                    number=made.number + 1,
                    budget=self.settings.budget,
                    value=value,
                    best=self._best,
                    failure=made.score.failure,
                )
            )


def finish(search: Search, evaluations: Sequence[Evaluation], num_before: int, into: Store | None) -> Found:
    """Choose the best, publish it, and score it and the references on the hold-out. Nothing of that reaches a driver."""
    objective = search.settings.objective
    values = [one.score.value(objective) for one in evaluations]
    if not values or max(values) == -np.inf:
        raise CheckpointError("no evaluation of the search gave a score", kind="evaluator-failed")
    chosen = evaluations[int(np.argmax(values))]
    merged = None if into is None else publish_once(search.problem, chosen.point, into)
    best = Standing(
        name="best",
        point=chosen.point,
        score=chosen.score,
        holdout=_holdout(search, "best", chosen.point),
        value=max(values),
    )
    others = tuple(_references(search)) if search.settings.references else ()
    found = Found(
        best=best,
        others=others,
        evaluations=tuple(evaluations),
        front=front_of(evaluations),
        num_before=num_before,
        merged=merged,
        step=search.problem.reference.step,
        sources=search.problem.space.sources,
        groups=tuple(group.name for group in search.problem.space.groups),
    )
    if search.log is not None:
        search.log.end(plain(found))
    return found


def publish_once(problem: Problem, point: Point, into: Store) -> Merged | None:
    """Merge a point into the output; None when it is there already (this search was killed after it). AlreadyExistsError when
    something else is."""
    plan = problem.plan_of(point)
    if is_there(plan, into, problem.options):
        return None
    return publish(plan, into, problem.options)


def is_there(plan: MergePlan, into: Store, options: Options) -> bool:
    """Whether the output has this very merge. AlreadyExistsError when it has another checkpoint of the step."""
    from ckpt.commit import names
    from ckpt.engine.reader import StoredCheckpoint

    if not into.exists(names.manifest_key(plan.step)):
        return False
    record = StoredCheckpoint(into, plan.step, options).manifest.metadata.get(KEY)
    if isinstance(record, dict) and record.get("recipe") == plan.recipe.document:
        return True
    refuse_existing(into, plan.step)
    return False


def front_of(evaluations: Sequence[Evaluation]) -> tuple[int, ...]:
    """Numbers of the evaluations on the Pareto front of all metrics that every one of them has."""
    good = [one for one in evaluations if not one.score.failure]
    if not good:
        return ()
    names = sorted(set.intersection(*(set(one.score.metrics) for one in good)))
    values = np.array([[one.score.metrics[name] for name in names] for one in good])
    return tuple(good[i].number for i in pareto.front(values))


def _references(search: Search) -> Iterator[Standing]:
    space = search.problem.space
    newest = max(range(space.num_sources), key=lambda i: (-1 if space.steps[i] is None else space.steps[i], i))
    for name, point in (("newest source", space.single(newest)), ("mean", space.mean())):
        score = _logged(search, name.partition(" ")[0], search.evaluator, point)
        yield Standing(
            name=name,
            point=point,
            score=score,
            holdout=_holdout(search, name.partition(" ")[0], point),
            value=score.value(search.settings.objective),
        )


def _holdout(search: Search, name: str, point: Point) -> Score | None:
    if search.holdout is None:
        return None
    return _logged(search, f"holdout-{name}", search.holdout, point)


def _logged(search: Search, name: str, evaluator: Evaluator, point: Point) -> Score:
    """A score outside the search, from the log where it is there; a point that was searched has its score already."""
    there = None if search.log is None else search.log.reference(name)
    if there is None and evaluator is search.evaluator:
        there = next((one.score for one in search.done if one.point == point), None)
    if there is not None:
        return there
    score = search.searcher.score(evaluator, point, -1)
    if search.log is not None and not score.failure:
        search.log.add_reference(name, score)
    return score


def plain(found: Found) -> dict[str, Any]:
    """As JSON."""
    return {
        "best": standing(found.best),
        "others": [standing(one) for one in found.others],
        "num_evaluations": len(found.evaluations),
        "num_failed": sum(bool(one.score.failure) for one in found.evaluations),
        "front": [
            {"number": i, **found.evaluations[i].point.plain(), "metrics": dict(found.evaluations[i].score.metrics)}
            for i in found.front
        ],
    }


def standing(one: Standing) -> dict[str, Any]:
    """As JSON. Values of single examples are left out."""
    return {
        "name": one.name,
        **one.point.plain(),
        "metrics": dict(one.score.metrics),
        "failure": one.score.failure or None,
        "holdout": None if one.holdout is None else dict(one.holdout.metrics),
        "holdout_failure": None if one.holdout is None else one.holdout.failure or None,
    }


def with_memory(settings: Settings, memory_bytes: int | None) -> Settings:
    """The same, within a recipe's memory."""
    return dataclasses.replace(settings, memory_bytes=settings.memory_bytes or memory_bytes)
