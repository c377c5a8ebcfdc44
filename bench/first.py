"""The first save of a process beside its later ones. Run: `python -m bench.first`.

In each repeat 2 gloo ranks start anew with the `gpt` state (1.74 GB), make a checkpointer, restore (there is nothing yet, so that
it only gets ready), and save: blocking, or in the background and waiting until it is durable. Beside them ckpt without getting
ready (`ckpt.save` at once), and dcp.save. Two processes of their own per system and repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.jobs import Job
from bench.limits import limits, show_limits
from bench.measure import measure, remove
from bench.ranks import Rank, run_ranks
from bench.workloads import gpt_shapes, nbytes, sharded

SYSTEMS = ("ckpt, blocking", "ckpt, background", "ckpt, not prepared", "dcp.save")
COPIES = 5  # of the state, on disk or in memory at one time, with some room
TARGET = 1.5  # the first save over the median of the others


def body(rank: Rank, system: str, size: dict[str, int], saves: int) -> dict[str, Any]:
    """One rank: save some times in a row. The stalls are those of saves in the background."""
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    job = Job(rank, sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True), workload="gpt")
    folder, stalls = rank.folder / "first", list[float]()
    start = time.perf_counter()
    save, close = _saver(system, job, folder, stalls)
    prepared_s = rank.slowest(time.perf_counter() - start)
    seconds = [measure(rank, lambda n=step: save(n)).seconds for step in range(saves)]
    close()
    slowest = [rank.slowest(stall) for stall in stalls]
    remove(rank, folder)
    return {
        "seconds": seconds,
        "stall_s": slowest,
        "prepared_s": prepared_s,
        "limits": limits(rank, job.tensors, repeats=1),
    }


def _saver(
    system: str, job: Job, folder: Any, stalls: list[float]
) -> tuple[Callable[[int], object], Callable[[], object]]:
    """What saves a step, and what ends it all."""
    if system == "dcp.save":
        return (lambda n: dcp.save(dict(job.tensors), checkpoint_id=folder / f"dcp-{n}")), (lambda: None)
    if system == "ckpt, not prepared":
        return (lambda n: ckpt.save(job.state, folder / "run", step=n)), (lambda: None)
    checkpointer = ckpt.Checkpointer(folder / "run", every=1, background=system == "ckpt, background", keep_last=1)
    checkpointer.restore(job.state)

    def save(step: int) -> None:
        pending = checkpointer.step(step, job.state)
        assert pending is not None
        pending.wait()
        stalls.append(pending.stall_s)

    return save, checkpointer.close


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--saves", type=int, default=6, help="of each process, the first one included")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, repeats, saves = {"layers": 12, "width": 768}, args.repeats, args.saves
    if args.tiny:
        size, repeats, saves = {"layers": 1, "width": 32, "vocabulary": 257}, 1, 3
    options.check_space(args.dir, (COPIES + saves) * nbytes(gpt_shapes(**size)))
    found: dict[str, list[dict[str, Any]]] = {}
    with options.scratch(args.dir) as folder:
        for _ in range(repeats):
            for system in SYSTEMS:
                found.setdefault(system, []).append(run_ranks(body, 2, folder, system=system, size=size, saves=saves))
        results = {system: _summary(runs) for system, runs in found.items()}
        limits_found = found[SYSTEMS[0]][-1]["limits"]
        made = options.report("first", folder, {**size, "ranks": 2, "repeats": repeats, "saves": saves}, {})
    made |= {"results": results, "limits": limits_found}
    made["bars"] = [{"title": "first save over the later ones", "unit": "", "values": _column(results, "first_ratio")}]
    for system, row in results.items():
        print(
            f"{system:<22} first {row['first_s']:.3f} s, later {row['later_s']:.3f} s: {row['first_ratio']:.2f} times",
            end="",
        )
        print(f" (target {TARGET}); getting ready took {row['prepared_s']:.3f} s")
    print(show_limits(limits_found))
    options.keep(made, args.json, args.plot)
    return made


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the processes: of the first save, of the median of the others, and of the ratio of the two."""
    firsts, laters = [r["seconds"][0] for r in runs], [statistics.median(r["seconds"][1:]) for r in runs]
    out = {
        "first_s": statistics.median(firsts),
        "later_s": statistics.median(laters),
        "first_ratio": statistics.median(a / b for a, b in zip(firsts, laters, strict=True)),
        "prepared_s": statistics.median(r["prepared_s"] for r in runs),
    }
    stalls = [r["stall_s"] for r in runs if r["stall_s"]]
    if stalls:
        out["first_stall_s"] = statistics.median(s[0] for s in stalls)
        out["later_stall_s"] = statistics.median(statistics.median(s[1:]) for s in stalls)
    return {key: round(value, 4) for key, value in out.items()}


def _column(results: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    return {name: row[key] for name, row in results.items()}


if __name__ == "__main__":
    main()
