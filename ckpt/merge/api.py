"""The Python face of merging: `ckpt.merge`, `ckpt.plan_merge`, `ckpt.resume_merge`.

In: addresses, a method, options. Out: `Merged`, or a plan. One process calls; no process group, no torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ckpt import config
from ckpt.config import MERGE_RECIPE_BYTES_MAX, MERGE_WORKERS_MAX, Options
from ckpt.engine.read import Progress
from ckpt.errors import InvalidInputError
from ckpt.merge import registry
from ckpt.merge.given import Given, overlaid, recipe_nodes
from ckpt.merge.job import Job, find_unfinished
from ckpt.merge.method import Method
from ckpt.merge.nodes import Node, read_yaml
from ckpt.merge.on_ray import OnRay
from ckpt.merge.plan import MergePlan
from ckpt.merge.processes import Processes
from ckpt.merge.recalibrate import Recalibrate, merge_and_recalibrate
from ckpt.merge.recipe import Recipe, from_document, recipe_of
from ckpt.merge.run import Here, MakeRunner, Merged, Runner, again, begin, carry_out, planned, recipe_again
from ckpt.store.base import Store
from ckpt.store.open import open_store

Url = str | os.PathLike[str]
SourceLike = Url | Mapping[str, Any]
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


def merge(
    sources: SourceLike | Sequence[SourceLike],
    into: Url | None = None,
    *,
    method: str | Callable[..., Any] | type[Method] | None = None,
    base: SourceLike | None = None,
    step: int | None = None,
    weights: Sequence[float] | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    optimizer: Literal["drop", "newest", "combine"] | None = None,
    dtype: str | None = None,
    nan: Literal["error", "propagate"] | None = None,
    seed: int | None = None,
    intersect: bool = False,
    memory: int | str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    recalibrate: Recalibrate | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Merged:
    """Merge checkpoints into the run `into`, as one new checkpoint that appears when all of it is durable.

    Args:
        sources: `URL@A..B`, `URL@STEP`, `URL`, a folder of safetensors files, or a list of these or of mappings as in a
            recipe; or the path of a recipe (`.yaml`), which then says everything that is not given here.
        method: the name of a method, a function or class as `ckpt.merge_method` takes it; `parameters` go to it. The mean when
            nothing is said.
        base: what changes are counted from, for methods that need it.
        step: of the result; the newest source's when None.
        weights: one per source, in the order in which they are named.
        rules: what becomes of tensors by name, as in a recipe; the first that matches decides.
        optimizer: what becomes of optimizer state; it is left out when nothing is said.
        dtype: of what is combined; that of the newest source when nothing is said.
        nan: what NaN and infinity in a source are: an error, when nothing is said.
        seed: of random masks, and of the random streams of the result.
        intersect: merge what all sources have in common, instead of refusing those that differ.
        memory: bytes (or `4GiB`) that all processes together may take; None: a few hundred MiB, more where a method gains by it.
        workers: processes; 1 when nothing is said. With more a method must be one that they can import.
        ray: do the work on a Ray cluster, `workers` tasks at a time: its address, `auto`, or `local` for one of this machine.
        recalibrate: called with the merged checkpoint, opened, before it can be seen; what it gives (arrays by the names of
            tensors: running statistics that it measured with the merged weights) takes the place of what was merged.
        storage_options: for all URLs that are not local.

    Raises:
        InvalidInputError: a recipe, method or selection that cannot be; nothing was read or written.
        MismatchError: sources that differ; lists every difference. Nothing was read or written.
        AlreadyExistsError: `into` has this step.
        CheckpointError: `not-finite`: an element of a source or of the result is NaN or infinite; nothing is left behind.
    """
    given = Given(
        method=None if method is None else _name_of(method),
        parameters=parameters,
        weights=weights,
        base=None if base is None else _source(base),
        rules=rules,
        state={"optimizer": optimizer},
        numerics={"dtype": dtype, "nan": nan},
        random={"seed": seed},
        limits={"memory": memory, "workers": workers},
        output={"url": None if into is None else os.fspath(into), "step": step},
        intersect=intersect,
    )
    recipe = recipe_of(overlaid(_nodes(sources), given, "merge()"))
    if recipe.output is None:
        raise InvalidInputError("say where the result goes: `into`", kind="no-output")
    chosen = config.from_environment(options)
    with _opened(recipe.output, chosen, storage_options) as store, plan_merge(recipe, options, storage_options) as made:
        num = check_workers(made, recipe.workers or 1)
        runner = runner_of(num, storage_options, ray)

        def merge_into(target: Store) -> Merged:
            return carry_out(begin(made, target, chosen, workers=num), runner, progress)

        if recalibrate is None:
            return merge_into(store)
        return merge_and_recalibrate(
            merge_into,
            recalibrate,
            url=recipe.output,
            step=made.step,
            into=store,
            options=chosen,
            open_at=open_at(chosen, storage_options),
            runner=runner,
        )


@contextmanager
def plan_merge(
    recipe: Recipe | Mapping[str, Any] | Url,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[MergePlan]:
    """The plan of a recipe (a path, plain data, or parsed), good inside the `with`. Reads indexes only."""
    chosen = config.from_environment(options)
    parsed = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    with planned(parsed, chosen, open_at(chosen, storage_options)) as made:
        yield made


def resume_merge(
    into: Url,
    *,
    step: int | None = None,
    workers: int = 1,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Go on with the merge into `into` that was killed (the one last written to, or that of `step`); the same bytes come out.

    NotFoundError (`nothing-to-resume`) when there is none; MismatchError (`changed`) when its sources are not what they were.
    """
    chosen = config.from_environment(options)
    with _opened(into, chosen, storage_options) as store:
        found = find_unfinished(store, step)
        again_of = recipe_again(found.recipe)
        with planned(again_of, chosen, open_at(chosen, storage_options), image_bytes=found.image_bytes) as made:
            job = again(found, made, store, chosen)
            return carry_out(job, runner_of(check_workers(made, workers), storage_options), progress)


