"""Reports as bar charts: one picture per report, one panel per task.

In: a report. Out: a PNG file. Never shows a window, never changes a report.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_COLUMNS_MAX = 3
_OURS, _PEERS = "#1b6ca8", "#b8b8b8"


def bars_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a report: its own, else one per task of its results. Each has a title, a unit and values by system."""
    if "bars" in report:
        own: list[dict[str, Any]] = report["bars"]
        return own
    found = []
    for task, row in report.get("results", {}).items():
        values = {name: r["median_s"] for name, r in row.items() if isinstance(r, dict) and "median_s" in r}
        if values:
            found.append({"title": task, "unit": "s", "values": values})
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw all panels of a report into one PNG; nothing where it has none."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = bars_of(report)
    if not panels:
        return
    columns = min(len(panels), _COLUMNS_MAX)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        names, values = list(panel["values"]), list(panel["values"].values())
        bars = axis.barh(names, values, color=[_OURS if name.startswith("ckpt") else _PEERS for name in names])
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(panel["title"], fontsize=10)
        axis.set_xlabel(panel["unit"])
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    machine = report.get("machine", {})
    figure.suptitle(
        f"{report['benchmark']}: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('time')}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
