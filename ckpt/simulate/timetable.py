"""Undisturbed training between two failures, computed instead of stepped through: where it is, and what is saved by then.

In: costs, the work done at the start. Out: progress, and the newest snapshot of each tier. Pure. Its cost does not depend on
how long training goes on, which is what makes a month of few failures as cheap as a minute of many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckpt.simulate.cluster import Costs


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where undisturbed training is."""

    work_s: float  # of the job, from its first step
    num_snapshots: int  # begun since the start of the stretch
    num_saves: int


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Training from one start to the next failure. A snapshot or save is due at every multiple of its interval of work."""

    costs: Costs
    start_s: float  # on the clock
    work_s: float  # done when it starts

    def at(self, now_s: float) -> Progress:
        """Progress at a time on the clock; a point where training stands still counts as reached."""
        c, elapsed_s = self.costs, now_s - self.start_s
        rate = 1 + c.memory_cost_s / c.memory_every_s + c.store_cost_s / c.store_every_s
        # Certainly reached, less than a cycle and its stalls away; the rest is walked.
        work_s = self.work_s + max(0.0, elapsed_s - c.memory_cost_s - c.store_cost_s) / rate
        i, j = _index(work_s, c.memory_every_s), _index(work_s, c.store_every_s)
        left_s = elapsed_s - self._elapsed_s(work_s, i, j)
        while True:
            memory_at, store_at = (i + 1) * c.memory_every_s, (j + 1) * c.store_every_s
            point = min(memory_at, store_at)
            if left_s < point - work_s or math.isinf(point):
                work_s += left_s
                break
            left_s -= point - work_s
            work_s = point
            if memory_at <= store_at:
                i, left_s = i + 1, left_s - c.memory_cost_s
                if left_s < 0:
                    break
            if store_at <= memory_at:
                j, left_s = j + 1, left_s - c.store_cost_s
                if left_s < 0:
                    break
        i0, j0 = _index(self.work_s, c.memory_every_s), _index(self.work_s, c.store_every_s)
        return Progress(work_s=work_s, num_snapshots=i - i0, num_saves=j - j0)

    def newest_snapshot(self, now_s: float, progress: Progress, *, after_s: float) -> tuple[float, float] | None:
        """(work, time of start) of the newest snapshot begun at least `after_s` before `now_s`; None where there is none."""
        every_s = self.costs.memory_every_s
        first = _index(self.work_s, every_s) + 1
        for i in range(first + progress.num_snapshots - 1, first - 1, -1):
            begun_s = self.start_s + self._elapsed_s(
                i * every_s, i - 1, _index_before(i * every_s, self.costs.store_every_s)
            )
            if begun_s + after_s <= now_s:
                return i * every_s, begun_s
        return None

    def newest_save(self, now_s: float, progress: Progress, *, after_s: float) -> tuple[float, float] | None:
        """The same of the store."""
        every_s = self.costs.store_every_s
        first = _index(self.work_s, every_s) + 1
        for j in range(first + progress.num_saves - 1, first - 1, -1):
            begun_s = self.start_s + self._elapsed_s(j * every_s, _index(j * every_s, self.costs.memory_every_s), j - 1)
            if begun_s + after_s <= now_s:
                return j * every_s, begun_s
        return None

    def _elapsed_s(self, work_s: float, i: int, j: int) -> float:
        """Time from the start until `work_s` is reached and snapshot `i` and save `j` have been paid for."""
        c = self.costs
        snapshots, saves = i - _index(self.work_s, c.memory_every_s), j - _index(self.work_s, c.store_every_s)
        return work_s - self.work_s + snapshots * c.memory_cost_s + saves * c.store_cost_s


def _index(work_s: float, every_s: float) -> int:
    """How many multiples of the interval, above 0, are at most `work_s`. Multiples survive rounding."""
    return math.floor(work_s / every_s * (1 + 1e-12) + 1e-9)


def _index_before(work_s: float, every_s: float) -> int:
    """How many are less than `work_s`."""
    return math.ceil(work_s / every_s * (1 - 1e-12) - 1e-9) - 1 if work_s / every_s > 1e-9 else 0