def read_recipe(recipe: Mapping[str, Any] | Url) -> Recipe:
    """A recipe out of a file, or of plain data."""
    return from_document(recipe) if isinstance(recipe, Mapping) else recipe_of(recipe_file(recipe))


def recipe_file(path: Url) -> Node:
    """The nodes of a recipe's file. InvalidInputError (`bad-recipe`) when it cannot be read."""
    name = os.fspath(path)
    try:
        with Path(name).open(encoding="utf-8") as stream:
            text = stream.read(MERGE_RECIPE_BYTES_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"recipe `{name}` cannot be read: {error}", kind="bad-recipe") from error
    return read_yaml(text, source=name)


def is_recipe(source: SourceLike) -> bool:
    """Whether an address is that of a recipe: a file with the suffix of one."""
    return not isinstance(source, Mapping) and os.fspath(source).endswith(RECIPE_SUFFIXES)


def runner_of(workers: int, storage_options: Mapping[str, Any] | None, ray: str | None = None) -> MakeRunner:
    """Who does the tasks: this process, so many others, or a Ray cluster."""

    def make(job: Job, progress: Progress | None) -> Runner:
        if ray is not None:
            return OnRay(job, workers, storage_options, progress, address=ray)
        return Here(job, progress) if workers == 1 else Processes(job, workers, storage_options, progress)

    return make


def _nodes(sources: SourceLike | Sequence[SourceLike]) -> Node:
    """The recipe that the sources are, or make."""
    several: list[SourceLike] = [sources] if isinstance(sources, (str, os.PathLike, Mapping)) else list(sources)
    if len(several) == 1 and is_recipe(several[0]):
        assert not isinstance(several[0], Mapping)
        return recipe_file(several[0])
    return recipe_nodes([_source(one) for one in several], "merge()")


def _source(source: SourceLike) -> Any:
    return dict(source) if isinstance(source, Mapping) else os.fspath(source)


def _name_of(method: str | Callable[..., Any] | type[Method]) -> str:
    """The name of a method; one that is not registered is, under its own name."""
    if isinstance(method, str):
        return method
    name = str(getattr(method, "name", "") or getattr(method, "__qualname__", ""))
    if name not in registry.known():
        registry.merge_method(name)(method)
    return name


def check_workers(made: MergePlan, workers: int) -> int:
    """How many processes; refused where they could not know a method."""
    if not 1 <= workers <= MERGE_WORKERS_MAX:
        raise InvalidInputError(f"`workers` must be 1 to {MERGE_WORKERS_MAX}, found {workers}")
    odd = [b.method.name for b in made.bounds if registry.module_of(b.method.name) == "__main__"]
    if workers > 1 and odd:
        raise InvalidInputError(
            f"method `{odd[0]}` is defined in the main program, where worker processes cannot find it",
            kind="not-importable",
            hints=("move it to a module, or bring it by an entry point of the group ckpt.merge_methods",),
        )
    return workers


def open_at(options: Options, storage_options: Mapping[str, Any] | None) -> Callable[[str], Store]:
    """How sources are opened."""
    return functools.partial(open_store, options=options, storage_options=storage_options)


@contextmanager
def _opened(url: Url, options: Options, storage_options: Mapping[str, Any] | None) -> Iterator[Store]:
    store = open_store(url, options=options, storage_options=storage_options)
    try:
        yield store
    finally:
        store.close()
