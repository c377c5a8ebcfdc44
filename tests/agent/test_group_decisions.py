"""All agents decide alike on a snapshot, whoever is late, dies, or has none; and none holds up the next one."""

from __future__ import annotations

import time

import pytest

from ckpt.agent import discover, segments
from ckpt.agent.identity import parity_folder
from ckpt.config import Options
from ckpt.errors import AgentError
from tests.agent.conftest import names_in_memory, until
from tests.agent.group import Group, attempt, quick

LATE_S = 5.0  # time enough to protect a snapshot, also on a busy machine


def test_a_step_that_one_rank_has_no_memory_for_does_not_hold_up_the_others(folders: Options) -> None:
    with Group(quick(folders), [(0, 1, 2)]) as group:
        late = group.ranks[2]
        began = [late.client.begin(step, attempt(step)) for step in (1, 2)]  # both segments are being written
        with pytest.raises(AgentError, match="no memory is free"):
            late.keep(5)
        for one in group.ranks[:2]:
            one.keep(5)
        until(lambda: [one.state(5) for one in group.ranks[:2]] == ["failed", "failed"])
        for one in began:
            late.client.abandon(one)
        for rank in group.ranks:
            rank.keep(6)
        assert group.until_decided(6) == ["protected"] * 3


@pytest.mark.parametrize("how", ["abandon", "pass_over"])
def test_a_step_that_a_trainer_gives_up_does_not_hold_up_the_others(folders: Options, how: str) -> None:
    with Group(quick(folders), [(0, 1)]) as group:
        group.ranks[0].keep(5)
        if how == "abandon":
            group.ranks[1].client.abandon(group.ranks[1].client.begin(5, attempt(5)))
        else:
            group.ranks[1].client.call("pass_over", {"step": 5, "attempt": attempt(5)})
        until(lambda: group.ranks[0].state(5) == "failed")


def test_a_vote_that_is_withdrawn_in_time_counts_for_nobody(folders: Options) -> None:
    """Rank 1 has its parity and gives up before the other group begins."""
    with Group(quick(folders), [(0, 1), (2, 3)], protect_timeout_s={1: LATE_S}) as group:
        for rank in (0, 1):
            group.ranks[rank].keep(5)
        until(lambda: group.ranks[1].state(5) == "failed")
        for rank in (2, 3):
            group.ranks[rank].keep(5)
        assert group.until_decided(5) == ["failed"] * 4
        for one in group.ranks:
            one.keep(6)
        assert group.until_decided(6) == ["protected"] * 4


def test_while_nobody_knows_whether_all_have_voted_both_snapshots_stay(folders: Options) -> None:
    """Rank 0's agent dies between the votes. Until another one is there, rank 1 gives up neither snapshot, nor the old one."""
    with Group(quick(folders), [(0, 1), (2, 3)], protect_timeout_s={1: LATE_S}) as group:
        for one in group.ranks:
            one.keep(4)
        assert group.until_decided(4) == ["protected"] * 4
        for rank in (0, 1):
            group.ranks[rank].keep(5)
        until(lambda: len(group.ranks[1].inventory().parities) == 2)
        time.sleep(0.5)  # it has voted
        group.ranks[0].kill()
        time.sleep(LATE_S + 1.0)  # its time is over
        held = group.ranks[1].inventory()
        assert [sorted(one.step for one in held.blobs), sorted(one.of[0] for one in held.parities)] == [[4, 5], [4, 5]]
        assert group.ranks[1].state(5) == "protecting"
        with pytest.raises(AgentError, match="no memory is free"):
            group.ranks[1].keep(6)
        group.ranks[0].start()
        group.join(0, tell=True)
        # Its successor has not counted four votes.
        until(lambda: [one.state(5) for one in group.ranks[:2]] == ["failed"] * 2)
        for one in group.ranks:
            one.keep(7)
        assert group.until_decided(7) == ["protected"] * 4


def test_an_agent_in_place_of_rank_0s_knows_what_the_one_before_has_decided(folders: Options) -> None:
    with Group(quick(folders), [(0, 1)]) as group:
        for one in group.ranks:
            one.keep(5)
        assert group.until_decided(5) == ["protected"] * 2
        group.ranks[0].kill()
        group.ranks[0].start()
        group.join(0, tell=True)
        header = {one.step: one.state for one in group.ranks[0].client.segments()}
        assert header[5] == "PROTECTED"
        for one in group.ranks:
            one.keep(6)
        assert group.until_decided(6) == ["protected"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_agent_in_place_of_one_that_has_voted_goes_on_with_its_snapshot(folders: Options, rank: int) -> None:
    with Group(quick(folders), [(0, 1), (2, 3)]) as group:
        for one in group.ranks:
            one.keep(4)
        assert group.until_decided(4) == ["protected"] * 4
        for number in (0, 1):
            group.ranks[number].keep(5)
        until(lambda: len(group.ranks[rank].inventory().parities) == 2)
        time.sleep(0.5)  # it has voted
        group.ranks[rank].kill()
        group.ranks[rank].start()
        group.join(rank, tell=True)
        for number in (2, 3):
            group.ranks[number].keep(5)
        assert group.until_decided(5) == ["protected"] * 4
        assert {one.step: one.state for one in group.ranks[rank].client.segments()} == {4: "PROTECTED", 5: "PROTECTED"}


def test_parity_of_a_snapshot_that_failed_makes_way(folders: Options) -> None:
    """Three in a row fail after their parity was made; the fourth is protected."""
    with Group(quick(folders), [(0, 1), (2, 3)], protect_timeout_s=dict.fromkeys(range(4), LATE_S)) as group:
        for step in (5, 6, 7):
            for rank in (0, 1):
                group.ranks[rank].keep(step)
            until(lambda step=step: group.states(step)[:2] == ["failed"] * 2)
        for one in group.ranks:
            one.keep(8)
        assert group.until_decided(8) == ["protected"] * 4


def test_a_job_that_goes_on_from_the_store_leaves_no_snapshot_that_could_come_back(folders: Options) -> None:
    with Group(quick(folders), [(0, 1)]) as group:
        for one in group.ranks:
            one.keep(5)
        assert group.until_decided(5) == ["protected"] * 2
        for one in group.ranks:
            one.client.call("choose", {})
        assert [(one.inventory().blobs, one.inventory().parities) for one in group.ranks] == [((), ()), ((), ())]


def test_parity_is_marked_as_in_use_while_its_agent_lives(folders: Options) -> None:
    """Or the agent of another rank would take it for a leftover as soon as its own has died."""
    with Group(quick(folders), [(0, 1)]):
        paths = segments.listing(parity_folder(folders))
        before = {path: segments.peek(path).alive_ns for path in paths}
        until(lambda: all(segments.peek(path).alive_ns > before[path] for path in paths))
        assert len(paths) == 4


def test_nothing_is_left_when_all_agents_have_ended(folders: Options) -> None:
    with Group(quick(folders), [(0, 1)]) as group:
        for one in group.ranks:
            one.keep(5)
        group.until_decided(5)
    until(lambda: not discover.agents(folders))
    assert (names_in_memory(folders), parity_folder(folders).is_dir()) == ([], False)
