"""Goal: ranks that read for each other fill every target exactly, over shared memory and over the group, and leave nothing.

Method: 2 and 4 ranks load a column cut, a row cut and replicas of what other ranks saved, with small rounds; a damaged image
fails the load on all of them in time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(180)]


@pytest.mark.parametrize("way", ["shared", "group", "mixed"])
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_passed_on_arrives(
    rank_group: Callable[[int], RankGroup], tmp_path: Path, world: int, way: str
) -> None:
    answers = rank_group(world).call("tests.workers.passing:load_all_ways", str(tmp_path), way)

    assert [answer["wrong"] for answer in answers] == [[]] * world
    assert sum(answer["read"] for answer in answers) <= 1.02 * answers[0]["stored"]
    assert [answer["left"] for answer in answers] == [[]] * world


def test_damage_that_one_rank_reads_stops_all(rank_group: Callable[[int], RankGroup], tmp_path: Path) -> None:
    answers = rank_group(2).call("tests.workers.passing:load_damaged", str(tmp_path))

    assert sorted(answers) == ["DamagedError", "RankFailedError"]
