"""Saves in a running training job on real ranks.

Goal: in steady state a save makes no collective call on any group; structures may change between saves without one; saves in
the background never deadlock with the training's own collectives; a failure in the background reaches the trainer. Method: the
ranks run the scenarios of tests/workers/steady.py; collectives are counted by name and by the backend's own counters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

Groups = Callable[[int], RankGroup]


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("pp", 2), ("zero", 2), ("megatron", 2), ("tp_fsdp2", 4)])
def test_steady_state_makes_no_collective_call(kind: str, world: int, rank_group: Groups, tmp_path: Path) -> None:
    seen = rank_group(world).call("tests.workers.steady:no_collectives_in_steady_state", str(tmp_path / "run"), kind)
    assert seen == [[]] * world


def test_async_saves_never_deadlock_with_the_training(rank_group: Groups, tmp_path: Path) -> None:
    saves = rank_group(2).call("tests.workers.steady:async_saves_beside_all_reduces", str(tmp_path / "run"), 50)
    assert saves == [10, 10]


@pytest.mark.parametrize(
    ("scenario", "quiet"),
    [
        ("structure_changes_on_all_ranks", [1, 2, 4, 5, 7]),
        ("structure_changes_on_one_rank", [1, 2, 4]),
        ("structure_shrinks", [1, 2, 4]),
        ("replicas_change_together", [1, 2, 4]),
    ],
)
def test_a_structure_may_change_without_a_word(
    scenario: str, quiet: list[int], rank_group: Groups, tmp_path: Path
) -> None:
    """`quiet`: the saves, from 0, that talk to nobody: those of a known structure, and the first of a new one."""
    for log in rank_group(2).call(f"tests.workers.steady:{scenario}", str(tmp_path / "run")):
        assert [number for number, calls in enumerate(log) if not calls] == quiet, log


def test_a_background_failure_reaches_the_trainer(rank_group: Groups, tmp_path: Path) -> None:
    rank_group(2).call("tests.workers.steady:a_background_failure_reaches_the_trainer", str(tmp_path / "run"))
