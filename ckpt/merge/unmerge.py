"""Give back one source of a `reversible` merge: `ckpt.unmerge`, and what is said of how near it comes.

In: the address of such a checkpoint. Out: the merge that puts a source together again, and bounds of its error. A source is a
weighted sum of the mean and the directions, which lie in one checkpoint: it is opened once for each of them, under other names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckpt import config
from ckpt.config import Options
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.merge.api import Url, check_workers, open_at, plan_merge, read_recipe, runner_of
from ckpt.merge.lineage import KEY as LINEAGE
from ckpt.merge.nodes import Node
from ckpt.merge.outputs import KEY, UNMERGE, output_name
from ckpt.merge.recipe import VERSION, Recipe, split_address
from ckpt.merge.run import Merged, begin, carry_out

_UNUSED = "unused"  # state key of what a source is not read for
_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, to nearest
_ROUNDING_OTHER = 2.0**-3


@dataclass(frozen=True, kw_only=True)
class Inside:
    """A source that a reversible merge can give back."""

    number: int
    label: str  # as it was merged: URL@STEP, or the folder
    step: int | None
    dtypes: tuple[str, ...]  # of its parameters
    error: float  # at most, in Frobenius norm over all parameters, relative to their length; the last cast included


def unmerge(
    merged: Url,
    source: str | int,
    into: Url,
    *,
    step: int | None = None,
    dtype: str | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write one source of a `reversible` merge into the run `into`, as `sources_inside` says how near to what it was.

    Tensors that were not combined, and objects, are those of the merge: of its newest source. One process calls.

    Args:
        merged: `URL@STEP`, or `URL` for its newest step.
        source: its step, or its label as `sources_inside` has it.
        step: of the result; that of the source when None.
        dtype: of the parameters; the one that the source had when None.

    Raises:
        InvalidInputError: `not-reversible`: a checkpoint that method `reversible` did not make; `no-source`: a source that is
            not in it, or more than one. Nothing was read but manifest and index.
        AlreadyExistsError: `into` has this step.
    """
    chosen = config.from_environment(options)
    url, at = _address(merged)
    store = open_at(chosen, storage_options)(url)
    try:
        stored = StoredCheckpoint(store, at, chosen)
        one = find_inside(stored, source)
        limits = {key: value for key, value in (("memory", memory), ("workers", workers)) if value is not None}
        recipe = recipe_for(stored, url, one, into=into, step=step, dtype=dtype, limits=limits)
    finally:
        store.close()
    return carry_out_recipe(recipe, options, storage_options, progress)


def sources_inside(stored: StoredCheckpoint) -> list[Inside]:
    """What a reversible merge can give back. InvalidInputError (`not-reversible`) for another checkpoint."""
    state = _state_of(stored)
    specs = {spec.name: spec for spec in stored.specs}
    try:
        return [
            Inside(
                number=number,
                label=one["label"],
                step=one["step"],
                dtypes=tuple(one["dtypes"]),
                error=_error(state["tensors"], specs, number, one["dtypes"]),
            )
            for number, one in enumerate(state["sources"])
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DamagedError(f"the lineage of step {stored.step} cannot be read: {error!r}") from None


def find_inside(stored: StoredCheckpoint, source: str | int) -> Inside:
    """One source by its step or its label. InvalidInputError (`no-source`) that lists all."""
    inside = sources_inside(stored)
    found = [one for one in inside if str(source) in (one.label, str(one.step))]
    if len(found) != 1:
        what = "no source" if not found else f"{len(found)} sources"
        raise InvalidInputError(
            f"step {stored.step} has {what} `{source}`",
            kind="no-source",
            hints=("it has " + ", ".join(one.label for one in inside),),
        )
    return found[0]


def recipe_for(
    stored: StoredCheckpoint,
    url: str,
    one: Inside,
    *,
    into: Url,
    step: int | None = None,
    dtype: str | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that gives a source back."""
    tensors = _state_of(stored)["tensors"]
    num = len(next(iter(tensors.values()))["sizes"])
    mean = {"run": url, "steps": stored.step}
    others = [{**mean, "rename": _only(number)} for number in range(1, num + 1)]
    names = {spec.name for spec in stored.specs}
    rest = [name for name in sorted(names) if not name.startswith(f"{KEY}/") and output_name(name, 1) not in names]
    rules: list[dict[str, Any]] = [{"match": [f"{KEY}/**", f"{_UNUSED}/**"], "policy": "drop"}]
    rules += [{"match": rest, "policy": "newest"}] if rest else []
    found = dtype or (one.dtypes[0] if len(one.dtypes) == 1 else None)
    at = step if step is not None else one.step
    return read_recipe(
        {
            "recipe": VERSION,
            "sources": [*others, mean],
            "combine": {"method": UNMERGE, "source": one.number},
            "rules": rules,
            "state": {"rng": "newest", "optimizer": "newest", "masters": "none"},
            "output": {"url": os.fspath(into), **({} if at is None else {"step": at})},
            **({} if found is None else {"numerics": {"dtype": found}}),
            **({} if not limits else {"limits": dict(limits)}),
        }
    )


def carry_out_recipe(
    recipe: Recipe,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Give back what a recipe of `recipe_for` says."""
    assert recipe.output is not None
    chosen = config.from_environment(options)
    store = open_at(chosen, storage_options)(recipe.output)
    try:
        with plan_merge(recipe, options, storage_options) as plan:
            workers = check_workers(plan, recipe.workers or 1)
            job = begin(plan, store, chosen, workers=workers)
            return carry_out(job, runner_of(workers, storage_options), progress)
    finally:
        store.close()


def _only(number: int) -> list[dict[str, str]]:
    """Rename rules: one direction has the names of parameters, and everything else is out of the way."""
    return [{"match": rf"{KEY}/{number}/(.*)", "to": r"\1"}, {"match": "(.*)", "to": rf"{_UNUSED}/\1"}]


def _error(tensors: Mapping[str, Any], specs: Mapping[str, TensorSpec], number: int, dtypes: Sequence[str]) -> float:
    """What is lost, what mean and directions lose when they are stored, and the cast at the end; over all tensors."""
    squares, lengths = [], []
    last = max(_ROUNDING.get(dtype, _ROUNDING_OTHER) for dtype in dtypes)
    for name, one in tensors.items():
        own = float(one["lengths"][number])
        parts = sum(abs(part) * size for part, size in zip(one["of"][number], one["sizes"], strict=True))
        mean = sum(one["lengths"]) / len(one["lengths"])
        stored = _ROUNDING.get(specs[name].dtype, _ROUNDING_OTHER) * (mean + parts)
        squares.append((one["lost"][number] + stored + last * own) ** 2)
        lengths.append(own * own)
    return math.sqrt(math.fsum(squares) / math.fsum(lengths)) if any(lengths) else 0.0


def _state_of(stored: StoredCheckpoint) -> Mapping[str, Any]:
    lineage = stored.manifest.metadata.get(LINEAGE)
    state = lineage.get("state") if isinstance(lineage, dict) else None
    if not isinstance(state, dict) or state.get("method") != "reversible":
        raise InvalidInputError(
            f"step {stored.step} was not made by method `reversible`: no source can be given back",
            kind="not-reversible",
        )
    return state


def _address(merged: Url) -> tuple[str, int | Literal["latest"]]:
    text = os.fspath(merged)
    url, steps = split_address(text, Node(text, "unmerge()"))
    if steps not in (None, "latest") and not isinstance(steps, int):
        raise InvalidInputError(f"`{text}` names more than one checkpoint", kind="bad-address")
    return url, steps if isinstance(steps, int) else "latest"
