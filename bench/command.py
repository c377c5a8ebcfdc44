"""Run one command and say what it took: seconds, processor time, peak memory. Run: `python -m bench.command [--cold DIR] -- CMD`.

In: a command line. Out: one line of JSON on stdout. The memory is that of the command with all processes below it, sampled: their
proportional set size (shared pages are counted once, mapped files too) and what of it is anonymous (no file behind it).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.floors import drop_cache

SAMPLE_S = 0.05
TAIL_CHARS = 4000


@dataclass(frozen=True, kw_only=True)
class Took:
    """What one run of a command took."""

    seconds: float
    cpu_s: float  # user and system, of all its processes
    peak_bytes: int  # proportional set size
    peak_anonymous_bytes: int
    out: str = ""


class _Sampler:
    """Follows the memory of a process and of those below it, on a thread of its own, until `stop`."""

    def __init__(self, pid: int) -> None:
        self.peak = self.peak_anonymous = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(SAMPLE_S):
            try:
                root = psutil.Process(self._pid)
                found = [_memory(process.pid) for process in (root, *root.children(recursive=True))]
            except psutil.Error:
                continue
            self.peak = max(self.peak, sum(pss for pss, _ in found))
            self.peak_anonymous = max(self.peak_anonymous, sum(anonymous for _, anonymous in found))


def _memory(pid: int) -> tuple[int, int]:
    """(proportional set size, anonymous) bytes of one process; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
    return kib.get("Pss", 0) * 1024, kib.get("Anonymous", 0) * 1024


def run(command: list[str], *, timeout_s: float) -> Took:
    """Run a command to its end. SystemExit with what it said when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sampler = _Sampler(child.pid)
    try:
        out, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise SystemExit(f"no end after {timeout_s:.0f} s: {' '.join(command)}") from None
    finally:
        sampler.stop()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{out[-TAIL_CHARS:]}")
    return Took(
        seconds=seconds,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_bytes=sampler.peak,
        peak_anonymous_bytes=sampler.peak_anonymous,
        out=out,
    )


def apart(command: list[str], *, cold: list[Path], timeout_s: float) -> Took:
    """`run` in a process of its own: its children are the command's alone."""
    own = [sys.executable, "-m", "bench.command", "--timeout", str(timeout_s)]
    own += [text for folder in cold for text in ("--cold", str(folder))]
    done = subprocess.run(
        [*own, "--", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return Took(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Empty the cache of what the command will read, run it, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold", type=Path, action="append", default=[], help="drop cached pages of files below this")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    os.sync()
    for folder in args.cold:
        drop_cache(folder)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    print(json.dumps(vars(run(command, timeout_s=args.timeout))))


if __name__ == "__main__":
    main()
