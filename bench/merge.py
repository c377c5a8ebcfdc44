"""Merging 8 snapshots of 1.08 GB (fp32) each, beside mere reading and writing, and beside mergekit. Run: `python -m bench.merge`.

Every run is a command of its own, from its start to its end, with cold files. Tasks:

- `checkpoints`: `ckpt merge` of 8 steps of one run, beside what this engine takes to read the same files and write as many bytes
  (`bench.merge_floor`). A target of the project: at least 90 % of that rate.
- `linear`, `ties`: folders of safetensors files, by `ckpt merge` and by `mergekit-yaml` (`--mergekit PATH`, or the variable
  CKPT_BENCH_MERGEKIT; it belongs in an environment of its own). Targets: 3 times faster, at a quarter of its peak memory.
  mergekit does not sync what it writes; ckpt does.

What starting takes (imports, mostly) is measured by the same command on tiny models, and taken off in `less_start_s`. Memory is
the sampled peak of the proportional set size of all processes of a command; mapped files count in it, so anonymous memory
stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import ckpt
from bench import options
from bench.command import Took, apart
from bench.merge_inputs import LARGE, STEP, TINY, Size, folders, make

RATE_TARGET, SPEED_TARGET, MEMORY_TARGET = 0.9, 3.0, 4.0
KEEP = 0.2  # of TIES
ROUNDING = 1e-6  # of numbers about 0.1 in size, in fp32
TIMEOUT_S = 1800.0
VARIABLE = "CKPT_BENCH_MERGEKIT"
METHODS = {
    "linear": ("--method", "uniform"),
    # As mergekit has it: the share of each tensor, and a positive sign where changes cancel.
    "ties": ("--method", "ties", "--set", "scope=tensor", "--set", f"keep={KEEP}", "--set", "zero_sign=positive"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command for one thing to do."""

    task: str
    system: str
    command: list[str]
    into: Path
    cold: list[Path]


def tasks_of(folder: Path, scratch: Path, num: int, mergekit: str | None) -> list[Task]:
    """All commands on the inputs in `folder`, in the order of a round."""
    models = [str(one) for one in folders(folder, num)]
    into, run, python = scratch / "out", folder / "run", [sys.executable]
    merge = [*python, "-m", "ckpt", "merge", "--quiet"]
    steps = f"{run}@{STEP}..{STEP * num}"
    out = [
        Task(task="checkpoints", system="ckpt", command=[*merge, steps, "-o", str(into)], into=into, cold=[run]),
        *(
            Task(
                task="checkpoints",
                system=f"read and write, {name}",
                command=[*python, "-m", "bench.merge_floor", kind, str(run), str(into)],
                into=into,
                cold=[run],
            )
            for kind, name in (("stream", "one pipeline"), ("calls", "calls"))
        ),
    ]
    for method, chosen in METHODS.items():
        base = ["--base", str(folder / "base")] if method == "ties" else []
        ours = [*merge, *models, *base, *chosen, "-o", str(into)]
        cold = [*map(Path, models), folder / "base"]
        out.append(Task(task=method, system="ckpt", command=ours, into=into, cold=cold))
        exported = [*ours, "--export", str(into / "model")]
        out.append(Task(task=method, system="ckpt, and export", command=exported, into=into, cold=cold))
        if mergekit is not None:
            config = scratch / f"{method}.yaml"
            config.write_text(json.dumps(mergekit_config(method, models, str(folder / "base"))))
            theirs = [mergekit, str(config), str(into), "--no-copy-tokenizer", "--quiet"]
            out.append(Task(task=method, system="mergekit", command=theirs, into=into, cold=cold))
    return out


def mergekit_config(method: str, models: list[str], base: str) -> dict[str, Any]:
    """What mergekit is told; JSON is YAML."""
    entries = [{"model": one, "parameters": {"weight": 1.0}} for one in models]
    if method == "linear":
        return {"merge_method": "linear", "models": entries, "parameters": {"normalize": True}, "dtype": "float32"}
    return {
        "merge_method": "ties",
        "models": entries,
        "base_model": base,
        "parameters": {"density": KEEP, "normalize": True, "int8_mask": False, "lambda": 1.0},
        "dtype": "float32",
    }


def results_of(into: Path) -> Mapping[str, torch.Tensor]:
    """The tensors that a command left, by the names of the models."""
    files = sorted(into.glob("*.safetensors"))
    if not files:
        with ckpt.open(into) as found:
            return {name.removeprefix("model/"): found[name][...] for name in found}
    out: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


