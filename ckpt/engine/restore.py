"""Choose where a job comes back from: the nearest tier that has the newest step whole.

In: a run, and the snapshots that agents hold. Out: a filled state, and what was done. What is damaged is passed over for the next
older one on either tier, and is told; it stays as it is. All ranks choose alike: from what they gathered when the job began, what
rank 0 finds in the store, and one exchange after a load that failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ckpt.collector import collector_paused
from ckpt.engine.keeper import OwnImage
from ckpt.engine.load import Loaded, Rename
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.run import Run, State
from ckpt.errors import CheckpointError, DamagedError, MismatchError, RankFailedError, first_line
from ckpt.layout.layout import Layout
from ckpt.store.base import Store

_log = logging.getLogger("ckpt")

_LISTED_MAX = 10  # of what was passed over, in a message
_DAMAGED, _ECHO, _FATAL = range(3)  # what a failed load is to one rank; an echo: others have failed


class Snapshot(Protocol):
    """One snapshot in the memory of agents."""

    @property
    def step(self) -> int: ...

    @property
    def recoverable(self) -> bool: ...

    @property
    def lost(self) -> tuple[int, ...]: ...


class OpenedSnapshot(Store, Protocol):
    """A snapshot as a store that counts."""

    @property
    def decoded_nbytes(self) -> int: ...


class MemoryTier(Protocol):
    """Snapshots in the memory of agents, as restoring sees them. All ranks call alike."""

    def settle(self) -> None:
        """What agents still write to the store is written to its end where that can be, else given up for good."""

    def candidates(self) -> Sequence[Snapshot]:
        """All of which something is left, the newest step first."""

    def own(self, number: int) -> OwnImage | None:
        """This rank's image of one of `candidates`, where its own agent holds that. No collective call."""

    def open(self, number: int) -> OpenedSnapshot:
        """A recoverable one of `candidates`, to read from."""

    def look_again(self) -> None:
        """Look at every byte that agents hold, also of what they looked at before; `candidates` may differ then."""

    def chosen(self, number: int | None, *, step: int) -> None:
        """The job goes on from this one of `candidates`, or from the store: others no longer count.

        Args:
            step: that it goes on from, -1 for none.
        """


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a job came back from."""

    step: int
    tier: str  # memory or store
    seconds: float
    nbytes: int  # that this rank wanted
    decoded_nbytes: int = 0  # of lost members, by this rank
    lost_ranks: tuple[int, ...] = ()  # of the job that saved it, whose memory is gone
    passed_over: tuple[str, ...] = ()  # newer or nearer ones that could not be used, and why


@dataclass(kw_only=True)
class _Tried:
    """What was tried in vain so far. Equal on all ranks, but for texts."""

    rank: int
    passed_over: list[str] = field(default_factory=list)
    error: CheckpointError | None = None  # of the first load that failed; since then the state may be partly filled
    names: set[str] = field(default_factory=set)  # in the state, that such loads may have written to
    any_name: bool = False  # one may have written to others, that are not known on all ranks

    def pass_over(self, text: str) -> None:
        if text not in self.passed_over:
            self.passed_over.append(text)
            if self.rank == 0:
                _log.warning("passed over: %s", text)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be filled, and by whom. All functions that take one are called by all ranks together."""

    run: Run
    tier: MemoryTier | None
    state: State
    layout: Layout | None
    strict: bool
    rename: Rename


@collector_paused()
def restore(
    run: Run, tier: MemoryTier | None, state: State, layout: Layout | None, *, strict: bool, rename: Rename
) -> Restored | None:
    """Fill `state` from the newest step that some tier has whole; None when there is none. All ranks call.

    Raises:
        MismatchError: names, shapes or dtypes differ from what was saved.
        StoreError: the store refused or cannot be reached, and memory has nothing.
        DamagedError: `nothing-restored`: what there is failed on the way, and nothing older is there.
    """
    start = time.perf_counter()
    job = _Job(run=run, tier=tier, state=state, layout=layout, strict=strict, rename=rename)
    tried = _Tried(rank=run.world.rank)
    if tier is not None:
        _settle(tier, tried)
    done = _newest(job, tried)
    if done is not None:
        return dataclasses.replace(done, seconds=time.perf_counter() - start, passed_over=tuple(tried.passed_over))
    if tried.error is not None:
        raise _nothing_left(run, tried, "nothing older is there") from tried.error
    if tier is not None:
        tier.chosen(None, step=-1)
    return None


