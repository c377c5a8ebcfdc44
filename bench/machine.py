"""What the figures were measured on.

In: a folder. Out: facts as plain values. Never changes a setting of the machine.
"""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

from ckpt.kernels import choice


def facts(folder: Path) -> dict[str, object]:
    """Cores, memory, kernel, versions, and the file system that holds `folder`."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "pyarrow", "safetensors")},
        "crc_kernel": choice.crc_kernel(),
        "file_system": file_system(folder),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def file_system(folder: Path) -> str:
    """Type of the file system of `folder`, from the longest mount point above it."""
    path = str(folder.resolve())
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if path == point or path.startswith(point.rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount[0]))[1] if above else "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def peak_rss_reset() -> int:
    """Start a new peak; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """Most bytes resident since `peak_rss_reset`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def set_threads() -> None:
    """One compute thread per rank, as when every core has a rank."""
    torch.set_num_threads(1)
