"""Saves in the background, each by itself: how long training is held, and when the state is durable.

In: a system and a state. Out: rows of a table. What a training loop pays, which is more than its stalls: bench/training.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from bench.measure import measure, remove
from bench.ranks import Rank
from bench.series import Results, Table, add
from bench.systems import OursFenced, Phases
from bench.workloads import State

STALL, DURABLE = "async save, stall", "async save, durable"


def save_in_background(rank: Rank, table: Table, writer: Any, state: State, step: int) -> None:
    """Stall: in the call and at the fence, on the slowest rank. Durable: until all ranks know that it is, from the call on."""
    folder = rank.folder / "async"
    stalled = 0.0

    def work() -> Phases:
        nonlocal stalled
        start = time.perf_counter()
        wait = writer.async_save(state, folder, step + 10_000)  # steps of their own within ckpt's run
        stalled = writer.stall_s if isinstance(writer, OursFenced) else time.perf_counter() - start
        answer: Phases = wait()
        return answer

    found = measure(rank, work)
    add(table, DURABLE, writer.name, found)
    stall = replace(found, seconds=rank.slowest(stalled), cpu_s=0.0, answer=None)
    add(table, STALL, writer.name, stall)
    remove(rank, folder)


def stall_ratio(results: Results) -> float:
    """The stall of dcp.async_save's best variant over that of ckpt with its fence."""
    row = results[STALL]
    theirs = min(r["median_s"] for name, r in row.items() if name.startswith("dcp"))
    return float(theirs / row[OursFenced.name]["median_s"])
