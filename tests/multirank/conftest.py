"""Groups of real ranks, started once per test session where they are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.workers.rank_group import RankGroup


@pytest.fixture(scope="session")
def rank_group() -> Iterator[Callable[[int], RankGroup]]:
    """A group of so many ranks, started when it is first asked for. One that a failed call left behind is replaced."""
    groups: dict[int, RankGroup] = {}

    def get(world: int) -> RankGroup:
        if world in groups and not groups[world].is_whole:
            groups.pop(world).close()
        if world not in groups:
            groups[world] = RankGroup(world)
        return groups[world]

    yield get
    for group in groups.values():
        group.close()
