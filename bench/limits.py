"""What the hardware allowed in a run: memory copies, checksums, direct writes and direct reads, all ranks at once.

In: a state and a folder. Out: rates in GB/s, of all ranks together. The disk holds one copy of the state meanwhile.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from bench.floors import Direct, drop_cache, memcpy_rate
from bench.measure import measure, remove
from bench.ranks import Rank
from bench.workloads import State, local_of
from ckpt.kernels.checksum import crc32c

_PROBE_BYTES_MAX = 256 << 20
_TASKS = {"memcpy": "memory copy", "crc": "CRC-32C", "direct_write": "direct write", "direct_read": "direct read"}


def limits(rank: Rank, state: State, *, repeats: int = 3) -> dict[str, float]:
    """Medians of some runs, GB/s. The state stays as it is: it is read back from what was written of it. All ranks call."""
    nbytes = rank.total(sum(local_of(t).numel() * local_of(t).element_size() for t in state.values()))
    direct, folder = Direct(), rank.folder / "limits"
    probe = int(min(_PROBE_BYTES_MAX, nbytes))
    found: dict[str, list[float]] = {task: [] for task in _TASKS}
    for run in range(repeats):
        rank.together()
        found["memcpy"].append(rank.total(memcpy_rate(probe, repeats=2)))
        rank.together()
        found["crc"].append(rank.total(crc_rate(probe)))
        found["direct_write"].append(nbytes / measure(rank, lambda n=run: direct.save(state, folder, n)).seconds)
        if rank.rank == 0:
            drop_cache(folder)
        found["direct_read"].append(nbytes / measure(rank, lambda n=run: direct.load(state, folder, n)).seconds)
        remove(rank, folder)
    return {f"{task}_gb_per_s": round(statistics.median(rates) / 1e9, 3) for task, rates in found.items()}


def crc_rate(nbytes: int) -> float:
    """Bytes per second of one thread that checks memory which is in no cache."""
    data = np.ones(nbytes, np.uint8)
    start = time.perf_counter()
    crc32c(data)
    return nbytes / (time.perf_counter() - start)


def show_limits(found: dict[str, float]) -> str:
    """One line."""
    rates = [f"{name} {found[f'{task}_gb_per_s']:.2f}" for task, name in _TASKS.items()]
    return f"limits in this run, GB/s of all ranks together: {', '.join(rates)}"
