"""SIGKILL in a save that refers to an earlier step, while that step is forgotten and collected.

Goal: wherever the save dies, what is complete is whole, gc leaves nothing behind once its grace time is over, and saving goes on.
Method: a real process dies at each failpoint from its image to its manifest; this one forgets the base, collects and saves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.commit import find
from ckpt.commit.gc import collect_garbage
from ckpt.commit.retention import forget
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.verify import verify
from ckpt.store.posix import PosixStore
from tests.workers.rank_group import RankGroup

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(120)]

POINTS = [
    "save.before-image",
    "save.before-image-commit",
    "commit.after-receipt",
    "save.before-index@3",
    "references.before-pin",
    "references.after-pin",
    "commit.before-manifest",
    "commit.after-manifest",
]
OPTIONS = Options()
IMPATIENT = dataclasses.replace(OPTIONS, gc_grace_s=1e-9)


def check(store: PosixStore) -> list[int]:
    steps = find.steps(store)
    for step in steps:
        assert verify(StoredCheckpoint(store, step, OPTIONS)).findings == [], step
    return steps


@pytest.mark.parametrize("point", POINTS)
def test_a_dead_incremental_save_takes_nothing_with_it(point: str, tmp_path: Path) -> None:
    name, _, count = point.partition("@")
    group = RankGroup(1)
    try:
        group.start(
            "tests.workers.replicas:die_in_an_incremental_save",
            str(tmp_path),
            f"{name}:kill" + f"@{count}" * bool(count),
        )
        assert group.outcomes(60.0) == [{"died": -9}]
    finally:
        group.close()
    store = PosixStore(tmp_path, options=OPTIONS)
    complete = [1, 2] if point == "commit.after-manifest" else [1]
    assert check(store) == complete
    forget(store, [1])
    for options in (OPTIONS, IMPATIENT):
        collect_garbage(store, options=options)
        assert check(store) == complete[1:]
    assert complete[1:] or find.step_folders(store) == []
    state = {"frozen": torch.arange(5000.0), "trained": torch.full((100,), 7.0)}
    ckpt.save(state, tmp_path, step=3, incremental=True)
    assert check(store) == [*complete[1:], 3]
    assert bool(StoredCheckpoint(store, 3, OPTIONS).manifest.references) == (len(complete) == 2)