def compared(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far two results are apart, over all elements."""
    assert ours.keys() == theirs.keys()
    differ = total = 0
    worst = 0.0
    for name, tensor in ours.items():
        other = theirs[name]
        differ += int(((tensor - other).abs() > ROUNDING).sum())
        total += tensor.numel()
        worst = max(worst, float((tensor - other).abs().max()))
    return {"share_that_differs": differ / total, "greatest_difference": worst}


def check_mean(found: Mapping[str, torch.Tensor], models: list[Path]) -> None:
    """A few tensors of a linear merge against NumPy."""
    for name in [*found][:: max(1, len(found) // 4)]:
        arrays = []
        for one in models:
            with safe_open(one / "model.safetensors", "np") as opened:
                arrays.append(opened.get_tensor(name).astype(np.float64))
        expected = (sum(arrays) / len(arrays)).astype(np.float32)
        assert np.array_equal(found[name].numpy(), expected), f"the mean of {name} is wrong"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=3)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument(
        "--mergekit", default=os.environ.get(VARIABLE), help=f"mergekit-yaml; or the variable {VARIABLE}"
    )
    parser.add_argument(
        "--inputs", type=Path, help="models to merge: made here when absent, and left for the next time"
    )
    parser.add_argument("--only-inputs", action="store_true", help="make them, and measure nothing")
    parser.add_argument("--tasks", nargs="+", default=["checkpoints", *METHODS], choices=["checkpoints", *METHODS])
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.mergekit is None:
        print(f"mergekit is left out: neither --mergekit nor {VARIABLE} says where it is")
    size, repeats = (TINY, 1) if args.tiny else (LARGE, args.repeats)
    options.check_space(args.dir, (4 if args.inputs else 2 * args.models + 4) * size.nbytes)
    with options.scratch(args.dir) as folder:
        inputs = args.inputs or folder / "large"
        if not inputs.exists():
            make(inputs, size, args.models)
        if args.only_inputs:
            return {}
        make(folder / "small", TINY, args.models)
        start = {name: took[0] for name, took in measured(folder / "small", folder, 1, args)[0].items()}
        found, same = measured(inputs, folder, repeats, args)
        made = options.report(
            "merge",
            folder,
            {**vars(size), "models": args.models, "repeats": repeats},
            summary(found, start, same, size),
        )
    show(made)
    options.keep(made, args.json, args.plot)
    return made


Runs = dict[tuple[str, str], list[Took]]


def measured(inputs: Path, scratch: Path, repeats: int, args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """Every command `repeats` times, in turn; what comes out the first time is compared."""
    tasks = [task for task in tasks_of(inputs, scratch, args.models, args.mergekit) if task.task in args.tasks]
    found: Runs = {}
    same: dict[str, Any] = {}
    for number in range(repeats):
        kept: dict[str, Mapping[str, torch.Tensor]] = {}
        for task in tasks:
            took = apart(task.command, cold=task.cold, timeout_s=TIMEOUT_S)
            found.setdefault((task.task, task.system), []).append(took)
            if number == 0 and task.task in METHODS and task.system in ("ckpt", "mergekit"):
                kept[task.task + task.system] = results_of(task.into)
                if (task.task, task.system) == ("linear", "ckpt"):
                    check_mean(kept[task.task + task.system], folders(inputs, args.models))
                if task.system == "mergekit":
                    same[task.task] = compared(kept.pop(task.task + "ckpt"), kept.pop(task.task + "mergekit"))
            shutil.rmtree(task.into)
    return found, same


def summary(found: Runs, start: Mapping[tuple[str, str], Took], same: dict[str, Any], size: Size) -> dict[str, Any]:
    """Medians and spreads, and the ratios of the targets."""
    rows: dict[str, dict[str, Any]] = {}
    for (task, system), runs in found.items():
        seconds = [took.seconds for took in runs]
        rows.setdefault(task, {})[system] = {
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
            "max_s": round(max(seconds), 3),
            "less_start_s": round(statistics.median(seconds) - start[task, system].seconds, 3),
            "cpu_s": round(statistics.median(took.cpu_s for took in runs), 3),
            "peak_mb": round(max(took.peak_bytes for took in runs) / 1e6, 1),
            "peak_anonymous_mb": round(max(took.peak_anonymous_bytes for took in runs) / 1e6, 1),
        }
    return {"results": rows, "ratios": _ratios(rows), "beside_mergekit": same, "model_bytes": size.nbytes}


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for task, systems in rows.items():
        ours = systems["ckpt"]
        for system, theirs in systems.items():
            if system.startswith("ckpt"):
                continue
            out.setdefault(task, {}).update(
                {
                    f"{system}: speed": round(theirs["median_s"] / ours["median_s"], 3),
                    f"{system}: speed, less start": round(theirs["less_start_s"] / max(ours["less_start_s"], 1e-3), 3),
                    f"{system}: memory": round(theirs["peak_mb"] / max(ours["peak_mb"], 1e-3), 2),
                    f"{system}: anonymous memory": round(
                        theirs["peak_anonymous_mb"] / max(ours["peak_anonymous_mb"], 1e-3), 2
                    ),
                }
            )
    return out


def show(made: dict[str, Any]) -> None:
    """Tables, and what the targets are."""
    print(f"{'task':<12} {'system':<30} {'median':>8} {'min':>8} {'max':>8} {'CPU':>8} {'peak MB':>9} {'anonymous':>9}")
    for task, systems in made["results"].items():
        for system, row in systems.items():
            cells = [f"{row[key]:>8.2f}" for key in ("median_s", "min_s", "max_s", "cpu_s")]
            print(f"{task:<12} {system:<30} {' '.join(cells)} {row['peak_mb']:>9.0f} {row['peak_anonymous_mb']:>9.0f}")
    for task, ratios in made["ratios"].items():
        for name, value in ratios.items():
            print(f"{task}: {name}: {value:.2f}")
    for task, facts in made["beside_mergekit"].items():
        print(f"{task}, beside mergekit: {facts}")
    print(
        f"targets: {RATE_TARGET} of the rate of read and write; beside mergekit {SPEED_TARGET} times faster, peak memory a "
        f"{MEMORY_TARGET:.0f}th"
    )


if __name__ == "__main__":
    main()
