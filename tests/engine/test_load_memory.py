"""Goal: a load holds no more memory beside its target than `read_buffer_bytes_max`, whatever the size of the state.

Method: load in a process of its own into memory that was touched before; the peak is the kernel's own figure (VmHWM).
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

import ckpt
from ckpt.config import MIB

STATE_BYTES = 192 * MIB
SLACK_BYTES = 32 * MIB  # plans, index, Arrow's pool; the reads asked for would take 16 x 64 MiB without a bound

_LOAD = """
import sys, torch, ckpt
from ckpt.config import Options

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

target = {str(i): torch.ones(int(sys.argv[2]) // 4 // 3) for i in range(3)}
small = {"small": torch.ones(1000)}
options = Options(
    read_buffer_bytes_max=int(sys.argv[3]), direct_io=bool(int(sys.argv[4])), read_threads=16, local_read_bytes_max=1 << 26
)
ckpt.load({"small": small}, sys.argv[1], options=options)  # what is imported and kept at the first load
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ckpt.load({"model": target}, sys.argv[1], options=options)
assert all((tensor == int(name)).all() for name, tensor in target.items())
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("direct_io", [1, 0])
@pytest.mark.parametrize("budget", [8 * MIB, 64 * MIB])
def test_a_load_keeps_to_its_memory_budget(tmp_path: pathlib.Path, budget: int, direct_io: int) -> None:
    count = STATE_BYTES // 4 // 3
    state = {str(i): torch.full((count,), float(i)) for i in range(3)}
    ckpt.save({"model": state, "small": {"small": torch.zeros(1000)}}, tmp_path, step=1)
    arguments = [sys.executable, "-c", _LOAD, str(tmp_path), str(STATE_BYTES), str(budget), str(direct_io)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= budget + SLACK_BYTES
