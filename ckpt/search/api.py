"""The Python face of searching: `ckpt.search`.

In: addresses, an evaluator, options. Out: `Found`. One process calls; no process group.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ckpt import config
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.errors import InvalidInputError
from ckpt.merge.api import SourceLike, Url, is_recipe, recipe_file
from ckpt.merge.given import Given, overlaid
from ckpt.merge.nodes import Node
from ckpt.merge.recipe import Recipe
from ckpt.search.candidate import Candidate
from ckpt.search.document import SearchRecipe, any_method, search_of, sources_alone, with_search
from ckpt.search.driver import Driver, described, driver_of
from ckpt.search.log import SUFFIX, SearchLog
from ckpt.search.memory import Float64Array, Sources
from ckpt.search.point import Group, Point, Space
from ckpt.search.problem import Over, Problem, opened_problem
from ckpt.search.run import Found, Progress, Search, Searcher, finish, publish, with_memory
from ckpt.search.score import Evaluator, Objective
from ckpt.store.open import open_store


def search(
    sources: SourceLike | Sequence[SourceLike],
    into: Url | None = None,
    *,
    evaluator: Evaluator | None = None,
    driver: str | Driver | None = None,
    budget: int | None = None,
    holdout: Evaluator | None = None,
    objective: Objective = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    layers: int | None = None,
    abs_sum_max: float | None = None,
    seed: int | None = None,
    failures_max: int | None = None,
    references: bool | None = None,
    base: SourceLike | None = None,
    step: int | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    optimizer: Literal["drop", "newest"] | None = None,
    dtype: str | None = None,
    memory: int | str | None = None,
    scratch: Url | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Found:
    """Search for the merge of checkpoints that an evaluator scores highest, and publish it as one new checkpoint in `into`.

    The same call goes on with a search that was killed: every evaluation is kept in `<into>.search`, and the driver asks for
    the same points again.

    Args:
        sources: as in `ckpt.merge`, or the path of a recipe with a key `search`, which then says everything that is not given.
        into: the run to write into; None: nothing is written, and nothing kept.
        evaluator: a callable of a `Candidate`; **higher is better**. See ckpt/search/score.py for the protocol, `Command` for a
            command, `on_checkpoint` for a function of (url, step).
        driver: `greedy`, `cma_es`, `lcsc`, `map`, `m2n2`, one that is registered, or a `Driver`; `parameters` go to it.
        budget: evaluations. A point that was scored before costs nothing; the hold-out and the references are not counted.
        holdout: scores the result and the references in the end; never the candidates.
        objective: the metric that is maximised, or a weight for each of several.
        groups: patterns by name: the tensors of a group share their weights. What no pattern matches is a group of its own.
        layers: the same by layers, in so many runs of them.
        abs_sum_max: bound of the sum of magnitudes of a group's weights.
        seed: of everything random in the driver.
        failures_max: failed evaluations in a row (an exception, a NaN) after which the search stops. A failed one counts, and
            ranks below all others.
        references: also score the newest source and the mean, in the end.
        base: with one, weights are of changes to it and are free; without, the weights of a group sum to 1.
        memory: bytes that the sources may take in memory, where the evaluator reads candidates from there.
        scratch: a local folder for candidates on disk; the system's folder for temporary files when None.
        progress: called after each evaluation.

    Raises:
        InvalidInputError: a recipe, driver, group or budget that cannot be; nothing was read or written.
        MismatchError: sources that differ; or (`changed`) `into` has the state of another search.
        AlreadyExistsError: `into` has this step, from elsewhere.
        CheckpointError: `evaluator-failed`: too many failures in a row, or no score at all. What was scored is kept.
    """
    given = Given(
        base=None if base is None else _source(base),
        rules=rules,
        state={"optimizer": optimizer},
        numerics={"dtype": dtype},
        limits={"memory": memory},
        output={"url": None if into is None else os.fspath(into), "step": step},
    )
    over = {"groups": _groups(groups), "layers": layers, "abs_sum_max": abs_sum_max}
    said = {
        "driver": None if driver is None else described(driver_of(driver, parameters)),
        "budget": budget,
        "seed": seed,
        "objective": dict(objective) if isinstance(objective, Mapping) else objective,
        "failures_max": failures_max,
        "references": references,
        "over": {key: value for key, value in over.items() if value is not None} or None,
    }
    root = with_search(overlaid(_nodes(sources), given, "search()"), said, "search()")
    return run_search(
        search_of(root),
        evaluator=evaluator,
        holdout=holdout,
        scratch=None if scratch is None else os.fspath(scratch),
        options=options,
        storage_options=storage_options,
        progress=progress,
    )


def run_search(
    wanted: SearchRecipe,
    *,
    evaluator: Evaluator | None = None,
    holdout: Evaluator | None = None,
    scratch: str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Carry out a search that was read; evaluators given here win over the commands of the recipe."""
    evaluator, holdout = evaluator or wanted.evaluator, holdout or wanted.holdout
    if evaluator is None:
        raise InvalidInputError(
            "the search has no evaluator",
            kind="no-evaluator",
            hints=(
                "give a callable as `evaluator`, or a command in the recipe: `search: {evaluator: {command: ...}}`",
            ),
        )
    chosen = config.from_environment(options)
    with contextlib.ExitStack() as stack:
        problem = stack.enter_context(_opened(wanted.recipe, wanted.over, chosen, storage_options))
        settings = with_memory(wanted.settings, wanted.recipe.memory_bytes)
        settings.driver.check(problem.space, settings.budget)
        searcher = Searcher(problem, scratch)
        stack.callback(searcher.close)
        into, log = None, None
        if wanted.recipe.output is not None:
            into = open_store(wanted.recipe.output, options=chosen, storage_options=storage_options)
            stack.callback(into.close)
            state = open_store(
                wanted.recipe.output.rstrip("/") + SUFFIX, options=chosen, storage_options=storage_options
            )
            stack.callback(state.close)
            log = SearchLog(state, problem.reference.step)
            if not log.exists():
                refuse_existing(into, problem.reference.step)
        one = Search(
            problem=problem,
            settings=settings,
            evaluator=evaluator,
            holdout=holdout,
            log=log,
            searcher=searcher,
            progress=progress,
        )
        evaluations, num_before = one.run()
        return finish(one, evaluations, num_before, into)


