"""The Python face of deltas: make one, apply one, look at one.

In: addresses as of `ckpt.merge`, options. Out: checkpoints, and records of what was done. One process calls; no process group, no
torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ckpt import config
from ckpt.commit.complete import PROGRAM
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.delta import record
from ckpt.delta.maker import Maker
from ckpt.delta.methods import Method, method_of
from ckpt.delta.plan import Limits, MakePlan, limits_for, make_plan
from ckpt.delta.record import OBJECT, Delta, Stated, Task
from ckpt.delta.restorer import Restorer, choose, objects_of, read_delta
from ckpt.delta.spool import Spool
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.format.checksum import sha256
from ckpt.format.image import padded_object
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import TensorSpec
from ckpt.merge.api import Url, open_at
from ckpt.merge.given import Given, overlaid, recipe_nodes
from ckpt.merge.objects import ResultObject
from ckpt.merge.publication import Saved
from ckpt.merge.recipe import Recipe, recipe_of
from ckpt.merge.result import Result, write_result
from ckpt.merge.sources import Opened, Source, open_sources
from ckpt.store.base import Store
from ckpt.store.open import open_store


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `make` stored."""

    step: int
    attempt: str
    delta: Delta
    original_nbytes: int  # of all tensors that come back
    stored_nbytes: int  # of what is coded, without the record
    worst: Stated  # over all tensors
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What `apply` gave back."""

    step: int
    attempt: str
    task: str  # the fine-tune that it is
    nbytes: int
    stated: Stated  # over all tensors: what was measured when the delta was made, and holds
    compared_base: bool  # the base has another index, and was compared tensor by tensor


def make(
    finetunes: Url | Sequence[Url],
    into: Url,
    *,
    base: Url,
    method: str = "exact",
    density: float | None = None,
    scale: float | Literal["fit"] | None = None,
    scope: Literal["tensor", "model"] | None = None,
    threshold: float | None = None,
    optimizer: Literal["keep", "drop"] | None = None,
    step: int | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Made:
    """Store fine-tunes as differences to their base, as a checkpoint of the run `into` that appears when all of it is durable.

    Args:
        finetunes: URL@STEP, URL (its newest) or a folder of safetensors files; several for method `tall`.
        base: what they were tuned from.
        method: `exact`, `compeft` or `tall`; the next four belong to the last two (ckpt.delta.methods).
        optimizer: whether optimizer state is stored too (bit for bit); kept by `exact` and dropped by the others when not given.
        step: of the delta; the newest fine-tune's when None.
        memory: bytes (or `4GiB`) that this may take; a GiB or so when None.

    Raises:
        InvalidInputError, MismatchError, NotFoundError: what cannot be; nothing was read or written.
        AlreadyExistsError: `into` has this step.
        CheckpointError: `not-finite`: NaN or infinity where a method must compare numbers; nothing is left behind.
    """
    given = {"density": density, "scale": scale, "scope": scope, "threshold": threshold}
    urls = [finetunes] if isinstance(finetunes, (str, os.PathLike)) else list(finetunes)
    with planned_make(
        urls,
        into,
        base=base,
        method=method_of(method, given),
        optimizer=optimizer,
        step=step,
        memory=memory,
        options=options,
        storage_options=storage_options,
    ) as making:
        return making.run(progress)


def apply(
    delta: Url,
    into: Url,
    *,
    base: Url,
    task: str | int | None = None,
    step: int | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Give one fine-tune of a delta back, as an ordinary checkpoint of the run `into`.

    Args:
        delta: URL@STEP, or URL (its newest).
        base: what the delta was made from; on another layout too.
        task: which fine-tune, where there are several: its number from 1, or as it was named.
        step: of the result; the fine-tune's when None.

    Raises:
        MismatchError: `wrong-base`: lists the tensors that differ. Nothing was written.
        DamagedError: what comes back is not what was stated. Nothing is left behind.
    """
    with planned_apply(
        delta, into, base=base, task=task, step=step, memory=memory, options=options, storage_options=storage_options
    ) as applying:
        return applying.run(progress)