def _newest(job: _Job, tried: _Tried) -> Restored | None:
    """Try what both tiers have, the newest step first, memory before the store."""
    below: int | None = None  # the newest step that was damaged in the store; newer snapshots have been tried, too
    while True:
        stored_step = _stored_step(job, below, tried)
        if job.tier is not None:
            done = _newest_in_memory(job, job.tier, -1 if stored_step is None else stored_step, below, tried)
            if done is not None:
                return done
        if stored_step is None:  # memory has failed: perhaps it can be asked now, else its error is the one to raise
            stored_step = job.run.newest_step(below=below)
        if stored_step < 0:
            return None
        done = _from_store(job, stored_step, tried)
        if done is not None:
            return done
        job.run.go_back_behind(stored_step)
        below = stored_step


def _newest_in_memory(job: _Job, tier: MemoryTier, floor: int, below: int | None, tried: _Tried) -> Restored | None:
    """Load the newest snapshot of a step from `floor` on (before `below`).

    A load that fails has met damage that came after the last look: agents look again, at every byte, and it begins anew, once.
    """
    for last in (False, True):
        failed = False
        for number, candidate in enumerate(tier.candidates()):
            if candidate.step < floor:
                break
            if below is not None and candidate.step >= below:
                continue
            if not candidate.recoverable:
                tried.pass_over(f"step {candidate.step} in memory: of ranks {list(candidate.lost)} too little is left")
                continue
            done = _from_memory(job, tier, number, tried)
            if done is not None:
                return done
            failed = True
            if not last:
                break
        if not failed or last:
            break
        try:
            tier.look_again()
        except CheckpointError as error:  # on every rank; what was known must do
            tried.pass_over(f"memory: {first_line(error)}")
    return None


def _settle(tier: MemoryTier, tried: _Tried) -> None:
    """Let flushes end, or a checkpoint could appear after the job has gone on from an older one. A store that cannot be
    asked keeps no job from what memory has."""
    try:
        tier.settle()
    except CheckpointError as error:  # on every rank
        if not any(candidate.recoverable for candidate in tier.candidates()):
            raise
        tried.pass_over(f"flushes of agents: {first_line(error)}")


def _stored_step(job: _Job, below: int | None, tried: _Tried) -> int | None:
    """The newest step in the store (before `below`), -1 when there is none. None for a store that cannot be asked, when memory
    has something."""
    try:
        return job.run.newest_step(below=below)
    except CheckpointError as error:  # on every rank
        candidates = () if job.tier is None else job.tier.candidates()
        if not any(one.recoverable and (below is None or one.step < below) for one in candidates):
            raise
        tried.pass_over(f"the store: {first_line(error)}")
        return None


def _from_memory(job: _Job, tier: MemoryTier, number: int, tried: _Tried) -> Restored | None:
    candidate = tier.candidates()[number]
    with contextlib.ExitStack() as stack:
        opened: list[OpenedSnapshot] = []

        def open_it() -> StoredCheckpoint:
            opened.append(tier.open(number))
            stack.callback(opened[0].close)
            return StoredCheckpoint(opened[0], candidate.step, job.run.options)

        def near() -> Loaded | None:
            own = tier.own(number) if job.rename is None else None
            return job.run.load_near(own, candidate.step, job.state, job.layout)

        # Whatever an agent or the way to it does wrong, other tiers may do better; not so with what is wrong with the state.
        loaded = _load(job, f"step {candidate.step} in memory", open_it, tried, fatal=_is_mismatch, near=near)
        if loaded is None:
            return None
        decoded = opened[0].decoded_nbytes if opened else 0
    tier.chosen(number, step=candidate.step)
    return Restored(
        step=candidate.step,
        tier="memory",
        seconds=0.0,
        nbytes=loaded.wanted_nbytes,
        decoded_nbytes=decoded,
        lost_ranks=candidate.lost,
    )


