"""Goal: events are put together as they belong, and the one who was slow is named, nobody else. Method: synthetic runs."""

from __future__ import annotations

import random

import pytest

from ckpt.observe.lanes import lanes
from ckpt.observe.summary import operations
from tests.observe.synthetic import load_events, run_events, save_events


@pytest.mark.parametrize("world", [1, 2, 16, 256])
def test_a_run_is_its_saves_and_loads_in_order(world: int) -> None:
    events = run_events(world)
    random.Random(0).shuffle(events)
    found = operations(events)

    assert [(o.operation, o.step, len(o.seconds)) for o in found] == [
        ("load", 100, world),
        *(("save", step, world) for step in range(200, 1400, 100)),
    ]
    assert [o.outcome for o in found] == ["ok"] * 7 + ["failed", "ok", "skipped", "ok", "ok", "ok"]
    assert found[7].error.startswith("rank 0: cannot write") and found[6].error == ""


@pytest.mark.parametrize("world", [2, 3, 16, 256])
@pytest.mark.parametrize(("phase", "times"), [("copy", 6.0), ("checksum", 4.0), ("write", 1.5), ("walk", 100.0)])
def test_the_straggler_is_named_and_not_those_who_wait_for_it(world: int, phase: str, times: float) -> None:
    slow = world - 1
    (save,) = operations(save_events(7, world, straggler=(slow, phase, times)))

    assert save.straggler is not None
    assert (save.straggler.rank, save.straggler.phase) == (slow, phase)


@pytest.mark.parametrize("world", [1, 2, 16, 256])
def test_where_nobody_is_slow_nobody_is_named(world: int) -> None:
    (save,) = operations(save_events(7, world))

    assert save.straggler is None


def test_two_tries_at_a_step_are_two_saves() -> None:
    first, second = save_events(7, 2, seed=1), save_events(7, 2, seed=2, start_s=1_790_000_100.0)

    assert [o.attempt for o in operations(second + first)] == [first[0].attempt, second[0].attempt]


def test_loads_of_one_step_one_after_the_other_are_told_apart() -> None:
    events = [e for n in range(3) for e in load_events(7, 4, start_s=1_790_000_000.0 + 10 * n)]

    assert [(len(o.seconds), o.total_s) for o in operations(events)] == [(4, pytest.approx(0.508))] * 3


def test_numbers_of_a_save_are_those_of_its_slowest_rank_and_of_all_bytes() -> None:
    events = save_events(7, 4, straggler=(2, "write", 2.0))
    (save,) = operations(events)

    assert save.total_s == max(e.seconds for e in events if e.phase == "total")
    assert save.nbytes == sum(e.nbytes for e in events if e.phase == "write")
    call, fence = save.seconds[0]["call"], save.seconds[0]["fence"]
    assert save.stall_s is not None and save.stall_s >= call + fence


def test_a_rank_that_told_nothing_is_missing_and_no_error() -> None:
    (save,) = operations([e for e in save_events(7, 4) if e.rank != 3 and e.phase != "total"])

    assert (len(save.seconds), save.world, save.outcome, save.total_s) == (3, 4, "unknown", None)


def test_no_two_events_of_a_lane_overlap_and_none_needs_more_lanes_than_are_at_work_at_once() -> None:
    events = [e for e in save_events(7, 1) if e.phase not in ("call", "total") and e.seconds > 0]
    placed = lanes(events, nested=False)
    for i, one in enumerate(events):
        for j, other in enumerate(events):
            if i < j and placed[i] == placed[j]:
                assert (
                    one.start_s + one.seconds <= other.start_s + 1e-5
                    or other.start_s + other.seconds <= one.start_s + 1e-5
                )
    busiest = max(sum(e.start_s <= at.start_s + 1e-5 < e.start_s + e.seconds for e in events) for at in events)
    assert max(placed) + 1 <= busiest + 1
