"""What snapshots in memory cost a training loop when they choose their interval themselves. Run: `python -m bench.memory_pace`.

2 gloo ranks of one thread each, a node each, keep both cores busy with steps of 0.1 s on a GPT's state of 0.15 GB, so that all
that trainers and agents do for snapshots is taken from training. Loops without any checkpointing and loops with
`ckpt.Memory(every="auto")` in turn; the first snapshots, made before their cost is known, count as well.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import statistics
import time
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.jobs import Job
from bench.memory_tier import agents_below, node_folders, remove_nodes
from bench.ranks import Rank, run_ranks
from bench.workloads import gpt_shapes, nbytes, sharded
from ckpt.config import Memory

TARGET = 0.03  # of the time of a loop without checkpointing
STEP_S = 0.1


def body(rank: Rank, size: dict[str, int], steps: int, repeats: int) -> dict[str, Any]:
    """One rank: loops of both kinds in turn."""
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    job = Job(rank, sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True), workload="gpt")
    job.calibrate(STEP_S)
    plain: list[float] = []
    found: list[dict[str, float]] = []
    with node_folders(rank) as (runtime, _):
        _loop(rank, job, steps // 10, None)
        for turn in range(repeats):
            plain.append(_loop(rank, job, steps, None)["seconds"])
            memory = Memory(every="auto", parity=1, group_size=2, cost_max=TARGET)
            checkpointer = ckpt.Checkpointer(rank.folder / f"run-{turn}", every=1 << 40, memory=memory)
            try:
                checkpointer.prepare(job.state)
                found.append(_loop(rank, job, steps, checkpointer))
                checkpointer.close()
            finally:
                for pid in agents_below(runtime):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(rank.folder / f"run-{turn}", ignore_errors=True)
        plain.append(_loop(rank, job, steps, None)["seconds"])
    return {"plain_s": plain, "auto": found, "nbytes": nbytes(shapes), "step": job.facts()}


def _loop(rank: Rank, job: Job, steps: int, checkpointer: ckpt.Checkpointer | None) -> dict[str, float]:
    gc.collect()
    rank.together()
    last, kept, waiting = 0, [], []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        job.step()
        if checkpointer is not None and (pending := checkpointer.step(step, job.state)) is not None:
            waiting.append(pending)
            kept.append(step)
            last = step
    seconds = time.perf_counter() - start
    failed = sum(one.outcome(60.0) is not None for one in waiting)
    return {
        "seconds": rank.slowest(seconds),
        "snapshots": len(waiting),
        "failed": rank.slowest(failed),
        "last_every": float(kept[-1] - kept[-2]) if len(kept) > 1 else float(last),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=3)
    parser.add_argument("--steps", type=int, default=400, help="of one loop")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, steps, repeats = {"layers": 2, "width": 512, "vocabulary": 8000}, args.steps, args.repeats
    if args.tiny:
        size, steps, repeats = {"layers": 1, "width": 64, "vocabulary": 2570}, 30, 1
    with options.scratch(args.dir) as folder:
        try:
            found = run_ranks(body, 2, folder, size=size, steps=steps, repeats=repeats)
        finally:
            remove_nodes()
        made = options.report("memory_pace", folder, {**size, "steps": steps, "repeats": repeats}, {})
    plain, auto = found["plain_s"], found["auto"]
    around = [statistics.mean(plain[turn : turn + 2]) for turn in range(len(auto))]
    costs = [one["seconds"] / base - 1 for one, base in zip(auto, around, strict=True)]
    made["results"] = found | {"cost": costs, "cost_median": statistics.median(costs)}
    print(f"{found['nbytes'] / 1e9:.2f} GB, {steps} steps per loop, {found['step']}")
    print(f"loops without: {', '.join(f'{x:.2f}' for x in plain)} s")
    for one, cost in zip(auto, costs, strict=True):
        told = f"{one['snapshots']:.0f} snapshots, {one['failed']:.0f} not protected, at last every {one['last_every']:.0f} steps"
        print(f"with every=auto: {one['seconds']:.2f} s, {cost:+.1%}: {told}")
    noise = (max(plain) - min(plain)) / statistics.median(plain)
    print(f"cost {made['results']['cost_median']:.1%} (target {TARGET:.0%}); loops without differ by {noise:.1%}")
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
