"""Sub-groups of ranks save and load by themselves.

Goal: a world of a sub-group comes about whatever other groups its members are in. Method: real ranks, one of them in a group
more than the other; with torch's own way of making such a group they wait for each other until the deadline.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank


def test_a_sub_group_works_whatever_other_groups_its_members_are_in(rank_group: Callable[[int], RankGroup]) -> None:
    seen = rank_group(4).call("tests.workers.sub_groups:members_of_other_groups_too")

    assert seen == [[[0, 1], [0, 1]], [[0, 1], [0, 1]], [], []]
