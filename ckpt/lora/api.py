"""The Python face of adapters: `ckpt.lora.api.merge`.

In: addresses of adapters, a method. Out: an adapter, or a model with them folded in, as a checkpoint. One process calls; no
process group, no torch, no peft.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from ckpt import config
from ckpt.commit.complete import PROGRAM
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.convert.peft import METADATA
from ckpt.convert.safetensors import DEFAULT_KEY
from ckpt.engine.read import Progress
from ckpt.errors import InvalidInputError
from ckpt.lora.adapter import open_adapter
from ckpt.lora.plan import LoraPlan, check_memory, check_weights, make_plan
from ckpt.lora.run import Factors, Folded, Outcome, check_factors
from ckpt.merge.api import Url, open_at
from ckpt.merge.given import Given, overlaid, recipe_nodes
from ckpt.merge.objects import objects_of
from ckpt.merge.publication import Saved
from ckpt.merge.recipe import Recipe, recipe_of
from ckpt.merge.result import Result, write_result
from ckpt.merge.sources import Opened, open_sources
from ckpt.store.base import Store
from ckpt.store.open import open_store

RECORD = "lora"  # of the manifest's metadata


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge of adapters did."""

    step: int
    attempt: str
    method: str
    modules: tuple[Outcome, ...]  # empty of `fold`
    num_modules: int
    nbytes: int  # of the result's tensors
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The greatest of all modules, relative to the exact change."""
        return max((one.error for one in self.modules), default=0.0)


def merge(
    adapters: Url | Sequence[Url],
    into: Url,
    *,
    method: str = "concat",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: Url | None = None,
    step: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    key: str = DEFAULT_KEY,
    adapter: str | None = None,
    adapter_config: bytes | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge LoRA adapters into the run `into`, as one checkpoint that appears when all of it is durable.

    What is merged is the weighted sum of the changes, `sum(weight * scaling * B @ A)` of every module.

    Args:
        adapters: folders as PEFT writes them, or checkpoints that hold an adapter (URL@STEP, or URL: its newest).
        method: `concat` (exact, the ranks add up), `svd` (the best of a rank), `lego` (clusters of ranks), `factors` (the mean of
            A or B where the other is shared), or `fold` (into the base: the result is a model).
        weights: one per adapter, as they are named; equal shares of 1 when None.
        rank: of the result, for svd and lego; the largest of the adapters when None.
        base: for `fold`: what the adapters belong to.
        dtype: of the factors, or of all floats of a folded model; the widest of the adapters, or the base's when None.
        seed: of the starts of `lego`.
        key: the state key that the model has in checkpoints.
        adapter: the adapter's name, in checkpoints that hold several.
        adapter_config: of an `adapter_config.json`, for checkpoints that do not say.
        memory: bytes (or `4GiB`) that this may take; it is refused when it needs more.

    Raises:
        InvalidInputError: what cannot be. MismatchError: adapters that do not fit each other, or the base. Nothing was written.
        AlreadyExistsError: `into` has this step.
    """
    urls = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    with planned_merge(
        urls,
        into,
        method=method,
        weights=weights,
        rank=rank,
        base=base,
        step=step,
        dtype=dtype,
        seed=seed,
        key=key,
        adapter=adapter,
        adapter_config=adapter_config,
        memory=memory,
        options=options,
        storage_options=storage_options,
    ) as merging:
        return merging.run(progress)


