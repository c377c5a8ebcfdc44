"""Do the tasks of a merge: one worker, in one process.

In: a job and the number of a task. Out: an image in the store, or the record of what a pass found in it. One owner thread; reads,
arithmetic and writes of a task overlap on threads of the worker's own. `close` may be called twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any, Protocol

from ckpt.engine.read import Progress
from ckpt.merge.compute import Computer
from ckpt.merge.images import ImagePlan
from ckpt.merge.job import Job
from ckpt.merge.method import Constants, Elementwise, Scope
from ckpt.merge.output import ImageOutput, ImageWriter
from ckpt.merge.plan import TensorPlan
from ckpt.merge.reading import Filled, SpanReader
from ckpt.merge.records import Summaries
from ckpt.merge.spans import Row, Span, needs_pass, spans_of
from ckpt.merge.tiles import layer_of


class Tasks(Protocol):
    """Where tasks of a stage come from."""

    def take(self, *, wait: bool) -> int | None:
        """The next one. None: there are no more; without `wait` also: none is known yet."""


class TaskList:
    """Tasks that are known."""

    def __init__(self, tasks: Iterable[int]) -> None:
        self._left = iter(tasks)

    def take(self, *, wait: bool) -> int | None:
        return next(self._left, None)


class _Spans:
    """The spans of tasks, one task after the other."""

    def __init__(self, job: Job, tasks: Tasks, wanted: Callable[[TensorPlan], bool] | None) -> None:
        self._job, self._tasks, self._wanted = job, tasks, wanted
        self._current: Iterator[tuple[ImagePlan, Span]] = iter(())

    def take(self, *, wait: bool) -> tuple[ImagePlan, Span] | None:
        while (found := next(self._current, None)) is None:
            task = self._tasks.take(wait=wait)
            if task is None:
                return None
            image = self._job.plan.images[task]
            spans = spans_of(self._job.plan, image, self._job.limits, self._wanted)
            self._current = ((of, span) for of, span in zip(itertools.repeat(image), spans, strict=False))
        return found


class Worker:
    """Carries out tasks."""

    def __init__(self, job: Job, progress: Progress | None = None) -> None:
        self._job, self._progress = job, progress
        self._resolved: dict[tuple[int, Scope, str], Constants] = {}  # after the passes below
        self._num_resolved = 0
        self._reader = SpanReader(job.plan, job.limits, progress)
        self._computer = Computer(job.plan, job.limits, self._constants, job.options.copy_threads)
        self._writer = ImageWriter(job.into, job.options)

    @property
    def read_nbytes(self) -> int:
        """Bytes read from sources so far."""
        return self._reader.read_nbytes

    def do(self, stage: int, tasks: Tasks, done: Callable[[int], None]) -> None:
        """Tasks, one after the other: of a pass from 0 up, or with -1 images.

        Reading goes on from one task to the next without a pause, and an image becomes durable while the next one is made.

        Args:
            done: called with the number of each task that has its record, from any thread.
        """
        self._resolve_up_to(self._num_passes() if stage < 0 else stage)
        if stage < 0:
            self._make(tasks, done)
        else:
            self._observe(stage, tasks, done)

    def close(self) -> None:
        """End all threads."""
        self._reader.close()
        self._computer.close()
        self._writer.close()

    def _make(self, tasks: Tasks, done: Callable[[int], None]) -> None:
        job = self._job
        output: ImageOutput | None = None
        ending: list[Future[None]] = []
        try:
            for image, filled in self._reader.read(_Spans(job, tasks, None)):
                if output is None or output.image is not image:
                    if output is not None:
                        ending.append(self._end(output, done))
                        output = None
                    job.drop_half_image(image.number)
                    output = self._writer.begin(job.image_key(image.number), image)
                data = self._computer.result(filled)
                output.append(data)
                if self._progress is not None:
                    self._progress(len(data))
            if output is not None:
                ending.append(self._end(output, done))
                output = None
            for one in ending:
                one.result()
        except BaseException:
            if output is not None:
                output.abort()
            wait(ending)
            raise

    def _end(self, output: ImageOutput, done: Callable[[int], None]) -> Future[None]:
        """Let an image become durable, then have its record."""
        job, number = self._job, output.image.number

        def leave() -> None:
            file = job.image_file(number)
            made = output.receipt(step=job.step, attempt=job.attempt, num_images=job.num_images, file=file)
            job.leave_receipt(number, made)
            done(number)

        return output.finish(leave)

    def _observe(self, number: int, tasks: Tasks, done: Callable[[int], None]) -> None:
        """A pass over the tensors of images. Tiles are folded into their fragment, fragments into the image's record."""
        job = self._job

        def wanted(tensor: TensorPlan) -> bool:
            return needs_pass(job.plan, tensor, number, job.limits)

        image_of: ImagePlan | None = None
        found: Summaries = {}
        for (image, _), rows in itertools.groupby(
            self._rows(_Spans(job, tasks, wanted)), key=lambda item: (item[0], item[2].fragment)
        ):
            if image_of is not None and image is not image_of:
                self._leave(number, image_of, found, done)
                found = {}
            image_of = image
            fragment: Summaries = {}
            for _, filled, row, i in rows:
                place = row.plan.bound, job.plan.unit_of(row.plan, number)
                _fold(fragment, {place: self._computer.observe(filled, i, number, self._constants(row.plan))})
            _fold(found, fragment)
        if image_of is not None:
            self._leave(number, image_of, found, done)

    def _rows(self, spans: _Spans) -> Iterator[tuple[ImagePlan, Filled, Row, int]]:
        for image, filled in self._reader.read(spans):
            for i, row in enumerate(filled.span.rows):
                yield image, filled, row, i

    def _leave(self, number: int, image: ImagePlan, found: Summaries, done: Callable[[int], None]) -> None:
        self._job.leave_summaries(number, image.number, found)
        done(image.number)

    # constants

    def _num_passes(self) -> int:
        return max((bound.num_passes for bound in self._job.plan.bounds), default=0)

    def _constants(self, tensor: TensorPlan) -> Constants:
        """Those of the model, of its layer and its own."""
        return self._of_unit(tensor.bound, "tensor", tensor.subject)

    def _of_unit(self, bound: int, scope: Scope, unit: str) -> Constants:
        """Constants of a unit and of the larger ones that it is in."""
        units: list[tuple[Scope, str]] = [("model", ""), ("layer", layer_of(unit)), ("tensor", unit)]
        found: dict[str, Any] = {}
        for one, name in units:
            found.update(self._resolved.get((bound, one, name), {}))
            if one == scope:
                break
        return found

    def _resolve_up_to(self, count: int) -> None:
        """Constants after the first `count` passes, from the records of all workers."""
        for number in range(self._num_resolved, count):
            for (bound, unit), summary in self._job.summaries(number).items():
                one = self._job.plan.bounds[bound]
                assert isinstance(one.method, Elementwise)
                scope = one.needs.scope_of(number)
                self._resolved[bound, scope, unit] = one.method.resolve(
                    number, summary, self._of_unit(bound, scope, unit), one.context
                )
        self._num_resolved = max(self._num_resolved, count)


def _fold(into: Summaries, more: Summaries) -> None:
    for place, summary in more.items():
        if place in into:
            into[place].fold(summary)
        else:
            into[place] = summary
