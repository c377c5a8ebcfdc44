"""Events to saves and loads: which events belong together, how long they took, who was slow.

In: events, of any ranks, in any order. Out: one `Operation` per save or load, with statistics over its ranks. Pure.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckpt.events import LOAD_PHASES, SAVE_PHASES, Event

# Time that a rank spends waiting for others, or that contains other phases: long where somebody else was slow.
WAITING = frozenset({"plan", "wait", "call", "receipts", "commit", "exchange", "total"})
FOREGROUND = frozenset({"walk", "plan", "wait", "call", "fence"})  # of a save: on the training thread
_MOVED = {"save": "write", "load": "read"}  # the phase whose bytes are those of the operation

# Somebody is called a straggler who took this much longer in a phase than the median rank, by each of three measures.
_LATE_OF_MEDIAN = 0.25
_LATE_OF_TOTAL = 0.05
_LATE_S = 0.001


@dataclass(frozen=True, kw_only=True)
class PhaseStats:
    """One phase over the ranks that had it."""

    phase: str
    num_ranks: int
    min_s: float
    median_s: float  # of two in the middle, the shorter one
    max_s: float
    slowest_rank: int
    nbytes: int  # of all ranks


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """The rank that held up the others, and where."""

    rank: int
    phase: str
    seconds: float
    median_s: float

    def __str__(self) -> str:
        more = f", {self.seconds / self.median_s:.1f} times the median" if self.median_s > 0 else ""
        return (
            f"rank {self.rank} in `{self.phase}`: {self.seconds - self.median_s:.3g} s more than the median rank{more}"
        )


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One save or load, on all ranks that told of it."""

    operation: str
    step: int
    attempt: str
    world: int
    events: tuple[Event, ...]  # by start

    @cached_property
    def seconds(self) -> dict[int, dict[str, float]]:
        """Rank -> phase -> seconds; a phase that came several times is added up."""
        out: dict[int, dict[str, float]] = defaultdict(dict)
        for event in sorted(self.events, key=lambda event: event.rank):
            out[event.rank][event.phase] = out[event.rank].get(event.phase, 0.0) + event.seconds
        return dict(out)

    @cached_property
    def phases(self) -> list[str]:
        """Phases that occur, in their order; those of other programs at the end."""
        known = SAVE_PHASES if self.operation == "save" else LOAD_PHASES
        there = {event.phase for event in self.events}
        return [phase for phase in known if phase in there] + sorted(there.difference(known))

    @cached_property
    def stats(self) -> list[PhaseStats]:
        """Each phase over the ranks."""
        return [self._stats(phase) for phase in self.phases]

    @cached_property
    def start_s(self) -> float:
        """Start of the earliest rank, seconds since the epoch by the clock of that rank."""
        return min(event.start_s for event in self.events)

    @cached_property
    def outcome(self) -> str:
        """`failed` or `skipped` when it was so on any rank, `ok` when it was so on all that told, else `unknown`."""
        outcomes = {event.outcome for event in self.events if event.phase == "total" or event.outcome != "ok"}
        return next((word for word in ("failed", "skipped", "ok") if word in outcomes), "unknown")

    @cached_property
    def error(self) -> str:
        """The first error that a rank told, by rank; empty when none did."""
        told = sorted((event.rank, str(event.detail["error"])) for event in self.events if event.detail.get("error"))
        return f"rank {told[0][0]}: {told[0][1]}" if told else ""

    @property
    def total_s(self) -> float | None:
        """From the call to the outcome, on the slowest rank: of a save that went well, until it was durable."""
        return max((phases["total"] for phases in self.seconds.values() if "total" in phases), default=None)

    @property
    def stall_s(self) -> float | None:
        """What the training thread of the slowest rank spent in the call and at the fence."""
        held = [phases["call"] + phases.get("fence", 0.0) for phases in self.seconds.values() if "call" in phases]
        return max(held, default=None)

    @property
    def nbytes(self) -> int:
        """Bytes that all ranks together wrote to the store, or read from it."""
        return sum(event.nbytes for event in self.events if event.phase == _MOVED[self.operation])

    @property
    def bytes_per_s(self) -> float | None:
        """`nbytes` over `total_s`; None for what did not go well."""
        total_s = self.total_s
        return self.nbytes / total_s if self.outcome == "ok" and total_s and self.nbytes else None

    def excess_s(self, phase: str) -> dict[int, float]:
        """Rank -> how much longer than the median rank it took in a phase; 0.0 for the quicker half."""
        taken = {rank: phases[phase] for rank, phases in self.seconds.items() if phase in phases}
        median_s = statistics.median_low(taken.values()) if taken else 0.0
        return {rank: max(0.0, seconds - median_s) for rank, seconds in taken.items()}

    @cached_property
    def straggler(self) -> Straggler | None:
        """The rank with the greatest excess in a phase of its own work, if that is worth a name."""
        stats = {found.phase: found for found in self.stats if found.phase not in WAITING and found.num_ranks > 1}
        if not stats:
            return None
        worst = max(stats.values(), key=lambda found: found.max_s - found.median_s)
        late_s = worst.max_s - worst.median_s
        if late_s < max(_LATE_S, _LATE_OF_MEDIAN * worst.median_s, _LATE_OF_TOTAL * (self.total_s or 0.0)):
            return None
        return Straggler(rank=worst.slowest_rank, phase=worst.phase, seconds=worst.max_s, median_s=worst.median_s)

    def _stats(self, phase: str) -> PhaseStats:
        taken = {rank: phases[phase] for rank, phases in self.seconds.items() if phase in phases}
        slowest = max(taken, key=lambda rank: (taken[rank], -rank))
        return PhaseStats(
            phase=phase,
            num_ranks=len(taken),
            min_s=min(taken.values()),
            median_s=statistics.median_low(taken.values()),
            max_s=taken[slowest],
            slowest_rank=slowest,
            nbytes=sum(event.nbytes for event in self.events if event.phase == phase),
        )


def operations(events: Iterable[Event]) -> list[Operation]:
    """The saves and loads, by their start.

    Events of one attempt belong together. What has no attempt (loads, and saves that were skipped or failed before they had one)
    is told apart by time: a rank that starts anew starts the next one.
    """
    groups: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    nameless: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    for event in events:
        kind: tuple[object, ...] = (event.operation, event.step, event.world)
        if event.attempt:
            groups[*kind, event.attempt].append(event)
        else:
            nameless[kind].append(event)
    for kind, found in nameless.items():
        groups.update({(*kind, "", number): group for number, group in enumerate(_by_time(found))})
    return sorted((_operation(group) for group in groups.values()), key=lambda operation: operation.start_s)


def _operation(events: Sequence[Event]) -> Operation:
    first = events[0]
    return Operation(
        operation=first.operation,
        step=first.step,
        attempt=first.attempt,
        world=first.world,
        events=tuple(sorted(events, key=lambda event: event.start_s)),
    )


def _by_time(events: Sequence[Event]) -> list[list[Event]]:
    groups: list[list[Event]] = [[]]
    current: dict[int, int] = {}  # rank -> number of the group that it is in
    for event in sorted(events, key=lambda event: (event.start_s, event.phase != "total")):
        if event.phase == "total":
            if current.get(event.rank) == len(groups) - 1:
                groups.append([])
            current[event.rank] = len(groups) - 1
        groups[current.get(event.rank, len(groups) - 1)].append(event)
    return [group for group in groups if group]
