"""Time a call that all ranks make together.

In: a function. Out: the seconds of the slowest rank and its extra memory, the same on every rank. Syncs the disk before, so
that no run pays for another's writes.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import peak_rss, peak_rss_reset
from bench.ranks import Rank


@dataclass(frozen=True, kw_only=True)
class Measured:
    seconds: float  # of the slowest rank
    cpu_s: float  # of all ranks together, user and system; unlike `seconds`, hardly changed by other load
    rss_extra_bytes: int  # of the rank with the most
    answer: Any  # of this rank


def measure(rank: Rank, work: Callable[[], Any]) -> Measured:
    """Run `work()` on all ranks at once. All ranks call."""
    gc.collect()
    if rank.rank == 0:
        os.sync()
    rank.together()
    before = peak_rss_reset()
    cpu_before, start = time.process_time(), time.perf_counter()
    answer = work()
    seconds = time.perf_counter() - start
    cpu_s = time.process_time() - cpu_before
    extra = peak_rss() - before
    return Measured(
        seconds=rank.slowest(seconds),
        cpu_s=rank.total(cpu_s),
        rss_extra_bytes=int(rank.slowest(extra)),
        answer=answer,
    )


def remove(rank: Rank, folder: Path) -> None:
    """Remove a folder once all ranks are done with it. All ranks call."""
    rank.together()
    if rank.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
    rank.together()


def size_of(folder: Path) -> dict[str, int]:
    """Bytes and number of the files below `folder`."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {"bytes": sum(file.stat().st_size for file in files), "files": len(files)}