@dataclass(frozen=True, kw_only=True, eq=False)
class Merging:
    """A merge of adapters that is about to be done: everything is checked but the factors, nothing is written."""

    plan: LoraPlan
    recipe: Recipe
    store: Store
    step: int
    key: str
    options: Options

    @property
    def nbytes(self) -> int:
        """Of the result's tensors."""
        return sum(spec.nbytes for spec in self._maker().specs)

    def run(self, progress: Progress | None = None) -> Merged:
        """Do it. `progress` is called with bytes of the result, `nbytes` in all."""
        if self.plan.method == "factors":
            check_factors(self.plan)
        maker = self._maker()
        result = Result(step=self.step, specs=maker.specs)
        if self.plan.base is not None:
            base = self.plan.base
            merge_id = "\0".join(adapter.source.digest for adapter in self.plan.adapters)
            objects = objects_of(base, self.recipe.state, seed=self.plan.seed, merge_id=merge_id)
            result = Result(step=self.step, specs=maker.specs, objects=objects, saved=Saved.like(base.reader))
        outcomes: tuple[Outcome, ...] = ()

        def metadata() -> dict[str, Any]:
            nonlocal outcomes
            document = {RECORD: _record(self.plan)}
            if isinstance(maker, Factors):
                outcomes = tuple(maker.outcomes[number] for number in sorted(maker.outcomes))
                document[METADATA] = maker.document()
                document[RECORD]["error"] = max(one.error for one in outcomes)
            return document

        attempt = write_result(self.store, result, maker.stream, metadata, options=self.options, progress=progress)
        return Merged(
            step=self.step,
            attempt=attempt,
            method=self.plan.method,
            modules=outcomes,
            num_modules=len(self.plan.modules),
            nbytes=result.nbytes,
            notes=self.plan.notes,
        )

    def _maker(self) -> Factors | Folded:
        return Factors(self.plan, self.key) if self.plan.base is None else Folded(self.plan)


@contextmanager
def planned_merge(
    adapters: Sequence[Url],
    into: Url,
    *,
    method: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: Url | None = None,
    step: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    key: str = DEFAULT_KEY,
    adapter: str | None = None,
    adapter_config: bytes | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Merging]:
    """As `merge`, up to the point where factors would be read; good inside the `with`."""
    settings = config.from_environment(options)
    recipe = _recipe(adapters, base, into, step, dtype, memory)
    with _opened(recipe, settings, storage_options) as (opened, store):
        given = check_weights(weights, len(opened.sources))
        found = [open_adapter(one, key=key, name=adapter, config=adapter_config) for one in opened.sources]
        plan = make_plan(
            found,
            method,
            weights=[given[one.place] for one in opened.sources],
            rank=rank,
            dtype=recipe.dtype,
            base=opened.base,
            key=key,
            seed=seed,
        )
        check_memory(plan, recipe.memory_bytes, settings)
        of = opened.sources if opened.base is None else (opened.base,)
        new = max((one.step or 0 for one in of), default=0) if recipe.step is None else recipe.step
        refuse_existing(store, new)
        yield Merging(plan=plan, recipe=recipe, store=store, step=new, key=key, options=settings)


def _recipe(
    adapters: Sequence[Url], base: Url | None, into: Url, step: int | None, dtype: str | None, memory: int | str | None
) -> Recipe:
    if not adapters:
        raise InvalidInputError("lora.merge(): no adapter is named", kind="no-sources")
    given = Given(
        base=None if base is None else os.fspath(base),
        numerics={"dtype": dtype},
        limits={"memory": memory},
        output={"url": os.fspath(into), "step": step},
    )
    nodes = recipe_nodes([os.fspath(one) for one in adapters], "lora.merge()")
    return recipe_of(overlaid(nodes, given, "lora.merge()"))


@contextmanager
def _opened(
    recipe: Recipe, options: Options, storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[Opened, Store]]:
    assert recipe.output is not None
    with ExitStack() as stack:
        opened = open_sources(recipe.sources, recipe.base, options, open_at(options, storage_options))
        stack.enter_context(closing(opened))
        store = open_store(recipe.output, options=options, storage_options=storage_options)
        stack.enter_context(closing(store))
        yield opened, store


def _record(plan: LoraPlan) -> dict[str, Any]:
    """Where the result came from."""
    return {
        "version": 1,
        "program": PROGRAM,
        "method": plan.method,
        "seed": plan.seed,
        "adapters": [
            {**adapter.source.record(), "weight": weight}
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
        ],
        "base": None if plan.base is None else plan.base.record(),
    }