class OpenSpace:
    """A space whose sources are in memory, for loops of one's own: methods that follow a gradient, say. One owner thread."""

    def __init__(self, problem: Problem, sources: Sources) -> None:
        self._problem, self._sources = problem, sources

    @property
    def space(self) -> Space:
        """Its points."""
        return self._problem.space

    def state_dict(self, point: Point, key: str = "model") -> dict[str, Any]:
        """The merged tensors under a state key, as `Candidate.state_dict` has them: a copy that may be changed."""
        tensors = self._sources.merged(self._problem.plan_of(point))
        return Candidate(number=0, point=point, tensors=tensors).state_dict(key)

    def delta(self, name: str, source: int) -> Float64Array:
        """A tensor of a source, less that of the base where there is one; the name has its state key."""
        return self._sources.delta(name, source)

    def pull_back(self, gradients: Mapping[str, Any]) -> Float64Array:
        """[groups, sources]: the gradient of a loss by merge coefficients, from that by the merged tensors.

        See `Sources.pull_back` in ckpt/search/memory.py.
        """
        return self._sources.pull_back(self.space, gradients)

    def publish(self, point: Point, into: Url, *, storage_options: Mapping[str, Any] | None = None) -> int:
        """Merge a point into a run, as an ordinary checkpoint; its step. AlreadyExistsError when the run has that step."""
        options = self._problem.options
        with contextlib.closing(open_store(into, options=options, storage_options=storage_options)) as store:
            return publish(self._problem.plan_of(point), store, options).step


@contextlib.contextmanager
def open_space(
    sources: SourceLike | Sequence[SourceLike],
    *,
    base: SourceLike | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    layers: int | None = None,
    abs_sum_max: float = 0.0,
    rules: Sequence[Mapping[str, Any]] = (),
    dtype: str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[OpenSpace]:
    """Read the sources of a search into memory; let go of at the end. Arguments and errors as those of `search`.

    with open_space("runs/tasks@1..4", base="runs/base") as opened:
        point = opened.space.mean()
        state = opened.state_dict(point)
        direction = opened.pull_back(gradients)      # [groups, sources]
    """
    chosen = config.from_environment(options)
    given = Given(base=None if base is None else _source(base), rules=rules, numerics={"dtype": dtype})
    recipe = any_method(overlaid(_nodes(sources), given, "open_space()"))
    parts = tuple(Group(name=name, match=_match(match)) for name, match in (groups or {}).items())
    over = Over(groups=parts, layers=layers, abs_sum_max=abs_sum_max)
    with _opened(recipe, over, chosen, storage_options) as problem, contextlib.closing(Searcher(problem)) as searcher:
        yield OpenSpace(problem, searcher.load(None))


def _match(match: str | Sequence[str]) -> tuple[str, ...]:
    return (match,) if isinstance(match, str) else tuple(match)


def _opened(
    recipe: Recipe, over: Over, options: Options, storage_options: Mapping[str, Any] | None
) -> contextlib.AbstractContextManager[Problem]:
    open_at = functools.partial(open_store, options=options, storage_options=storage_options)
    return opened_problem(recipe, over, options, open_at)


def _groups(groups: Mapping[str, str | Sequence[str]] | None) -> list[dict[str, Any]] | None:
    if not groups:
        return None
    return [{"name": name, "match": list(_match(match))} for name, match in groups.items()]


def _nodes(sources: SourceLike | Sequence[SourceLike]) -> Node:
    """The recipe that the sources are, or make."""
    several: list[SourceLike] = [sources] if isinstance(sources, (str, os.PathLike, Mapping)) else list(sources)
    if len(several) == 1 and is_recipe(several[0]):
        assert not isinstance(several[0], Mapping)
        return recipe_file(several[0])
    return sources_alone([_source(one) for one in several], "search()")


def _source(source: SourceLike) -> Any:
    return dict(source) if isinstance(source, Mapping) else os.fspath(source)
