"""How often to snapshot, so that it costs no more than a given share of the training.

In: the time of every step, and whether a snapshot was on its way. Out: the steps at which one is due, the same on all ranks. What
a snapshot costs is measured, not assumed: by how much the steps that it touches are longer than those that nothing touches.
Ranks agree by one small exchange each time that the number of snapshots has doubled, and never else. Reads no clock of its own.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import numpy as np

from ckpt.engine.world import World

FIRST_EVERY = 10  # steps between snapshots until their cost is known
_SKIPPED_STEPS = 2  # at the start, which are slower than others
_AIM = 0.75  # of the limit: costs vary above their median, and may fall on steps that they do not seem to touch
_KEPT = 64  # last steps and snapshots that figures are taken from


class Pace:
    """The pace of one rank. One owner, on the training thread; all ranks call alike.

    Args:
        cost_max: share of the training time that snapshots may take.
    """

    def __init__(self, world: World, cost_max: float) -> None:
        self._world, self._cost_max = world, cost_max
        self.every = FIRST_EVERY
        self._last_s: float | None = None  # when the step before was over
        self._steps = 0
        self._plain: deque[float] = deque(maxlen=_KEPT)  # seconds of steps that nothing touched
        self._costs: deque[float] = deque(maxlen=_KEPT)  # seconds, of snapshots
        self._running: float | None = None  # seconds of the steps that the present snapshot touched, beyond plain ones
        self._next_step: int | None = None
        self._count, self._next_count = 0, 2

    def note(self, now_s: float, *, busy: bool, excluded: bool) -> None:
        """A step is over.

        Args:
            now_s: at the beginning of the call, before anything is saved in it.
            busy: a snapshot was on its way in some part of the step, the call in which it began included.
            excluded: something else was, too, a save to the store: the step says nothing.
        """
        last, self._last_s = self._last_s, now_s
        self._steps += 1
        if last is None or self._steps <= _SKIPPED_STEPS + 1:
            return
        seconds = now_s - last
        if excluded:
            return
        if busy:
            plain = statistics.median(self._plain) if self._plain else seconds
            self._running = (self._running or 0.0) + seconds - plain
        else:
            self._plain.append(seconds)
        if not busy and self._running is not None:
            self._costs.append(max(self._running, 0.0))
            self._running = None

    def due(self, step: int) -> bool:
        """Whether to snapshot at this step. Exchanges figures when enough snapshots were made. All ranks call."""
        if self._next_step is None:
            self._next_step = step + self.every
        if step < self._next_step:
            return False
        self._count += 1
        if self._count == self._next_count:
            self._next_count *= 2
            self._agree()
        self._next_step = step + self.every
        return True

    def _agree(self) -> None:
        """The interval that keeps the slowest rank's cost within the limit; at most doubled or halved on one sight of it."""
        cost_s = statistics.median(self._costs) if self._costs else math.nan
        step_s = statistics.median(self._plain) if self._plain else math.nan
        answers = self._world.all_gather(np.array([cost_s, step_s], np.float64).view(np.uint8))
        figures = np.array([answer.copy().view(np.float64) for answer in answers])
        if np.isnan(figures).any():  # every step is touched: too often to tell what one costs
            self.every *= 2
            return
        share = _AIM * self._cost_max
        wanted = math.ceil(float(figures[:, 0].max()) / (share * float(figures[:, 1].min())))
        self.every = max(1, min(max(wanted, self.every // 4), self.every * 8))