def _from_store(job: _Job, step: int, tried: _Tried) -> Restored | None:
    loaded = _load(job, f"step {step} on the store", lambda: job.run.open_found(step), tried, fatal=_is_no_damage)
    if loaded is None:
        return None
    if job.tier is not None:
        job.tier.chosen(None, step=step)
    return Restored(step=step, tier="store", seconds=0.0, nbytes=loaded.wanted_nbytes)


def _is_mismatch(error: CheckpointError) -> bool:
    return isinstance(error, MismatchError)


def _is_no_damage(error: CheckpointError) -> bool:
    return not isinstance(error, DamagedError)


def _load(
    job: _Job,
    what: str,
    open_it: Callable[[], StoredCheckpoint],
    tried: _Tried,
    *,
    fatal: Callable[[CheckpointError], bool],
    near: Callable[[], Loaded | None] = lambda: None,
) -> Loaded | None:
    """Open and load; None on every rank when something older is to be tried. Raises what is `fatal` on some rank.

    Args:
        near: loads without opening where that is enough.
    """
    stored: StoredCheckpoint | None = None
    is_near = True
    try:
        loaded = near()
        if loaded is None:
            is_near = False
            stored = open_it()
            loaded = job.run.load_from(stored, job.state, job.layout, strict=job.strict, rename=job.rename)
    except CheckpointError as error:  # on every rank: opening and loading agree on that
        names = set[str]() if is_near else None if stored is None else _names_in(stored, job.rename)
        tried.any_name |= is_near
        why = _damage_of_all(job.run, error, fatal, tried, names)
        tried.error = tried.error or error
        tried.pass_over(f"{what}: {why}")
        return None
    mixed = sorted(
        set(loaded.missing) if tried.any_name else tried.names.intersection(loaded.missing)
    )  # strict=False only
    if mixed:
        raise _nothing_left(job.run, tried, f"{what} lacks `{mixed[0]}`, which may be of a newer step") from tried.error
    return loaded


def _damage_of_all(
    run: Run,
    error: CheckpointError,
    fatal: Callable[[CheckpointError], bool],
    tried: _Tried,
    names: set[str] | None,
) -> str:
    """What some rank found damaged. One exchange; raises on every rank what is fatal on one, or was nobody's damage.

    Args:
        names: that this load may have written to; None: it has written nothing, on any rank.
    """
    if error.kind == "rank-missing":  # who did not answer will not do so now
        raise error
    echo = isinstance(error, RankFailedError)
    verdict = _ECHO if echo else _FATAL if fatal(error) else _DAMAGED
    mine = bytes([verdict, names is not None]) + first_line(error).encode()
    answers = [answer.tobytes() for answer in run.world.all_gather(np.frombuffer(mine, np.uint8))]
    told = {
        kind: [f"rank {rank}: {one[2:].decode()}" for rank, one in enumerate(answers) if one[0] == kind]
        for kind in (_DAMAGED, _FATAL)
    }
    if verdict == _FATAL or echo and (told[_FATAL] or not told[_DAMAGED]):
        raise error
    if told[_FATAL]:
        raise RankFailedError(f"the load failed on other ranks: {told[_FATAL][0]}")
    if names is not None and all(one[1] for one in answers):
        tried.names |= names
    return told[_DAMAGED][0] if run.world.size > 1 else first_line(error)


def _names_in(stored: StoredCheckpoint, rename: Rename) -> set[str] | None:
    """All that a load of it can write to, by the names in the state; None when its index cannot be read."""
    new = rename if callable(rename) else (lambda name: rename.get(name, name) if isinstance(rename, Mapping) else name)
    try:
        found = {new(name) for spec in stored.specs for name in (spec.name, *spec.aliases)}
        return found | {row.name for row in stored.objects}
    except CheckpointError:
        return None


def _nothing_left(run: Run, tried: _Tried, why: str) -> DamagedError:
    listed = "; ".join(tried.passed_over[:_LISTED_MAX])
    more = f" and {len(tried.passed_over) - _LISTED_MAX} more" if len(tried.passed_over) > _LISTED_MAX else ""
    return DamagedError(
        f"nothing could be restored, and the state may be partly overwritten: {why}; passed over: {listed}{more}",
        kind="nothing-restored",
        hints=(
            "make the state anew before training from the beginning",
            f"`ckpt ls {run.store.url}` shows what the store has, `ckpt verify` lists its damage",
        ),
    )
