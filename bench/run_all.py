"""All benchmarks one after the other, and one report. Run: `python -m bench [--json bench/results/NAME.json]`.

In: the options that all share. Out: tables on stdout, one JSON file. Each benchmark runs in processes of its own, so that none
measures what another left in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import options
from bench.machine import facts

BENCHMARKS = (
    "planning",
    "reshard_bytes",
    "small",
    "gpt",
    "training",
    "first",
    "host_memory",
    "s3",
    "erasure",
    "transport",
    "merge",
    "memory_tier",
    "memory_pace",
    "agent_memory",
)
TIMEOUT_S = 2 * 3600.0


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen ones and write the report."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    args = parser.parse_args(arguments)
    path = args.json or options.RESULTS / "latest.json"
    args.dir.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts(args.dir), "benchmarks": {name: _run(name, args) for name in args.only}}
    options.keep(found, path)
    print(f"report: {path}")


def _run(name: str, args: argparse.Namespace) -> object:
    print(f"\n== {name}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", f"bench.{name}", "--dir", str(args.dir), "--json", str(report)]
        command += ["--repeats", str(args.repeats), *(["--tiny"] if args.tiny else [])]
        if args.plot is not None:  # a picture for each benchmark
            command += ["--plot", str(_picture(args.plot, name))]
        subprocess.run(command, check=True, timeout=TIMEOUT_S)
        return json.loads(report.read_text())


def _picture(plot: Path, name: str) -> Path:
    return plot.with_name(f"{plot.stem}-{name}{plot.suffix or '.png'}")


if __name__ == "__main__":
    main()
