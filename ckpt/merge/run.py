"""Run a merge from its sources to a published checkpoint, or go on with one that was killed.

In: a recipe and the store of the result. Out: `Merged`. This process plans and publishes; `Runner`s do the tasks: here, in worker
processes, or on the ranks of a job. Never shows a half-written checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ckpt.commit.publish as publishing
from ckpt.commit import names
from ckpt.config import Options
from ckpt.engine.read import Progress
from ckpt.errors import CheckpointError, InvalidInputError, StoreError
from ckpt.merge.estimate import limits_for
from ckpt.merge.job import Job, Stage, Unfinished
from ckpt.merge.plan import MergePlan, make_plan
from ckpt.merge.recipe import Recipe, SourceSpec, StepRange, from_document
from ckpt.merge.sources import Opened, OpenStore, open_sources
from ckpt.merge.work import TaskList, Worker
from ckpt.store.base import Store


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did."""

    step: int
    attempt: str
    num_images: int
    num_done_before: int  # tasks that an earlier, killed run had done
    read_nbytes: int  # of sources, in this run; checksum blocks and gaps included
    written_nbytes: int  # of tensors
    seconds: float


class Runner(Protocol):
    """Whoever does tasks."""

    def run(self, stage: Stage, tasks: Sequence[int]) -> None:
        """Do these tasks of a stage; when it returns, each has its record. Raises the first failure."""

    @property
    def read_nbytes(self) -> int:
        """Bytes read from sources so far."""

    def close(self) -> None:
        """End what was started. May be called twice."""


class Here:
    """Does all tasks in this process."""

    def __init__(self, job: Job, progress: Progress | None = None) -> None:
        self._worker = Worker(job, progress)

    @property
    def read_nbytes(self) -> int:
        return self._worker.read_nbytes

    def run(self, stage: Stage, tasks: Sequence[int]) -> None:
        self._worker.do(stage.number, TaskList(tasks), lambda task: None)

    def close(self) -> None:
        self._worker.close()


class MakeRunner(Protocol):
    """Makes the runner of a job."""

    def __call__(self, job: Job, progress: Progress | None) -> Runner: ...


@contextlib.contextmanager
def planned(
    recipe: Recipe, options: Options, open_at: OpenStore | None = None, *, image_bytes: int | None = None
) -> Iterator[MergePlan]:
    """Open the sources of a recipe and plan; closed at the end.

    Args:
        image_bytes: of a merge that is gone on with.
    """
    opened = open_sources(recipe.sources, recipe.base, options, open_at)
    try:
        whole = dataclasses.replace(recipe, document=resolved(recipe, opened))
        yield make_plan(opened, whole, image_bytes=image_bytes or options.merge_image_bytes)
    finally:
        opened.close()


def begin(plan: MergePlan, into: Store, options: Options, *, workers: int = 1) -> Job:
    """Start a new attempt. AlreadyExistsError when the step exists; nothing was touched then."""
    publishing.refuse_existing(into, plan.step)
    limits = limits_for(plan, plan.recipe.memory_bytes, workers, options)
    job = Job(plan, into, names.new_attempt(), limits, options)
    job.begin(plan.recipe.document)
    return job


def again(found: Unfinished, plan: MergePlan, into: Store, options: Options) -> Job:
    """Go on with an attempt. MismatchError when its sources, or this program, would now make other bytes."""
    publishing.refuse_existing(into, plan.step)
    job = Job(plan, into, found.attempt, found.limits, options)
    job.check(found)
    job.begin(found.recipe)  # the same record, with this process as its owner
    return job


def carry_out(job: Job, make_runner: MakeRunner | None = None, progress: Progress | None = None) -> Merged:
    """Do all tasks that are left, and publish. One process calls."""
    start = time.perf_counter()
    runner: Runner = Here(job, progress) if make_runner is None else make_runner(job, progress)
    before = 0
    try:
        for stage in job.stages():
            left = job.left(stage)
            before += len(stage.tasks) - len(left)
            runner.run(stage, left)
            lacking = job.left(stage)
            if lacking:
                raise AssertionError(f"tasks {lacking} of a stage have no record")
        job.publish()
    except CheckpointError as error:
        if not _may_mend(error):
            job.abandon(error)
        raise
    finally:
        runner.close()
    return Merged(
        step=job.step,
        attempt=job.attempt,
        num_images=job.num_images,
        num_done_before=before,
        read_nbytes=runner.read_nbytes,
        written_nbytes=job.plan.written_nbytes,
        seconds=time.perf_counter() - start,
    )


def _may_mend(error: CheckpointError) -> bool:
    """Whether the same merge may work later, so that what is done is worth keeping."""
    return isinstance(error, StoreError) or error.kind in (
        "outcome-unknown",
        "worker-died",
        "failpoint",
        "rank-missing",
    )


def resolved(recipe: Recipe, opened: Opened) -> dict[str, Any]:
    """The recipe as plain data, with every source named by its step: what a worker, or a later run, makes the same plan of."""
    document = dict(recipe.document)
    document["sources"] = [_source_document(spec) for spec in opened.specs]
    if opened.base_spec is not None:
        document["base"] = _source_document(opened.base_spec)
    return document


def _source_document(spec: SourceSpec) -> dict[str, Any]:
    out: dict[str, Any] = {"folder" if spec.steps is None else "run": _plain_url(spec)}
    if spec.steps is not None:
        assert not isinstance(spec.steps, (StepRange, tuple))
        out["steps"] = spec.steps
    if spec.step is not None:
        out["step"] = spec.step
    if spec.weight != 1.0:
        out["weight"] = spec.weight
    if spec.steps is None:
        out["key"] = spec.key
    if spec.anchor:
        out["anchor"] = True
    if spec.rename:
        out["rename"] = [{"match": pattern, "to": to} for pattern, to in spec.rename]
    return out


def _plain_url(spec: SourceSpec) -> str:
    """A URL that is taken for a URL alone, whatever its last part is like."""
    last = spec.url.rpartition("/")[2]
    return spec.url + "/" if "@" in last else spec.url


def recipe_again(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a record."""
    try:
        return from_document(document, "the record of the merge")
    except InvalidInputError as error:
        raise InvalidInputError(f"a merge that was begun cannot be read: {error.message}", kind=error.kind) from None
