"""What must be refused is refused on every rank, with the same list of reasons, and before anything changes.

Goal: no rank goes on where another one stopped, and no message leaves a difference out. Method: two real ranks run the scenarios
of tests/workers/refusals.py, which check types and texts; what the ranks return is compared here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

Groups = Callable[[int], RankGroup]


@pytest.mark.parametrize(
    "scenario",
    [
        "load_lists_every_difference",
        "load_not_strict_takes_what_matches",
        "load_renamed",
        "load_only_the_model",
        "ranks_disagree_on_the_step",
        "ranks_disagree_on_a_shape",
        "a_step_that_exists_is_refused",
    ],
)
def test_all_ranks_say_the_same(scenario: str, rank_group: Groups, tmp_path: Path) -> None:
    first, second = rank_group(2).call(f"tests.workers.refusals:{scenario}", str(tmp_path / "run"))
    assert first == second


@pytest.mark.parametrize("scenario", ["ranks_disagree_on_the_step_in_steady_state", "an_object_that_cannot_be_stored"])
def test_each_rank_hears_of_it(scenario: str, rank_group: Groups, tmp_path: Path) -> None:
    rank_group(2).call(f"tests.workers.refusals:{scenario}", str(tmp_path / "run"))
