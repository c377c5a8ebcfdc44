"""Open the same checkpoint on every rank, also while another job saves: rank 0 decides which one.

In: a store, a world, and a step or none. Out: the opened checkpoint, or one error on every rank. All functions are called by all
ranks of the world together. Reads manifests only.
"""

from __future__ import annotations

import numpy as np

from ckpt.commit import find
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.world import World, gather_or_raise, raise_together
from ckpt.errors import CheckpointError, NotFoundError, RankFailedError
from ckpt.store.base import Store


def newest_step(store: Store, world: World, *, below: int | None = None) -> int:
    """The newest complete step (before `below`) as rank 0 finds it, -1 when there is none."""
    error: CheckpointError | None = None
    found: int | None = None
    if world.rank == 0:
        try:
            found = find.latest(store, below=below)
        except NotFoundError:
            pass
        except CheckpointError as problem:
            error = problem
    answers = gather_or_raise(world, b"%d" % (-1 if found is None else found), error, "before anything changed")
    return int(answers[0])


def open_found(store: Store, world: World, options: Options, step: int) -> StoredCheckpoint:
    """Open a step that `newest_step` has found. A rank that does not find it raises RankFailedError (`rank-disagrees`)."""
    stored: StoredCheckpoint | None = None
    error: CheckpointError | None = None
    try:
        stored = StoredCheckpoint(store, step, options)
    except NotFoundError as problem:
        error = _unseen_error(store, world, step, problem)
    except CheckpointError as problem:
        error = problem
    raise_together(world, error, "before anything changed")
    assert stored is not None
    return stored


def open_together(store: Store, world: World, options: Options, step: int | None) -> StoredCheckpoint:
    """Open checkpoint `step`, the newest complete one when None; NotFoundError on every rank when there is none."""
    stored: StoredCheckpoint | None = None
    error: CheckpointError | None = None
    try:
        if world.rank == 0 or step is not None:
            stored = StoredCheckpoint(store, "latest" if step is None else step, options)
    except CheckpointError as problem:
        error = problem
    value = -1 if stored is None else stored.step
    known = isinstance(error, NotFoundError) and world.rank == 0 and step is None
    answers = world.all_gather(np.array([value], np.int64).view(np.uint8))
    chosen = int(answers[0].copy().view(np.int64)[0])
    if stored is None and error is None and chosen >= 0:
        try:
            stored = StoredCheckpoint(store, chosen, options)
        except CheckpointError as problem:
            error = problem
    if isinstance(error, NotFoundError) and not known and step is None:
        error = _unseen_error(store, world, chosen, error)
    raise_together(world, None if known else error, "before anything changed")
    if stored is None:
        raise NotFoundError(f"rank 0 found no checkpoint to load in {store.url}") if error is None else error
    return stored


def _unseen_error(store: Store, world: World, step: int, error: NotFoundError) -> RankFailedError:
    return RankFailedError(
        f"rank 0 loads step {step} of {store.url}, which rank {world.rank} does not find: {error.message}",
        kind="rank-disagrees",
    )
