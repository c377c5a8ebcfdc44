"""Choose where a job comes back from: the nearest tier that has the newest step whole.

In: a run, and the snapshots that agents hold. Out: a filled state, and what was done. Damage in one tier falls through to the
next one, and is told. All ranks choose alike, from what they gathered when the job began.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ckpt.engine.load import Rename
from ckpt.engine.pending import first_line
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.run import Run, State
from ckpt.errors import CheckpointError, MismatchError, NotFoundError, RankFailedError
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

    def open(self, number: int) -> OpenedSnapshot:
        """A recoverable one of `candidates`, to read from."""

    def chosen(self, number: int | None) -> None:
        """The job goes on from this one of `candidates`, or from the store: others no longer count."""


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


def restore(
    run: Run, tier: MemoryTier | None, state: State, layout: Layout | None, *, strict: bool, rename: Rename
) -> Restored | None:
    """Fill `state` from the newest step that some tier has whole; None when there is none. All ranks call.

    Raises:
        MismatchError: names, shapes or dtypes differ from what was saved.
    """
    start = time.perf_counter()
    passed_over: list[str] = []
    if tier is not None:
        tier.settle()  # or a checkpoint could appear after the job has gone on from an older one
        stored_step = run.newest_step()
        for number, candidate in enumerate(tier.candidates()):
            if candidate.step < stored_step:
                break
            if not candidate.recoverable:
                passed_over.append(
                    f"step {candidate.step} in memory: of ranks {list(candidate.lost)} too little is left"
                )
                continue
            error: CheckpointError | None = None
            try:
                store = tier.open(number)
                stored = StoredCheckpoint(store, candidate.step, run.options)
                loaded = run.load_from(stored, state, layout, strict=strict, rename=rename)
            except CheckpointError as problem:
                error = problem
            if not _all_well(run, error):
                passed_over.append(
                    f"step {candidate.step} in memory: {first_line(error) if error else 'other ranks failed'}"
                )
                continue
            tier.chosen(number)
            done = Restored(
                step=candidate.step,
                tier="memory",
                seconds=time.perf_counter() - start,
                nbytes=loaded.wanted_nbytes,
                decoded_nbytes=store.decoded_nbytes,
                lost_ranks=candidate.lost,
                passed_over=tuple(passed_over),
            )
            store.close()
            return _told(run, done)
    try:
        loaded = run.load(state, None, layout, strict=strict, rename=rename)
    except NotFoundError:
        for text in passed_over:
            _log.warning("nothing to restore: %s", text)
        return None
    if tier is not None:
        tier.chosen(None)
    done = Restored(
        step=loaded.step,
        tier="store",
        seconds=time.perf_counter() - start,
        nbytes=loaded.wanted_nbytes,
        passed_over=tuple(passed_over),
    )
    return _told(run, done)


def _all_well(run: Run, error: CheckpointError | None) -> bool:
    """Whether all ranks have loaded. What is wrong with the state itself is raised: no other tier has another one."""
    fatal = isinstance(error, MismatchError)
    answers = run.world.all_gather(np.array([error is not None, fatal], np.uint8))
    if any(answer[1] for answer in answers):
        raise error or RankFailedError("the load failed on other ranks: their state does not fit", kind="rank-failed")
    return not any(answer[0] for answer in answers)


def _told(run: Run, done: Restored) -> Restored:
    if run.world.rank == 0:
        for text in done.passed_over:
            _log.warning("passed over: %s", text)
    return done
