"""Show how the demo goes: a live line per phase on a terminal, plain lines elsewhere.

In: phases and glimpses of them. Out: text on stderr. Never decides anything.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from examples.rehearsal.launch import Glimpse, Outcome
from examples.rehearsal.phases import Phase

PLAIN_LINE_EVERY_S = 10.0


class Screen:
    """Owned by the demo's main thread; a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("step"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._plain_s = 0.0

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, phase: Phase) -> None:
        """A phase starts."""
        ranks = "1 rank" if phase.num_ranks == 1 else f"{phase.num_ranks} ranks"
        title = f"{phase.name}: {phase.layout_text}, {ranks}"
        self._task = self._progress.add_task(
            f"{title:<45}", total=phase.kill_at or phase.stop, completed=phase.resumes_from, detail="starting"
        )
        self._plain_s = time.monotonic()
        if not self._live:
            self._console.print(f"{title}, from step {phase.resumes_from}", highlight=False)

    def update(self, glimpse: Glimpse) -> None:
        """The phase that runs stands here."""
        assert self._task is not None
        loss = "starting" if glimpse.loss is None else f"loss {glimpse.loss:.3f}"
        saved = (
            f"newest checkpoint: step {glimpse.newest_checkpoint}" if glimpse.newest_checkpoint else "none saved yet"
        )
        self._progress.update(self._task, completed=glimpse.step, detail=f"{loss}, {saved}")
        if not self._live and time.monotonic() - self._plain_s > PLAIN_LINE_EVERY_S:
            self._plain_s = time.monotonic()
            self._console.print(f"  step {glimpse.step}, {loss}, {saved}", highlight=False)

    def end(self, outcome: Outcome) -> None:
        """The phase that ran is over."""
        assert self._task is not None
        last = max(outcome.losses)
        what = f"loss {outcome.losses[last]:.3f}, newest checkpoint: step {outcome.newest_checkpoint}"
        self._progress.update(self._task, completed=last, detail=what)
        self._progress.stop_task(self._task)
        if not self._live:
            self._console.print(f"  step {last}, {what}, {outcome.seconds:.0f} s", highlight=False)
