"""What snapshots in memory cost a training loop when they choose their interval themselves. Run: `python -m bench.memory_pace`.

2 gloo ranks of one thread each, a node each, keep both cores busy with steps of 0.1 s on a GPT's state of 0.15 GB, so that all
that trainers and agents do for snapshots is taken from training. One job with `ckpt.Memory(every="auto")` finds its interval in
a first loop; then short loops without any call of ckpt and with it take turns, many times, so that what other users of the
machine do falls on both alike. Three figures: the loops beside those before and after them; by how much steps that a snapshot
touched are longer than their neighbours in the same loop; and the processor time of the agents as a share of both cores.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.jobs import Job
from bench.memory_tier import agents_below, node_folders, remove_nodes
from bench.ranks import Rank, run_ranks
from bench.workloads import gpt_shapes, nbytes, sharded
from ckpt.config import Memory
from ckpt.engine.pending import PendingSave

TARGET = 0.03  # of the time of a loop without checkpointing
STEP_S = 0.1


_NEIGHBOURS = 15  # steps to each side that a touched step is compared with


def body(rank: Rank, size: dict[str, int], learning: int, steps: int, repeats: int) -> dict[str, Any]:
    """One rank: a loop to learn in, then loops of both kinds in turn."""
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    job = Job(rank, sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True), workload="gpt")
    job.calibrate(STEP_S)
    plain: list[float] = []
    found: list[dict[str, float]] = []
    with node_folders(rank) as (runtime, _):
        _loop(rank, job, steps, None)
        memory = Memory(every="auto", parity=1, group_size=2, cost_max=TARGET)
        checkpointer = ckpt.Checkpointer(rank.folder / "run", every=1 << 40, memory=memory)
        try:
            checkpointer.prepare(job.state)
            series = Series(checkpointer)
            first = _loop(rank, job, learning, series)
            for _ in range(repeats):
                plain.append(_loop(rank, job, steps, None)["step_s"])
                found.append(_loop(rank, job, steps, series))
            plain.append(_loop(rank, job, steps, None)["step_s"])
            checkpointer.close()
        finally:
            for pid in agents_below(runtime):
                os.kill(pid, signal.SIGKILL)
    return {
        "first": first,
        "plain_step_s": plain,
        "auto": found,
        "nbytes": nbytes(shapes),
        "step": job.facts(),
    }


class Series:
    """The steps of one job, over many loops."""

    def __init__(self, checkpointer: ckpt.Checkpointer) -> None:
        self._checkpointer = checkpointer
        self.number = 0
        self.pending: list[PendingSave] = []
        self.at: list[int] = []  # steps with a snapshot
        (pid,) = agents_below(Path(os.environ["CKPT_AGENT_RUNTIME_FOLDER"]))
        self.agent = psutil.Process(pid)

    def step(self, state: dict[str, Any]) -> bool:
        """Whether a snapshot was begun, or is on its way."""
        self.number += 1
        pending = self._checkpointer.step(self.number, state)
        if pending is not None:
            self.pending.append(pending)
            self.at.append(self.number)
        return self.is_busy

    @property
    def is_busy(self) -> bool:
        return bool(self.pending) and not self.pending[-1].done()


def _loop(rank: Rank, job: Job, steps: int, series: Series | None) -> dict[str, float]:
    """`steps` steps, and as many more as the last snapshot needs to be over."""
    gc.collect()
    rank.together()
    before = (len(series.pending), _cpu_s(series.agent)) if series else (0, 0.0)
    seconds: list[float] = []
    touched: list[bool] = []
    was_busy, start = False, time.perf_counter()
    while len(seconds) < steps or (series is not None and rank.slowest(series.is_busy)):
        begun = time.perf_counter()
        job.step()
        is_busy = series is not None and series.step(job.state)
        seconds.append(time.perf_counter() - begun)
        touched.append(was_busy or is_busy)
        was_busy = is_busy
    total = rank.slowest(time.perf_counter() - start)
    made = {"step_s": total / len(seconds), "steps": float(len(seconds))}
    if series is None:
        return made
    agents_s = rank.total(_cpu_s(series.agent) - before[1])
    failed = sum(one.outcome(60.0) is not None for one in series.pending[before[0] :])
    return made | {
        "snapshots": float(len(series.pending) - before[0]),
        "failed": rank.slowest(failed),
        "every": float(series.at[-1] - series.at[-2]) if len(series.at) > 1 else 0.0,
        "by_touched": rank.slowest(_longer(seconds, touched) / sum(seconds)),
        "agents_share": agents_s / (total * rank.size),
    }


def _longer(seconds: list[float], touched: list[bool]) -> float:
    """Seconds by which touched steps are longer than the untouched ones around them."""
    out = 0.0
    for at in range(len(seconds)):
        around = range(max(0, at - _NEIGHBOURS), min(len(seconds), at + _NEIGHBOURS + 1))
        plain = [seconds[i] for i in around if not touched[i]]
        if touched[at] and plain:
            out += seconds[at] - statistics.median(plain)
    return out


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=12)
    parser.add_argument(
        "--learning", type=int, default=400, help="steps of the first loop, in which the interval is found"
    )
    parser.add_argument("--steps", type=int, default=140, help="of each loop after that")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, repeats = {"layers": 2, "width": 512, "vocabulary": 8000}, args.repeats
    of = {"learning": getattr(args, "learning", 400), "steps": getattr(args, "steps", 140)}
    if args.tiny:
        size, repeats, of = {"layers": 1, "width": 64, "vocabulary": 2570}, 2, {"learning": 40, "steps": 20}
    with options.scratch(args.dir) as folder:
        try:
            found = run_ranks(body, 2, folder, size=size, repeats=repeats, **of)
        finally:
            remove_nodes()
        made = options.report("memory_pace", folder, {**size, **of, "repeats": repeats}, {})
    plain, auto = found["plain_step_s"], found["auto"]
    costs = [one["step_s"] * 2 / (plain[turn] + plain[turn + 1]) - 1 for turn, one in enumerate(auto)]
    shares = {"loops": costs} | {name: [one[name] for one in auto] for name in ("by_touched", "agents_share")}
    median = {name: statistics.median(values) for name, values in shares.items()}
    mean = {name: statistics.mean(values) for name, values in shares.items()}
    made["results"] = found | {"cost_by_loops": costs, "median": median, "mean": mean}
    snapshots, failed = (sum(one[name] for one in auto) for name in ("snapshots", "failed"))
    print(f"{found['nbytes'] / 1e9:.2f} GB, steps of {statistics.median(plain):.3f} s without ckpt, {found['step']}")
    print(f"{snapshots:.0f} snapshots, {failed:.0f} not protected, at last every {auto[-1]['every']:.0f} steps")
    for name, values in shares.items():
        middle = sorted(values)[len(values) // 4 : len(values) - len(values) // 4]
        spread = f"middle half {middle[0]:+.1%} to {middle[-1]:+.1%}, all {min(values):+.1%} to {max(values):+.1%}"
        print(f"{name:13} median {median[name]:+.2%}, mean {mean[name]:+.2%} ({spread})")
    noise = (max(plain) - min(plain)) / statistics.median(plain)
    print(f"target {TARGET:.0%}; loops without differ by {noise:.1%}; the first loop: {found['first']}")
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
