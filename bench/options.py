"""The options that all benchmarks share, and how a report is printed and kept.

In: the command line. Out: arguments; a scratch folder that is gone afterwards; a JSON file and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import facts
from bench.plot import draw

SCRATCH = Path(__file__).parent / "out"
RESULTS = Path(__file__).parent / "results"


def parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--dir", type=Path, default=SCRATCH, help="scratch folder on the disk to measure (bench/out)")
    out.add_argument("--repeats", type=int, default=repeats, help="runs of each system after a first one")
    out.add_argument("--tiny", action="store_true", help="sizes of a smoke test; the figures mean nothing")
    out.add_argument("--json", type=Path, help="also write the report to this file")
    out.add_argument("--plot", type=Path, help="also draw the report as bar charts, to this PNG file")
    return out


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder below `folder`, removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


def check_space(folder: Path, nbytes: int) -> None:
    """SystemExit when the disk has no room for what a benchmark keeps at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, this benchmark needs {nbytes / 1e9:.1f} GB")


def report(name: str, folder: Path, options: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The report of one benchmark."""
    return {"benchmark": name, "machine": facts(folder), "options": options, **results}


def keep(found: dict[str, Any], path: Path | None, plot: Path | None = None) -> None:
    """Write a report as JSON, and draw it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(found, plot)
