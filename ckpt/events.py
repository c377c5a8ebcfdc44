"""What happened, as records: each phase of each save and load on each rank.

In: phases with their times, from whoever runs them. Out: `Event`s, to the sinks that were given. A sink that fails is logged
once and left out; it never stops a save. Any thread may record. Where events go is decided in `observe/`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

_log = logging.getLogger("ckpt")

Operation = Literal["save", "load"]
Outcome = Literal["ok", "failed", "skipped"]

# The phases of a save in their order. `walk` to `call` are spent in the call, on the training thread; `fence` is what the
# training thread waited later for copies; the others run in the background of an async save.
SAVE_PHASES = (
    "walk",  # the state to tensors with boxes
    "plan",  # which bytes go where; the exchange with the other ranks at a new structure
    "wait",  # for the image of an earlier save to become free (back-pressure)
    "call",  # the whole call, as the trainer saw it; contains those above
    "copy",  # device or host memory to the image
    "fence",  # the training thread held before an update, because copies were behind
    "checksum",
    "digest",  # of an incremental save: SHA-256 of all fragments, and which of them are unchanged
    "write",  # image to the store, until durable
    "receipts",  # rank 0: until all ranks have written
    "commit",  # index and manifest; on other ranks, until the outcome is known
    "total",  # from the call to the outcome
)
LOAD_PHASES = ("walk", "plan", "read", "exchange", "restore", "total")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One phase of one save or load on one rank."""

    operation: Operation
    phase: str
    run: str  # URL of the run, without credentials
    step: int
    attempt: str  # id of the save; "" for loads and for what went wrong before there was one
    rank: int
    world: int
    start_s: float  # seconds since the epoch
    seconds: float
    nbytes: int = 0  # moved in this phase; 0 where nothing is
    outcome: Outcome = "ok"
    detail: dict[str, Any] = field(default_factory=dict)  # JSON: error message, whether direct I/O was used, ...


class Sink(Protocol):
    """Somewhere events go. Called from one thread at a time, with all events of one save or load once it is over."""

    def emit(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None:
        """May be called twice."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of time."""

    name: str
    start_s: float  # seconds since the epoch
    seconds: float
    nbytes: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


class Timeline:
    """The phases of one save or load on one rank, as they end. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: list[Phase] = []
        # Phases are timed by the monotonic clock and told by the wall clock of this moment.
        self._epoch_s = time.time() - time.perf_counter()
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str, *, nbytes: int = 0, **detail: Any) -> Iterator[None]:
        """Time a block, also one that raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter(), nbytes=nbytes, **detail)

    def add(self, name: str, start: float, stop: float, *, nbytes: int = 0, **detail: Any) -> None:
        """Add a phase by its `time.perf_counter()` times."""
        phase = Phase(name=name, start_s=self._epoch_s + start, seconds=stop - start, nbytes=nbytes, detail=detail)
        with self._lock:
            self._phases.append(phase)

    @property
    def phases(self) -> list[Phase]:
        """All phases so far, by their start."""
        with self._lock:
            return sorted(self._phases, key=lambda phase: phase.start_s)

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds; a phase that came several times is added up."""
        out: dict[str, float] = {}
        for phase in self.phases:
            out[phase.name] = out.get(phase.name, 0.0) + phase.seconds
        return out


class Events:
    """Hands the events of a run to its sinks. Any thread may call; one call at a time reaches the sinks."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self._lock = threading.Lock()

    def tell(
        self,
        timeline: Timeline,
        *,
        operation: Operation,
        run: str,
        step: int,
        attempt: str,
        rank: int,
        world: int,
        outcome: Outcome = "ok",
        error: str = "",
    ) -> None:
        """Tell the sinks of one save or load that is over."""
        events = [
            Event(
                operation=operation,
                phase=phase.name,
                run=run,
                step=step,
                attempt=attempt,
                rank=rank,
                world=world,
                start_s=phase.start_s,
                seconds=phase.seconds,
                nbytes=phase.nbytes,
                outcome=outcome if phase.name == "total" else "ok",
                detail=phase.detail | ({"error": error} if error and phase.name == "total" else {}),
            )
            for phase in timeline.phases
        ]
        with self._lock:
            for sink in list(self._sinks):
                self._guarded(sink, lambda sink=sink: sink.emit(events))

    def close(self) -> None:
        """Close the sinks. May be called twice."""
        with self._lock:
            for sink in list(self._sinks):
                self._guarded(sink, sink.close)
            self._sinks = []

    def _guarded(self, sink: Sink, call: Any) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - observing must never stop a save
            self._sinks.remove(sink)
            _log.warning("events no longer go to %s: %s", type(sink).__name__, error)
