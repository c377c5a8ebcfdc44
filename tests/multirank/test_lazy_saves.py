"""Saves that are copied while real ranks train are exact, and the ranks never disagree on what becomes of one.

Method: the ranks run the scenarios of tests/workers/lazily.py, with copies or writes of some rank delayed or failing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

Groups = Callable[[int], RankGroup]


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_a_save_at_every_step_is_what_the_ranks_held_at_the_call(kind: str, rank_group: Groups, tmp_path: Path) -> None:
    saves = rank_group(2).call("tests.workers.lazily:saves_at_every_step_are_exact", str(tmp_path / "run"), kind)
    assert saves == [5, 5]


def test_ranks_skip_the_same_steps(rank_group: Groups, tmp_path: Path) -> None:
    first, second = rank_group(2).call("tests.workers.lazily:ranks_skip_the_same_steps", str(tmp_path / "run"))
    assert (first == second, bool(first)) == (True, True), (first, second)


def test_a_failure_on_one_rank_is_acted_upon_alike(rank_group: Groups, tmp_path: Path) -> None:
    told = rank_group(2).call("tests.workers.lazily:a_failure_is_acted_upon_alike", str(tmp_path / "run"))
    assert told == [
        ["the background save of step 2 failed", "the background save of step 6 failed"],
        ["the background save of step 2 failed", "InvalidInputError"],
    ]
