"""A picture of a Pareto front.

In: a search's result. Out: a picture file. Needs the extra `ckpt[demo]` (matplotlib).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ckpt.errors import InvalidInputError
from ckpt.search.run import Found


def plot_front(found: Found, path: str | os.PathLike[str], *, metrics: tuple[str, str] | None = None) -> Path:
    """Draw all evaluations over two metrics, those on the front and the references marked; the suffix says the format.

    Args:
        metrics: the two axes; the first two by name when None.

    Raises:
        InvalidInputError: matplotlib is not installed (`missing-package`), or there are no two such metrics.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError(
            "a picture needs the package `matplotlib`, which is not installed",
            kind="missing-package",
            hints=("pip install 'ckpt[demo]'",),
        ) from error
    good = [one for one in found.evaluations if not one.score.failure]
    names = sorted(set.intersection(*(set(one.score.metrics) for one in good))) if good else []
    x, y = metrics or (names[:2] if len(names) > 1 else ("", ""))
    if x not in names or y not in names:
        raise InvalidInputError(
            f"a front is drawn over two metrics, the evaluations have: {', '.join(names) or 'none'}"
        )
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    axes.scatter(
        [e.score.metrics[x] for e in good], [e.score.metrics[y] for e in good], s=14, color="#bbbbbb", label="scored"
    )
    front = sorted((found.evaluations[i].score.metrics for i in found.front), key=lambda m: m[x])
    axes.plot(
        [m[x] for m in front], [m[y] for m in front], "o-", color="#0b6e99", markersize=4, linewidth=1, label="front"
    )
    for one, marker in zip((found.best, *found.others), "*sD", strict=False):
        if not one.score.failure:
            axes.plot(one.score.metrics[x], one.score.metrics[y], marker, color="#b3261e", markersize=8, label=one.name)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)
