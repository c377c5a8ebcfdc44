"""The interval of snapshots follows what they cost, and is the same on all ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt.engine.pace import Pace
from ckpt.engine.world import AloneWorld


class Pair:
    """Two ranks as threads, which exchange bytes."""

    def __init__(self, rank: int, shared: dict[int, NDArray[np.uint8]], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, 2, shared, barrier
        self.exchanges = 0

    def all_gather(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        self.exchanges += 1
        self._shared[self.rank] = np.array(data)
        self._barrier.wait(10)
        out = [self._shared[0], self._shared[1]]
        self._barrier.wait(10)
        return out

    def all_to_all(self, *_: object) -> None:
        raise AssertionError("not needed")


def train(pace: Pace, *, steps: int, step_s: float, cost_s: float, touched: int = 2) -> tuple[float, list[int]]:
    """A loop of simulated time; (share of the time that snapshots took in its second half, steps of snapshots)."""
    now, left, due, extra = 0.0, 0, [], 0.0
    for step in range(1, steps + 1):
        busy = left > 0
        now += step_s + (cost_s / touched if busy else 0.0)
        if step > steps // 2:
            extra += cost_s / touched if busy else 0.0
        left -= busy
        pace.note(now, busy=busy, excluded=False)
        if pace.due(step):
            due.append(step)
            left = touched
    return extra / (steps / 2 * step_s), due


@pytest.mark.parametrize("cost_s", [0.0, 0.001, 0.01, 0.1, 0.5, 3.0])
def test_the_cost_stays_under_the_limit(cost_s: float) -> None:
    share, due = train(Pace(AloneWorld(), 0.03), steps=8000, step_s=0.1, cost_s=cost_s)
    assert share <= 0.75 * 0.031
    assert len(due) > 5


def test_cheap_snapshots_come_at_every_step_or_nearly() -> None:
    _, due = train(Pace(AloneWorld(), 0.03), steps=1000, step_s=0.1, cost_s=0.0)
    assert np.diff(due)[-10:].max() <= 3


def test_the_interval_is_no_longer_than_the_limit_asks_for() -> None:
    _, due = train(Pace(AloneWorld(), 0.03), steps=8000, step_s=0.1, cost_s=0.1)
    assert 44 <= np.diff(due)[-1] <= 53  # 0.1 s in three quarters of 3 % of 45 steps


def test_ranks_that_measure_differently_snapshot_at_the_same_steps() -> None:
    shared: dict[int, NDArray[np.uint8]] = {}
    barrier = threading.Barrier(2)
    worlds = [Pair(rank, shared, barrier) for rank in range(2)]
    found: dict[int, list[int]] = {}

    def rank(number: int) -> None:
        pace = Pace(worlds[number], 0.03)
        found[number] = train(pace, steps=4000, step_s=0.1 + 0.01 * number, cost_s=0.05 + 0.1 * number)[1]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1]
    assert worlds[0].exchanges <= np.log2(len(found[0])) + 1


def test_steps_with_other_saves_say_nothing() -> None:
    """A save to the store that takes 100 s every 50 steps changes nothing."""

    def run(*, with_saves: bool) -> list[int]:
        pace, now, left, due = Pace(AloneWorld(), 0.03), 0.0, 0, []
        for step in range(1, 3000):
            now += 0.1 + (0.02 if left else 0.0)
            excluded = with_saves and step % 50 == 7
            pace.note(now + 100.0 * excluded, busy=left > 0, excluded=excluded)
            now += 100.0 * excluded
            left -= left > 0
            if pace.due(step):
                due.append(step)
                left = 2
        return due

    assert np.diff(run(with_saves=True))[-1] == pytest.approx(np.diff(run(with_saves=False))[-1], rel=0.3)
