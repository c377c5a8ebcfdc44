"""Do the tasks of a merge on the ranks of a job: `torchrun ... -m ckpt merge ...`.

In: a plan, this process's rank. Out: the checkpoint, on every rank. No process group: the store is all that ranks share. Rank r
does tasks r, r + world, ... of each stage, waits until the others have left their records too, and rank 0 begins and publishes.
The attempt's id follows from the name of the job and the plan, so a job that is started again under its name goes on with what
is done. A rank that fails leaves its reason for the others.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ckpt.commit.publish as publishing
from ckpt.commit import names
from ckpt.config import Options
from ckpt.engine.read import Progress
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, RankFailedError, first_line
from ckpt.merge.estimate import limits_for
from ckpt.merge.job import Job, Stage, plan_key, read_unfinished
from ckpt.merge.plan import MergePlan
from ckpt.merge.run import Merged
from ckpt.merge.work import TaskList, Worker
from ckpt.store.base import Store

_FAILED_CHARS_MAX = 4000


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process in a job."""

    rank: int
    world: int
    local_world: int  # of this machine
    name: str  # of the job; the same on all ranks, and after a restart


def ranks_of(environment: Mapping[str, str]) -> Ranks | None:
    """The job that `torchrun` says this process is a rank of; None where it is none, or the only one."""
    if int(environment.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        return Ranks(
            rank=int(environment["RANK"]),
            world=int(environment["WORLD_SIZE"]),
            local_world=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            name=environment.get("TORCHELASTIC_RUN_ID")
            or f"{environment.get('MASTER_ADDR')}:{environment['MASTER_PORT']}",
        )
    except (KeyError, ValueError) as error:
        raise InvalidInputError(
            f"WORLD_SIZE says that this is a rank of a job, and the rest is not there: {error!r}",
            hints=("start all ranks with torchrun, or unset WORLD_SIZE",),
        ) from None


def merge_on(ranks: Ranks, plan: MergePlan, into: Store, options: Options, progress: Progress | None = None) -> Merged:
    """Merge, together. Every rank calls with the same recipe. RankFailedError when another rank fails or says nothing for
    `commit_timeout_s`."""
    start = time.perf_counter()
    text = f"{ranks.name}\0{ranks.world}\0{plan.digest}"
    attempt = hashlib.sha256(text.encode()).hexdigest()[:32]
    if _is_published(into, plan.step, attempt):
        raise AlreadyExistsError(f"step {plan.step} of {into.url} was already merged by this job")
    publishing.refuse_existing(into, plan.step)
    together = _Together(ranks, into, plan.step, attempt, options)
    try:
        job = together.begin(plan)
        before, read_nbytes = _do(job, ranks, together, progress)
        if ranks.rank == 0:
            job.publish()
        together.wait(lambda: int(not _is_published(into, plan.step, attempt)), "manifests are missing")
    except RankFailedError:
        raise
    except Exception as error:
        together.failed(error)
        raise
    return Merged(
        step=plan.step,
        attempt=attempt,
        num_images=job.num_images,
        num_done_before=before,
        read_nbytes=read_nbytes,
        written_nbytes=plan.written_nbytes,
        seconds=time.perf_counter() - start,
    )


def _do(job: Job, ranks: Ranks, together: _Together, progress: Progress | None) -> tuple[int, int]:
    """This rank's tasks of every stage, each begun when the one before is over on all ranks; (tasks that were done before, bytes
    read)."""
    worker, before = Worker(job, progress), 0

    def undone(stage: Stage) -> int:
        """When rank 0 has published, records are removed."""
        left = len(job.left(stage))
        return 0 if left and _is_published(job.into, job.step, job.attempt) else left

    try:
        for stage in job.stages():
            left = job.left(stage)
            before += len(stage.tasks) - len(left)
            mine = [task for task in stage.tasks[ranks.rank :: ranks.world] if task in left]
            worker.do(stage.number, TaskList(mine), lambda task: None)
            together.wait(functools.partial(undone, stage), "tasks are not done")
        return before, worker.read_nbytes
    finally:
        worker.close()


class _Together:
    """What ranks tell each other through the store. One owner thread."""

    def __init__(self, ranks: Ranks, into: Store, step: int, attempt: str, options: Options) -> None:
        self._ranks, self._into, self._step, self._attempt, self._options = ranks, into, step, attempt, options
        self._prefix = f"{names.merge_prefix(step, attempt)}failed/"

    def begin(self, plan: MergePlan) -> Job:
        """Rank 0 leaves the record of the plan, or finds that of an earlier start; all go by its limits."""
        key = plan_key(self._step, self._attempt)
        if self._ranks.rank == 0:
            self._into.delete([entry.key for entry in self._into.list(self._prefix)])  # of an earlier start
            if not self._into.exists(key):
                limits = limits_for(plan, plan.recipe.memory_bytes, self._ranks.local_world, self._options)
                Job(plan, self._into, self._attempt, limits, self._options).begin(plan.recipe.document)
        self.wait(lambda: int(not self._into.exists(key)), "records of rank 0 are missing")
        found = read_unfinished(self._into, self._step, self._attempt)
        job = Job(plan, self._into, self._attempt, found.limits, self._options)
        job.check(found)
        return job

    def failed(self, error: BaseException) -> None:
        """Leave the reason for the others."""
        key = self._prefix + names.ranked_name(self._ranks.rank, self._ranks.world, "txt")
        try:
            self._into.put(key, first_line(error)[:_FAILED_CHARS_MAX].encode())
        except CheckpointError as problem:
            error.add_note(f"the other ranks could not be told: {problem.message}")

    def wait(self, left: Callable[[], int], what: str) -> None:
        """Until nothing is left. The clock starts anew whenever there is less of it."""
        options = self._options
        pause, least, since = options.poll_start_s, left(), time.monotonic()
        while least:
            self._look_for_failures()
            time.sleep(pause)
            pause = min(2 * pause, options.poll_max_s)
            now = left()
            if now < least:
                least, since = now, time.monotonic()
            elif time.monotonic() - since > options.commit_timeout_s:
                raise RankFailedError(
                    f"{now} {what} after {options.commit_timeout_s:.0f} s without progress: a rank is gone",
                    kind="rank-missing",
                )

    def _look_for_failures(self) -> None:
        for entry in self._into.list(self._prefix):
            found = names.parse_ranked(entry.key.removeprefix(self._prefix), "txt")
            if found is not None and found[0] != self._ranks.rank:
                said = self._into.read(entry.key).decode(errors="replace")
                raise RankFailedError(f"rank {found[0]} of the merge failed: {said}")


def _is_published(into: Store, step: int, attempt: str) -> bool:
    return publishing.published_attempt(into, step) == attempt
