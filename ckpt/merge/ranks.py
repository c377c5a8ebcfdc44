<<<<<<< HEAD
"""Find the magnitudes at given ranks exactly, by histograms that add up: nothing is sorted, gathered or sent.

In: the elements of a tile. Out: counts to fold over tiles, and from their sums thresholds. A magnitude is |x| rounded to float32,
as its 31 bits: they rise with it, so that the place of a rank among the upper 16 bits, and then among the lower 15, is its own.
Pure. Equal magnitudes have one threshold: whoever keeps what reaches it keeps all of them.
=======
"""Do the tasks of a merge on the ranks of a job: `torchrun ... -m ckpt merge ...`.

In: a plan, this process's rank. Out: the checkpoint, on every rank. No process group: the store is all that ranks share. Rank r
does tasks r, r + world, ... of each stage, waits until the others have left their records too, and rank 0 begins and publishes.
The attempt's id follows from the name of the job and the plan, so a job that is started again under its name goes on with what
is done. A rank that fails leaves its reason for the others.
>>>>>>> merge
"""

from __future__ import annotations

<<<<<<< HEAD
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels import merge as kernels
from ckpt.merge.method import Constants, Summary

HIGH_BITS, LOW_BITS = 16, 15
PASSES = 2

RanksOf = Callable[[int], Sequence[int]]  # the ranks that are wanted among so many elements; 1 is the greatest


def counted(tile: kernels.Tile, number: int, constants: Constants, *, threads: int = 1) -> Summary:
    """What pass `number` (0 or 1) finds in a tile. `constants`: what `resolved` gave after pass 0."""
    num = len(tile.sources)
    if number == 0:
        bins = np.zeros((num, 1 << HIGH_BITS), np.uint64)
        kernels.histogram(tile, bins, shift=LOW_BITS, bits=HIGH_BITS, prefix=[-1] * num, threads=threads)
        return Summary(sums={"bins": bins})
    prefixes = constants["prefix"]
    bins = np.zeros((len(prefixes), num, 1 << LOW_BITS), np.uint64)
    for place, prefix in enumerate(prefixes):
        kernels.histogram(tile, bins[place], shift=0, bits=LOW_BITS, prefix=prefix, threads=threads)
    return Summary(sums={"bins": bins})


def resolved(number: int, summary: Summary, constants: Constants, ranks_of: RanksOf) -> Constants:
    """After pass 0 what pass 1 needs; after pass 1 `bits` [R, S]: the magnitude at each rank, of each source."""
    bins = summary.sums["bins"]
    if number == 0:
        counts = bins.sum(axis=1, dtype=np.int64).tolist()
        wanted = np.array([ranks_of(count) for count in counts], np.int64).T.tolist()  # [R][S]
        found = [[place_of(row, rank) for row, rank in zip(bins, ranks, strict=True)] for ranks in wanted]
        return {
            "prefix": [[place for place, _ in row] for row in found],
            "left": [[left for _, left in row] for row in found],
        }
    bits = np.zeros(bins.shape[:2], np.uint32)
    for r, (rows, prefix, left) in enumerate(zip(bins, constants["prefix"], constants["left"], strict=True)):
        for s, (row, high, rank) in enumerate(zip(rows, prefix, left, strict=True)):
            bits[r, s] = (high << LOW_BITS) | place_of(row, rank)[0]
    return {"bits": bits}


def place_of(bins: NDArray[np.uint64], wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th greatest element, and which one in it that is."""
    above = np.cumsum(bins[::-1].astype(np.int64))[::-1]  # elements in this bin or a higher one
    place = int(np.flatnonzero(above >= min(wanted, int(above[0])))[-1]) if above[0] else 0
    return place, wanted - int(above[place] - bins[place])


def rank_of(share: float, count: int) -> int:
    """The rank of the last element that a share of `count` elements keeps: at least one."""
    return max(1, round(share * count))
=======
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
>>>>>>> merge
