"""Do the tasks of a merge: one worker, in one process.

In: a job and the number of a task. Out: an image in the store, or the record of what a pass found in it. One owner thread; reads,
arithmetic and writes of a task overlap on threads of the worker's own. `close` may be called twice.
"""

from __future__ import annotations

from ckpt.engine.read import Progress
from ckpt.merge.compute import Computer
from ckpt.merge.images import ImagePlan
from ckpt.merge.job import Job
from ckpt.merge.method import Constants, Elementwise
from ckpt.merge.output import ImageWriter
from ckpt.merge.plan import TensorPlan
from ckpt.merge.reading import SpanReader
from ckpt.merge.records import Summaries
from ckpt.merge.spans import needs_pass, spans_of


class Worker:
    """Carries out tasks."""

    def __init__(self, job: Job, progress: Progress | None = None) -> None:
        self._job, self._progress = job, progress
        self._resolved: dict[tuple[int, str], Constants] = {}  # after the passes below
        self._num_resolved = 0
        self._reader = SpanReader(job.plan, job.limits, progress)
        self._computer = Computer(job.plan, job.limits, self._constants, job.options.copy_threads)
        self._writer = ImageWriter(job.into, job.options)

    @property
    def read_nbytes(self) -> int:
        """Bytes read from sources so far."""
        return self._reader.read_nbytes

    def do(self, stage: int, task: int) -> None:
        """One task: of a pass from 0 up, or with -1 an image."""
        image = self._job.plan.images[task]
        if stage < 0:
            self._resolve_up_to(self._num_passes())
            self._make(image)
        else:
            self._resolve_up_to(stage)
            self._observe(stage, image)

    def close(self) -> None:
        """End all threads."""
        self._reader.close()
        self._computer.close()
        self._writer.close()

    def _make(self, image: ImagePlan) -> None:
        job = self._job
        key = job.image_key(image.number)
        job.drop_half_image(image.number)
        output = self._writer.begin(key, image)
        try:
            for filled in self._reader.read(image, spans_of(job.plan, image, job.limits)):
                data = self._computer.result(filled)
                output.append(data)
                if self._progress is not None:
                    self._progress(len(data))
            output.finish()
        except BaseException:
            output.abort()
            raise
        made = output.receipt(
            step=job.step, attempt=job.attempt, num_images=job.num_images, file=job.image_file(image.number)
        )
        job.leave_receipt(image.number, made)

    def _observe(self, number: int, image: ImagePlan) -> None:
        job = self._job

        def wanted(tensor: TensorPlan) -> bool:
            return needs_pass(job.plan, tensor, number, job.limits)

        found: Summaries = {}
        fragment: Summaries = {}  # of the fragment that is being gone over
        last = None
        for filled in self._reader.read(image, spans_of(job.plan, image, job.limits, wanted)):
            for i, row in enumerate(filled.span.rows):
                place = row.plan.bound, job.plan.unit_of(row.plan)
                if row.fragment != last:
                    _fold(found, fragment)
                    fragment, last = {}, row.fragment
                summary = self._computer.observe(filled, i, number, self._constants(*place))
                _fold(fragment, {place: summary})
        _fold(found, fragment)
        job.leave_summaries(number, image.number, found)

    # constants

    def _num_passes(self) -> int:
        return max((bound.num_passes for bound in self._job.plan.bounds), default=0)

    def _constants(self, bound: int, unit: str) -> Constants:
        return self._resolved.get((bound, unit), {})

    def _resolve_up_to(self, count: int) -> None:
        """Constants after the first `count` passes, from the records of all workers."""
        for number in range(self._num_resolved, count):
            for (bound, unit), summary in self._job.summaries(number).items():
                one = self._job.plan.bounds[bound]
                assert isinstance(one.method, Elementwise)
                self._resolved[bound, unit] = one.method.resolve(
                    number, summary, self._constants(bound, unit), one.context
                )
        self._num_resolved = max(self._num_resolved, count)


def _fold(into: Summaries, more: Summaries) -> None:
    for place, summary in more.items():
        if place in into:
            into[place].fold(summary)
        else:
            into[place] = summary
