"""Events of runs that never were: any number of ranks and steps, with a straggler where the test wants one."""

from __future__ import annotations

import random

from ckpt.events import Event

MIB = 1024 * 1024

# phase -> (start, seconds) within a save of one second, as they lie in an async save
SAVE = {
    "walk": (0.0, 0.004),
    "plan": (0.004, 0.002),
    "wait": (0.006, 0.0),
    "call": (0.0, 0.008),
    "copy": (0.008, 0.12),
    "fence": (0.1, 0.015),
    "checksum": (0.05, 0.2),
    "write": (0.13, 0.7),
}


def save_events(
    step: int,
    world: int,
    *,
    start_s: float = 1_790_000_000.0,
    straggler: tuple[int, str, float] | None = None,  # rank, phase, how many times as long
    outcome: str = "ok",
    error: str = "",
    seed: int = 0,
    run: str = "runs/gpt",
) -> list[Event]:
    """The events of one save on all ranks."""
    draw = random.Random(f"{seed}-{step}-{world}")
    by_rank = [_phases(rank, draw, straggler) for rank in range(world)]
    written = max(max(start + seconds for start, seconds in phases.values()) for phases in by_rank)
    events = []
    for rank, phases in enumerate(by_rank):
        own = max(start + seconds for start, seconds in phases.values())
        if rank == 0:
            phases["receipts"] = (own, written - own)
        phases["commit"] = (written if rank == 0 else own, 0.01 if rank == 0 else written - own + 0.01)
        phases["total"] = (0.0, written + 0.01)
        for phase, (start, seconds) in phases.items():
            whole = phase == "total"
            events.append(
                Event(
                    operation="save",
                    phase=phase,
                    run=run,
                    step=step,
                    attempt=f"{step:08x}{seed:024x}",
                    rank=rank,
                    world=world,
                    start_s=start_s + start,
                    seconds=seconds,
                    nbytes=512 * MIB if phase in ("copy", "write") else 0,
                    outcome=outcome if whole else "ok",  # type: ignore[arg-type]
                    detail={"error": error} if whole and error and rank == 0 else {},
                )
            )
    return sorted(events, key=lambda event: event.start_s)


def _phases(rank: int, draw: random.Random, straggler: tuple[int, str, float] | None) -> dict[str, tuple[float, float]]:
    phases, late = {}, 0.0
    for phase, (start, seconds) in SAVE.items():
        taken = seconds * draw.uniform(0.95, 1.05)
        if straggler is not None and straggler[:2] == (rank, phase):
            taken, late = seconds * straggler[2], seconds * (straggler[2] - 1)
        elif phase == "write":
            start += late
        phases[phase] = (start, taken)
    return phases


def load_events(
    step: int,
    world: int,
    *,
    start_s: float = 1_790_000_000.0,
    straggler: tuple[int, str, float] | None = None,
    outcome: str = "ok",
    run: str = "runs/gpt",
) -> list[Event]:
    """The events of one load on all ranks."""
    events = []
    for rank in range(world):
        at = 0.0
        phases = {"walk": 0.003, "plan": 0.005, "read": 0.4, "exchange": 0.02, "restore": 0.08}
        if straggler is not None and straggler[0] == rank:
            phases[straggler[1]] *= straggler[2]
        spans = {}
        for phase, seconds in phases.items():
            spans[phase] = (at, seconds)
            at += seconds
        spans["total"] = (0.0, at)
        for phase, (start, seconds) in spans.items():
            events.append(
                Event(
                    operation="load",
                    phase=phase,
                    run=run,
                    step=step,
                    attempt="",
                    rank=rank,
                    world=world,
                    start_s=start_s + start + rank * 1e-4,
                    seconds=seconds,
                    nbytes=512 * MIB if phase == "read" else 0,
                    outcome=outcome if phase == "total" else "ok",  # type: ignore[arg-type]
                )
            )
    return sorted(events, key=lambda event: event.start_s)


def run_events(world: int, *, num_saves: int = 12, straggler: tuple[int, str, float] | None = None) -> list[Event]:
    """A load, then saves 60 s apart: the fifth and the last with the straggler, the seventh failed, the ninth skipped."""
    zero_s = 1_790_000_000.0
    events = load_events(100, world, start_s=zero_s)
    for number in range(1, num_saves + 1):
        late = straggler if number in (5, num_saves) else None
        if late is not None and number == 5:
            late = (late[0], late[1], 1 + (late[2] - 1) * 1.5)
        outcome = {7: "failed", 9: "skipped"}.get(number, "ok")
        error = "cannot write `step-000000000800/...` in runs/gpt: No space left on device" if number == 7 else ""
        step = 100 + 100 * number
        found = save_events(step, world, start_s=zero_s + 60 * number, straggler=late, outcome=outcome, error=error)
        if outcome == "skipped":
            found = [event for event in found if event.phase in ("call", "total")]
        events += found
    return events