def look(delta: Url, *, options: Options | None = None, storage_options: Mapping[str, Any] | None = None) -> Delta:
    """What a stored delta says of itself. Reads its index and record only."""
    settings = config.from_environment(options)
    recipe = recipe_of(recipe_nodes([os.fspath(delta)], "delta.look()"))
    with closing(open_sources(recipe.sources, None, settings, open_at(settings, storage_options))) as opened:
        return _delta_of(opened.newest)[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Making:
    """A delta that is about to be made: everything is checked, nothing is read or written."""

    plan: MakePlan
    limits: Limits
    store: Store
    step: int
    keep_optimizer: bool
    options: Options

    def run(self, progress: Progress | None = None) -> Made:
        """Make it. `progress` is called with bytes of the fine-tunes, `plan.nbytes` in all."""
        plan = self.plan
        with closing(Spool()) as spool, closing(Maker(plan, self.limits, spool, progress)) as maker:
            delta = maker.run()
            spooled = [maker.spooled[name] for name in sorted(maker.spooled)]
            specs = [TensorSpec(name=s.tensor, role="buffer", dtype="uint8", shape=(s.nbytes,)) for s in spooled]
            stored_nbytes = sum(spec.nbytes for spec in specs)
            found = record.worst([kept for task in delta.tasks for kept in task.tensors])
            world = max(task.saved.world for task in delta.tasks)
            result = Result(
                step=self.step,
                specs=specs,
                objects=_objects(plan, delta, self.keep_optimizer),
                saved=Saved(world=world, rank_layouts=[""] * world),
            )
            attempt = write_result(
                self.store,
                result,
                lambda number: spool.stream(spooled[number]),
                lambda: {OBJECT: _summary(plan, delta, stored_nbytes, found)},
                options=self.options,
            )
        return Made(
            step=self.step,
            attempt=attempt,
            delta=delta,
            original_nbytes=plan.nbytes,
            stored_nbytes=stored_nbytes,
            worst=found,
            notes=plan.notes,
        )


@contextmanager
def planned_make(
    finetunes: Sequence[Url],
    into: Url,
    *,
    base: Url,
    method: Method,
    optimizer: Literal["keep", "drop"] | None = None,
    step: int | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Making]:
    """As `make`, up to the point where data would be read; good inside the `with`."""
    settings = config.from_environment(options)
    recipe = _recipe(finetunes, base, into, step, memory, "delta.make()")
    keep = optimizer == "keep" or (optimizer is None and not method.is_lossy)
    with _opened(recipe, settings, storage_options) as (opened, store):
        plan = make_plan(opened, method, keep_optimizer=keep)
        limits = limits_for(recipe.memory_bytes, len(plan.sources) if method.several else 1, settings)
        new = max((source.step or 0 for source in plan.sources), default=0) if recipe.step is None else recipe.step
        refuse_existing(store, new)
        yield Making(plan=plan, limits=limits, store=store, step=new, keep_optimizer=keep, options=settings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Applying:
    """A fine-tune that is about to come back: everything is checked but the base's data, nothing is written."""

    delta: Delta
    task: Task
    restorer: Restorer
    objects: Sequence[ResultObject]
    store: Store
    step: int
    options: Options

    @property
    def nbytes(self) -> int:
        return sum(kept.spec.nbytes for kept in self.task.tensors)

    def run(self, progress: Progress | None = None) -> Applied:
        """Give it back. `progress` is called with bytes of the result, `nbytes` in all."""
        compared = self.restorer.check_base()
        stated = record.worst(self.task.tensors)
        result = Result(
            step=self.step,
            specs=[kept.spec for kept in self.task.tensors],
            objects=self.objects,
            saved=self.task.saved,
        )
        told = {"method": self.delta.method, "base": dict(self.delta.base), "source": dict(self.task.source)}
        metadata = {**self.task.metadata, "restored": {"program": PROGRAM, **told, **_stated(stated)}}
        attempt = write_result(
            self.store, result, self.restorer.stream, lambda: metadata, options=self.options, progress=progress
        )
        return Applied(
            step=self.step,
            attempt=attempt,
            task=self.task.label,
            nbytes=self.nbytes,
            stated=stated,
            compared_base=compared,
        )


@contextmanager
def planned_apply(
    delta: Url,
    into: Url,
    *,
    base: Url,
    task: str | int | None = None,
    step: int | None = None,
    memory: int | str | None = None,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Applying]:
    """As `apply`, up to the point where data would be read; good inside the `with`."""
    settings = config.from_environment(options)
    recipe = _recipe([delta], base, into, step, memory, "delta.apply()")
    with _opened(recipe, settings, storage_options) as (opened, store):
        stored, found = _delta_of(opened.newest)
        number = choose(found, None if task is None else str(task))
        chosen = found.tasks[number]
        new = int(chosen.source["step"] or 0) if recipe.step is None else recipe.step
        limits = limits_for(recipe.memory_bytes, 1, settings)
        refuse_existing(store, new)
        assert opened.base is not None
        with closing(Restorer(stored, found, number, opened.base, limits)) as restorer:
            yield Applying(
                delta=found,
                task=chosen,
                restorer=restorer,
                objects=objects_of(stored, number),
                store=store,
                step=new,
                options=settings,
            )


def _recipe(
    sources: Sequence[Url], base: Url, into: Url, step: int | None, memory: int | str | None, at: str
) -> Recipe:
    if not sources:
        raise InvalidInputError(f"{at}: no fine-tune is named", kind="no-sources")
    given = Given(base=os.fspath(base), limits={"memory": memory}, output={"url": os.fspath(into), "step": step})
    return recipe_of(overlaid(recipe_nodes([os.fspath(one) for one in sources], at), given, at))


@contextmanager
def _opened(
    recipe: Recipe, options: Options, storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[Opened, Store]]:
    """The sources with their base, and the store of the result."""
    assert recipe.output is not None
    with ExitStack() as stack:
        opened = open_sources(recipe.sources, recipe.base, options, open_at(options, storage_options))
        stack.enter_context(closing(opened))
        store = open_store(recipe.output, options=options, storage_options=storage_options)
        stack.enter_context(closing(store))
        yield opened, store


def _delta_of(source: Source) -> tuple[StoredCheckpoint, Delta]:
    if not isinstance(source.reader, StoredCheckpoint):
        raise InvalidInputError(
            f"{source.label} is a folder of safetensors files: a delta is a checkpoint", kind="not-a-delta"
        )
    return source.reader, read_delta(source.reader)


def _objects(plan: MakePlan, delta: Delta, keep_optimizer: bool) -> list[ResultObject]:
    """Those of the fine-tunes, by number; and the record."""
    payload = padded_object(record.pack(delta))
    row = ObjectRow(
        name=OBJECT,
        kind="replicated",
        rank=0,
        writer=0,
        dp_rank=-1,
        dp_size=-1,
        digest=sha256(payload),
        byte_offset=0,
        nbytes=len(payload),
    )
    out = [ResultObject(row=row, payload=lambda: payload)]
    for task, source in enumerate(plan.sources):
        stored = source.reader
        for one in stored.objects if isinstance(stored, StoredCheckpoint) else []:
            if keep_optimizer or one.kind != "optimizer":
                named = ObjectRow(**{**vars(one), "name": f"{task}/{one.name}"})
                out.append(ResultObject(row=named, payload=_copied(stored, one)))
    return sorted(out, key=lambda one: (one.row.name, one.row.rank))


def _copied(stored: Any, row: ObjectRow) -> Callable[[], bytes]:
    return lambda: bytes(stored.read_object(row))


def _summary(plan: MakePlan, delta: Delta, stored_nbytes: int, found: Stated) -> dict[str, Any]:
    """For the manifest: enough to see what the checkpoint is, without its record."""
    return {
        "version": record.VERSION,
        "program": PROGRAM,
        "method": delta.method,
        "parameters": dict(delta.parameters),
        "base": dict(delta.base),
        "tasks": [dict(task.source) for task in delta.tasks],
        "original_bytes": plan.nbytes,
        "stored_bytes": stored_nbytes,
        **_stated(found),
    }


def _stated(found: Stated) -> dict[str, float]:
    return {"max_abs_error": found.max_abs, "relative_l2": found.relative, "relative_l2_of_change": found.of_change}
