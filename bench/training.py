"""What training pays for checkpoints: the time of a loop with saves minus without. Run: `python -m bench.training`.

2 gloo ranks of one thread each keep both cores busy with steps of 0.1 s and of 0.5 s on the `gpt` state (1.74 GB, sharded), and
of 0.1 s on the `small` one (20,000 tensors). Every so many steps they save: with ckpt in the background and blocking, with
dcp.save, with dcp.async_save (with and without a stager that is kept). One loop of each in turn, and loops without saves before
and after each round. What is left to wait for when a loop has ended, its tail, is counted apart.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from bench import options
from bench.jobs import Job
from bench.limits import limits, show_limits
from bench.measure import remove
from bench.ranks import Rank, run_ranks
from bench.savers import DcpAsyncSaver, DcpSaver, OurSaver, Saver
from bench.workloads import gpt_shapes, nbytes, sharded, small_shapes

COPIES = 5  # of the state, on disk or in memory at one time, with some room; more with every save of a loop
TARGETS = {  # figure: how many times ours it should be
    "gpt": {"overhead": {"dcp.async_save": 6.0, "dcp.save": 4.0}, "stall": {"dcp.async_save": 10.0}},
    "small": {"stall": {"dcp.async_save": 50.0}},
}


@dataclass(kw_only=True)
class Loops:
    """All loops of one system."""

    seconds: list[float] = field(default_factory=list)  # of the slowest rank, until its last step
    overhead_s: list[float] = field(default_factory=list)  # per save: over the loops without saves of the same round
    cpu_s: list[float] = field(default_factory=list)  # of all ranks, the tail included
    cpu_extra_s: list[float] = field(default_factory=list)  # per save: over the same
    tail_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)  # one per save: of the slowest rank
    step_s: list[float] = field(default_factory=list)  # median of each loop
    noise_s: list[float] = field(default_factory=list)  # per save: by how much the loops without saves differ
    load_average: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        lists = {"loop": self.seconds, "overhead": self.overhead_s, "cpu": self.cpu_s, "cpu_extra": self.cpu_extra_s}
        lists |= {"tail": self.tail_s, "stall": self.stall_s, "step": self.step_s, "noise": self.noise_s}
        out: dict[str, Any] = {f"{name}_median_s": round(statistics.median(x), 4) for name, x in lists.items() if x}
        for name in ("overhead", "stall"):
            if lists[name]:
                out |= {f"{name}_min_s": round(min(lists[name]), 4), f"{name}_max_s": round(max(lists[name]), 4)}
        return out | {"loops": len(self.seconds), "load_average_median": round(statistics.median(self.load_average), 2)}


def body(rank: Rank, workload: str, size: dict[str, int], step_s: float, steps: int, every: int, repeats: int) -> Any:
    """One rank: rounds of loops, and a first round that does not count."""
    shapes = gpt_shapes(**size) if workload == "gpt" else small_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    tensors = sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True)
    bounds = limits(rank, tensors)
    job = Job(rank, tensors, workload=workload)
    job.calibrate(step_s)
    background = [DcpAsyncSaver(keep=False), DcpAsyncSaver(keep=True)]
    savers: list[Saver] = [OurSaver(background=True), *background]
    if workload == "gpt":
        savers += [OurSaver(background=False), DcpSaver()]
    table: dict[str, Loops] = {}
    for turn in range(repeats + 1):
        found = {saver.name: _loop(rank, job, saver, steps, every) for saver in (Saver(), *savers)}
        found["nothing, after"] = _loop(rank, job, Saver(), steps, every)
        if turn or not repeats:
            _add(table, found, steps // every)
    for saver in background:
        saver.end()
    results = {name: loops.summary() for name, loops in table.items()}
    return {"results": results, "nbytes": nbytes(shapes), "tensors": len(shapes), "step": job.facts(), "limits": bounds}


def _loop(rank: Rank, job: Job, saver: Saver, steps: int, every: int) -> dict[str, Any]:
    """One loop with one system."""
    folder = rank.folder / "loop"
    saver.start(job, folder, every)
    gc.collect()
    if rank.rank == 0:
        os.sync()
    load = os.getloadavg()[0]
    rank.together()
    cpu_before, start = time.process_time(), time.perf_counter()
    ends = [start]
    for step in range(1, steps + 1):
        job.step()
        saver.after(step, step % every == 0)
        ends.append(time.perf_counter())
    stalls = saver.finish()
    tail_s = time.perf_counter() - ends[-1]
    cpu_s = time.process_time() - cpu_before
    found = {
        "seconds": rank.slowest(ends[-1] - start),
        "cpu_s": rank.total(cpu_s),
        "tail_s": rank.slowest(tail_s),
        "stall_s": [rank.slowest(stall) for stall in stalls],
        "step_s": statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)),
        "load_average": load,
    }
    saver.close()
    remove(rank, folder)
    return found


def _add(table: dict[str, Loops], found: dict[str, dict[str, Any]], saves: int) -> None:
    """One round: overheads are over the mean of the loops without saves at its two ends."""
    plain = [found["nothing"], found.pop("nothing, after")]
    seconds, cpu_s = (statistics.mean(loop[key] for loop in plain) for key in ("seconds", "cpu_s"))
    for name, loop in found.items():
        loops = table.setdefault(name, Loops())
        for key in ("seconds", "cpu_s", "tail_s", "step_s", "load_average"):
            getattr(loops, key).append(loop[key])
        loops.stall_s += loop["stall_s"]
        if name == "nothing":
            loops.noise_s.append(abs(plain[0]["seconds"] - plain[1]["seconds"]) / saves)
        else:
            loops.overhead_s.append((loop["seconds"] - seconds) / saves)
            loops.cpu_extra_s.append((loop["cpu_s"] - cpu_s) / saves)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figure -> peer -> the best of its variants over ours."""
    out: dict[str, dict[str, float]] = {}
    for figure in ("overhead", "stall", "cpu_extra"):
        key, ours = f"{figure}_median_s", results["ckpt"].get(f"{figure}_median_s", 0.0)
        for peer in ("dcp.async_save", "dcp.save"):
            theirs = [row[key] for name, row in results.items() if name.split(",")[0] == peer and key in row]
            if theirs and ours > 0:
                out.setdefault(figure, {})[peer] = round(min(theirs) / ours, 2)
    return out


