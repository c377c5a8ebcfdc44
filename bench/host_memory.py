"""Host memory of saves in the background, beside the stated budget. Run: `python -m bench.host_memory`.

2 gloo ranks hold the `gpt` state (1.74 GB) and save it again and again without a pause, so that all images that the options
allow are in use. Counted is the peak of resident memory of a rank over that of a step of the optimizer after a first small save
(libraries loaded, threads running, what the step itself takes for a moment). The budget is `images_max` times the rank's part of
the state. dcp.async_save stands beside.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.jobs import Job, local_bytes
from bench.limits import limits, show_limits
from bench.machine import peak_rss, peak_rss_reset
from bench.measure import remove
from bench.ranks import Rank, run_ranks
from bench.savers import DcpAsyncSaver
from bench.workloads import gpt_shapes, nbytes, sharded
from ckpt.config import Options

SYSTEMS = {"ckpt, 1 image": 1, "ckpt, 2 images": 2, "dcp.async_save": 0, "dcp.async_save, stager kept": 0}
COPIES = 5  # of the state, on disk or in memory at one time, with some room
TARGET = 1.05  # peak over budget


def body(rank: Rank, system: str, size: dict[str, int], saves: int) -> dict[str, Any]:
    """One rank of fresh processes."""
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    job = Job(rank, sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True), workload="gpt")
    bounds = limits(rank, job.tensors, repeats=1)
    folder = rank.folder / "memory"
    save = _dcp if system.startswith("dcp") else _ours
    extra = save(rank, job, folder, SYSTEMS[system], saves, system)
    remove(rank, folder)
    local = rank.slowest(local_bytes(job.tensors))
    return {"extra_bytes": rank.slowest(extra), "local_bytes": local, "limits": bounds}


def _ours(rank: Rank, job: Job, folder: Path, images: int, saves: int, system: str) -> float:
    chosen = Options(images_max=images)
    ckpt.async_save({"warm": {"up": torch.ones(1000)}}, folder / "warm-up", step=0, options=chosen).wait()
    before = _baseline(rank, job)
    with ckpt.Checkpointer(folder / "run", every=1, keep_last=1, options=chosen) as checkpointer:
        checkpointer.restore(job.state)
        for step in range(saves):
            checkpointer.step(step, job.state)
            job.optimizer.step()  # waits at the fence: the next save copies into another image
    return peak_rss() - before


def _dcp(rank: Rank, job: Job, folder: Path, images: int, saves: int, system: str) -> float:
    saver = DcpAsyncSaver(keep="kept" in system)
    small = Job(rank, {"up": torch.ones(1000)}, workload="small")
    saver.start(small, folder / "warm-up", 1)
    saver.after(0, due=True)
    saver.finish()
    before = _baseline(rank, job)
    saver.start(job, folder, 1)
    for step in range(saves):
        saver.after(step, due=True)
    saver.finish()
    saver.end()
    return peak_rss() - before


def _baseline(rank: Rank, job: Job) -> int:
    """What training itself takes at most."""
    gc.collect()
    rank.together()
    peak_rss_reset()
    job.optimizer.step()
    rank.together()
    return peak_rss()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=3)
    parser.add_argument("--saves", type=int, default=4)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, repeats = {"layers": 12, "width": 768}, args.repeats
    if args.tiny:
        size, repeats = {"layers": 1, "width": 64, "vocabulary": 2570}, 1
    options.check_space(args.dir, (COPIES + args.saves) * nbytes(gpt_shapes(**size)))
    runs: dict[str, list[dict[str, Any]]] = {}
    with options.scratch(args.dir) as folder:
        for _ in range(repeats):
            for name in SYSTEMS:
                found = run_ranks(body, 2, folder, system=name, size=size, saves=args.saves)
                runs.setdefault(name, []).append(found)
        made = options.report("host_memory", folder, {**size, "ranks": 2, "repeats": repeats, "saves": args.saves}, {})
    made["limits"] = runs["ckpt, 2 images"][-1]["limits"]
    made["results"] = {name: _summary(SYSTEMS[name], found) for name, found in runs.items()}
    extra = {name: row["extra_mb"] for name, row in made["results"].items()}
    made["bars"] = [{"title": "peak over the baseline, one rank", "unit": "MB", "values": extra}]
    for name, row in made["results"].items():
        budget = (
            f"budget {row['budget_mb']:.0f} MB: {row['over_budget']:.3f} times (target {TARGET})"
            if row["budget_mb"]
            else ""
        )
        print(
            f"{name:<28} {row['extra_mb']:8.1f} MB over the baseline, {row['over_state']:.2f} of the rank's state; {budget}"
        )
    print(show_limits(made["limits"]))
    options.keep(made, args.json, args.plot)
    return made


def _summary(images: int, found: list[dict[str, Any]]) -> dict[str, float]:
    """The worst of all runs: a budget is one that holds."""
    extra, local = max(run["extra_bytes"] for run in found), found[0]["local_bytes"]
    return {
        "extra_mb": round(extra / 1e6, 1),
        "budget_mb": round(images * local / 1e6, 1),
        "over_budget": round(extra / (images * local), 3) if images else 0.0,
        "over_state": round(extra / local, 3),
    }


if __name__ == "__main__":
    main()
