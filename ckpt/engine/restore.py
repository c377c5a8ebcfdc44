"""Choose where a job comes back from: the nearest tier that has the newest step whole.

In: a run, and the snapshots that agents hold. Out: a filled state, and what was done. Damage in one tier falls through to the
next one, and is told. All ranks choose alike, from what they gathered when the job began.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ckpt.collector import collector_paused
from ckpt.engine.load import Rename
from ckpt.engine.near import OwnImage
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.run import Run, State
from ckpt.errors import CheckpointError, DamagedError, MismatchError, NotFoundError, RankFailedError, first_line
from ckpt.layout.layout import Layout
from ckpt.store.base import Store

_log = logging.getLogger("ckpt")


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


@collector_paused()
def restore(
    run: Run, tier: MemoryTier | None, state: State, layout: Layout | None, *, strict: bool, rename: Rename
) -> Restored | None:
    """Fill `state` from the newest step that some tier has whole; None when there is none. All ranks call.

    Raises:
        MismatchError: names, shapes or dtypes differ from what was saved.
        DamagedError: `nothing-restored`: memory had a snapshot that failed on the way, and nothing else is there.
    """
    start = time.perf_counter()
    passed_over: list[str] = []
    touched: CheckpointError | None = None  # by a load that failed on some rank

    def told(done: Restored) -> Restored:
        over = tuple(dict.fromkeys(passed_over))
        return _told(run, dataclasses.replace(done, seconds=time.perf_counter() - start, passed_over=over))

    if tier is not None:
        _settle(run, tier, passed_over)

        def load(number: int) -> tuple[Restored | None, CheckpointError | None]:
            return _from_memory(run, tier, number, state, layout, strict=strict, rename=rename)

        done, touched = _newest_in_memory(tier, _stored_step(run, tier, passed_over), load, passed_over)
        if done is not None:
            return told(done)
    try:
        loaded = run.load(state, None, layout, strict=strict, rename=rename)
    except NotFoundError:
        for text in passed_over:
            _log.warning("nothing to restore: %s", text)
        if touched is not None:
            raise DamagedError(
                f"nothing could be restored, and the state is partly overwritten: {first_line(touched)}",
                kind="nothing-restored",
                hints=("make the state anew before training from the beginning",),
            ) from touched
        if tier is not None:
            tier.chosen(None, step=-1)
        return None
    if tier is not None:
        tier.chosen(None, step=loaded.step)
    return told(Restored(step=loaded.step, tier="store", seconds=0.0, nbytes=loaded.wanted_nbytes))


def _newest_in_memory(
    tier: MemoryTier,
    stored_step: int,
    load: Callable[[int], tuple[Restored | None, CheckpointError | None]],
    passed_over: list[str],
) -> tuple[Restored | None, CheckpointError | None]:
    """Load the newest snapshot that is not older than the store: what was done, and the first error of a load.

    A load that fails has met damage that came after the last look: agents look again, at every byte, and it begins anew, once.
    """
    touched: CheckpointError | None = None
    for last in (False, True):
        failed = False
        for number, candidate in enumerate(tier.candidates()):
            if candidate.step < stored_step:
                break
            if not candidate.recoverable:
                passed_over.append(
                    f"step {candidate.step} in memory: of ranks {list(candidate.lost)} too little is left"
                )
                continue
            done, error = load(number)
            if done is not None:
                tier.chosen(number, step=candidate.step)
                return done, touched
            touched, failed = touched or error, True
            passed_over.append(f"step {candidate.step} in memory: {first_line(error) if error else 'nothing was read'}")
            if not last:
                break
        if not failed or last:
            break
        try:
            tier.look_again()
        except CheckpointError as error:  # on every rank; what was known must do
            passed_over.append(f"memory: {first_line(error)}")
    return None, touched


def _settle(run: Run, tier: MemoryTier, passed_over: list[str]) -> None:
    """Let flushes end, or a checkpoint could appear after the job has gone on from an older one. A store that cannot be
    asked keeps no job from what memory has."""
    try:
        tier.settle()
    except CheckpointError as error:  # on every rank
        if not any(candidate.recoverable for candidate in tier.candidates()):
            raise
        passed_over.append(f"flushes of agents: {first_line(error)}")


def _stored_step(run: Run, tier: MemoryTier, passed_over: list[str]) -> int:
    """The newest step in the store. With a store that cannot be asked, what memory has is what is left; -1 then."""
    try:
        return run.newest_step()
    except CheckpointError as error:  # on every rank
        if not any(candidate.recoverable for candidate in tier.candidates()):
            raise
        passed_over.append(f"the store: {first_line(error)}")
        return -1


def _from_memory(
    run: Run, tier: MemoryTier, number: int, state: State, layout: Layout | None, *, strict: bool, rename: Rename
) -> tuple[Restored | None, CheckpointError | None]:
    """Load a candidate; on every rank either what was done, or what stopped it on this rank or another."""
    candidate = tier.candidates()[number]
    error: CheckpointError | None = None
    store: OpenedSnapshot | None = None
    wanted = decoded = 0
    try:
        near = run.load_near(tier.own(number) if rename is None else None, state, layout)
        if near is not None:
            wanted = near.wanted_nbytes
        else:
            store = tier.open(number)
            stored = StoredCheckpoint(store, candidate.step, run.options)
            wanted = run.load_from(stored, state, layout, strict=strict, rename=rename).wanted_nbytes
            decoded = store.decoded_nbytes
    except CheckpointError as problem:
        error = problem
    finally:
        if store is not None:
            store.close()
    if error is not None:  # on every rank: opening and loading agree on that
        _refuse_mismatch(run, error)
        return None, error
    done = Restored(
        step=candidate.step,
        tier="memory",
        seconds=0.0,
        nbytes=wanted,
        decoded_nbytes=decoded,
        lost_ranks=candidate.lost,
    )
    return done, None


def _refuse_mismatch(run: Run, error: CheckpointError) -> None:
    """Raise what is wrong with the state itself, on some rank: no other tier has another one."""
    fatal = isinstance(error, MismatchError)
    answers = run.world.all_gather(np.array([fatal], np.uint8))
    if fatal:
        raise error
    if any(answer[0] for answer in answers):
        raise RankFailedError("the load failed on other ranks: their state does not fit", kind="rank-failed")


def _told(run: Run, done: Restored) -> Restored:
    if run.world.rank == 0:
        for text in done.passed_over:
            _log.warning("passed over: %s", text)
    return done
