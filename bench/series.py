"""Repeated measurements of several systems, alternating, and what they come to.

In: seconds. Out: medians, spreads, ratios, tables. The first call of each system is kept apart: it is 2 to 6 times slower
than the others (first touch of memory, imports, threads).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.measure import Measured


@dataclass(kw_only=True)
class Series:
    """All runs of one system in one task. Run 0 is the first call."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of all ranks together
    rss_extra_bytes: list[int] = field(default_factory=list)  # per run, largest of the ranks
    load_average: list[float] = field(default_factory=list)  # of the machine, over a minute, when each run began
    phases: list[dict[str, float]] = field(default_factory=list)  # of rank 0, where the system tells

    def add(self, found: Measured, phases: Mapping[str, float] | None) -> None:
        self.seconds.append(found.seconds)
        self.cpu_s.append(found.cpu_s)
        self.rss_extra_bytes.append(found.rss_extra_bytes)
        self.load_average.append(os.getloadavg()[0])
        self.phases.append(dict(phases or {}))

    def summary(self) -> dict[str, object]:
        later = self.seconds[1:] or self.seconds
        out: dict[str, object] = {
            "median_s": round(statistics.median(later), 4),
            "min_s": round(min(later), 4),
            "max_s": round(max(later), 4),
            "first_s": round(self.seconds[0], 4),
            "runs": len(later),
            "cpu_median_s": round(statistics.median(self.cpu_s[1:] or self.cpu_s), 4),
            "load_average_median": round(statistics.median(self.load_average), 2),
        }
        if any(self.rss_extra_bytes):
            out["rss_extra_mb"] = round(statistics.median(self.rss_extra_bytes[1:] or self.rss_extra_bytes) / 1e6, 1)
        phases = [p for p in (self.phases[1:] or self.phases) if p]
        if phases:
            out["phases_median_s"] = {k: round(statistics.median(p.get(k, 0.0) for p in phases), 4) for k in phases[0]}
        return out


Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # task -> system -> figures
Table = dict[str, dict[str, Series]]  # task -> system -> its runs


def add(table: Table, task: str, system: str, found: Measured, *, phases: bool = True) -> None:
    """Put one run into the table; with the phases that the system told, unless told not to."""
    told = found.answer if phases and isinstance(found.answer, Mapping) else None
    table.setdefault(task, {}).setdefault(system, Series()).add(found, told)


def summarize(table: Table) -> dict[str, dict[str, dict[str, object]]]:
    return {task: {name: runs.summary() for name, runs in row.items()} for task, row in table.items()}


def ratios(results: Results, ours: str, column: str = "median_s") -> dict[str, dict[str, float]]:
    """Task -> system -> its figure over ours: above 1, ours is better."""
    out: dict[str, dict[str, float]] = {}
    for task, row in results.items():
        mine = float(row[ours][column]) if ours in row else 0.0
        if mine > 0:
            out[task] = {name: round(float(r[column]) / mine, 2) for name, r in row.items() if name != ours}
    return out


def show(results: Results, ours: str) -> str:
    """A plain table: median, spread, first call, CPU seconds of all ranks, extra memory, and the ratios to ours."""
    lines = [
        f"{'task':<26} {'system':<18} {'median s':>9} {'min-max':>15} {'first':>8} {'x ours':>7}"
        f" {'CPU s':>7} {'x ours':>7} {'RSS MB':>7}"
    ]
    wall, cpu = ratios(results, ours), ratios(results, ours, "cpu_median_s")
    for task, row in results.items():
        for name, r in row.items():
            spread = f"{r['min_s']:.3f}-{r['max_s']:.3f}"
            one, other = (f"{x.get(task, {}).get(name, 1.0):7.2f}" for x in (wall, cpu))
            memory = f"{r.get('rss_extra_mb', 0.0):7.0f}"
            lines.append(
                f"{task:<26} {name:<18} {r['median_s']:9.3f} {spread:>15} {r['first_s']:8.3f} {one}"
                f" {r['cpu_median_s']:7.2f} {other} {memory}"
            )
    return "\n".join(lines)
