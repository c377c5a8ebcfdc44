"""A save that goes on after the call: the handle that its caller keeps.

In: the future of a save, and what it has cost. Out: `PendingSave`. Errors are kept for whoever waits.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from concurrent.futures import Future

from ckpt.engine.attempt import Saved
from ckpt.errors import SaveFailedError, first_line
from ckpt.events import Phase, Timeline
from ckpt.snapshot.staging import Staging


class PendingSave:
    """A save that goes on in the background. `wait()` or `done()` from any thread."""

    def __init__(
        self,
        step: int,
        future: Future[Saved],
        timeline: Timeline,
        staging: Staging | None = None,
        *,
        skipped: bool = False,
    ) -> None:
        self.step = step
        self.skipped = (
            skipped  # nothing was or will be saved: the saves before it were not over, and the policy is to skip
        )
        self.told = skipped  # whether somebody has heard of its failure
        self._future, self._timeline, self._staging = future, timeline, staging

    @staticmethod
    def over(step: int, timeline: Timeline, outcome: Saved | BaseException, *, skipped: bool = False) -> PendingSave:
        """A save that is over already."""
        future: Future[Saved] = Future()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return PendingSave(step, future, timeline, skipped=skipped)

    def done(self) -> bool:
        """True when the outcome is known."""
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> Saved:
        """Return when the checkpoint is durable; raise what stopped it. TimeoutError after `timeout_s` seconds."""
        return self._future.result(timeout_s)

    def outcome(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait; what stopped it, None when it succeeded or is still on its way after `timeout_s` seconds."""
        concurrent.futures.wait([self._future], timeout_s)
        return self.failure()

    def structure_changed(self) -> bool:
        """Whether some rank's structure changed with this save, which succeeded."""
        return self._future.done() and self._future.exception() is None and self._future.result().structure_changed

    def failure(self) -> BaseException | None:
        """What stopped it; None while it is on its way and when it succeeded."""
        return self._future.exception() if self._future.done() else None

    @property
    def stall_s(self) -> float:
        """Seconds that the training was held so far: in the call, and later at the fence."""
        return self._timeline.seconds().get("call", 0.0) + (self._staging.fence_s if self._staging else 0.0)

    def timeline(self) -> list[Phase]:
        """What this rank did for this save so far, by start: phases with their seconds and bytes (ckpt/events.py)."""
        return self._timeline.phases


def failed_error(found: Sequence[tuple[PendingSave, BaseException]]) -> SaveFailedError:
    """The error that tells the trainer, at a later call, that saves in the background failed."""
    lines = [f"the background save of step {pending.step} failed: {first_line(error)}" for pending, error in found]
    out = SaveFailedError("; ".join(lines), hints=("the checkpoints before it are untouched; saving again is safe",))
    out.__cause__ = found[0][1]
    return out