def show(title: str, found: dict[str, Any]) -> str:
    """A table of all systems."""
    columns = ("overhead", "stall", "tail", "cpu_extra", "step", "loop")
    lines = [f"\n{title}: {found['step']}", f"{'system':<28}" + "".join(f"{column + ' s':>13}" for column in columns)]
    for name, row in found["results"].items():
        figures = [f"{row[f'{c}_median_s']:13.3f}" if f"{c}_median_s" in row else f"{'-':>13}" for c in columns]
        lines.append(f"{name:<28}" + "".join(figures))
    for figure, targets in TARGETS[title.split(",")[0]].items():
        for peer, target in targets.items():
            ratio = found["ratios"].get(figure, {}).get(peer)
            told = "ours is lost in the noise" if ratio is None else f"{peer} takes {ratio:.1f} times as much"
            lines.append(f"{figure}: {told} (target {target:.0f})")
    noise = found["results"]["nothing"]["noise_median_s"]
    lines.append(f"noise: loops without saves differ by {noise:.3f} s per save")
    return "\n".join([*lines, show_limits(found["limits"])])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=3)
    parser.add_argument("--workloads", nargs="+", choices=["gpt", "small"], default=["gpt", "small"])
    parser.add_argument(
        "--step-s", nargs="+", type=float, default=[0.1, 0.5], help="seconds of a step; small: the first"
    )
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--every", type=int, default=15)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"gpt": {"layers": 12, "width": 768}, "small": {"num": 20_000}}
    steps, every, repeats, step_s = args.steps, args.every, args.repeats, args.step_s
    if args.tiny:
        sizes = {"gpt": {"layers": 1, "width": 32, "vocabulary": 257}, "small": {"num": 100}}
        steps, every, repeats, step_s = 6, 2, 0, [0.01, 0.02]
    options.check_space(args.dir, (COPIES + steps // every) * nbytes(gpt_shapes(**sizes["gpt"])))
    variants: dict[str, Any] = {}
    with options.scratch(args.dir) as folder:
        for workload in args.workloads:
            for seconds in step_s if workload == "gpt" else step_s[:1]:
                title = f"{workload}, steps of {seconds} s"
                found = run_ranks(
                    body, 2, folder, workload=workload, size=sizes[workload],
                    step_s=seconds, steps=steps, every=every, repeats=repeats,
                )  # fmt: skip
                found["ratios"] = ratios(found["results"])
                variants[title] = found
                print(show(title, found), flush=True)
        chosen = {"ranks": 2, "steps": steps, "every": every, "repeats": repeats}
        made = options.report("training", folder, chosen, {"variants": variants})
    made["bars"] = [
        _bars(title, found, figure) for title, found in variants.items() for figure in ("overhead", "stall")
    ]
    options.keep(made, args.json, args.plot)
    return made


def _bars(title: str, found: dict[str, Any], figure: str) -> dict[str, Any]:
    key = f"{figure}_median_s"
    values = {name: row[key] for name, row in found["results"].items() if key in row}
    return {"title": f"{title}: {figure} per save", "unit": "s", "values": values}


if __name__ == "__main__":
    main()
