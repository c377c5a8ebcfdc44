"""Many small tensors: 20,000 fp32 vectors of 64 to 4,096 elements, cut over 2 gloo ranks. Run: `python -m bench.small`.

Save, async save (stall and durable) and load of ckpt, of torch.distributed.checkpoint and, as floors, of safetensors with a sync
and of direct I/O, in turn in one run. Every system gets the same DTensors; what comes back is compared bit by bit once.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from bench import options
from bench.background import save_in_background, stall_ratio
from bench.floors import Direct, drop_cache
from bench.limits import limits, show_limits
from bench.measure import measure, remove, size_of
from bench.ranks import Rank, run_ranks
from bench.series import Table, add, ratios, show, summarize
from bench.systems import Dcp, DcpAsync, Ours, OursFenced, OursNewRun, Safetensors, System
from bench.workloads import check_equal, nbytes, scramble, sharded, small_shapes

STALL_TARGET = 50.0  # dcp.async_save's best variant over ours
TARGETS = {"save": 15.0, "load, cold": 12.0}  # times faster than DCP


def body(rank: Rank, num: int, repeats: int) -> dict[str, Any]:
    """One rank: all systems in turn, `repeats` + 1 times."""
    shapes = small_shapes(num)
    mesh = init_device_mesh("cpu", (rank.size,))
    placements = {name: (Shard(0),) for name in shapes}
    state = sharded(shapes, mesh, placements, fill=True)
    target = sharded(shapes, mesh, placements, fill=False)
    systems: list[System] = [Ours(), OursNewRun(), Dcp(), Safetensors(), Direct()]
    asynchronous = [OursFenced(), DcpAsync(keep=False), DcpAsync(keep=True)]
    table: Table = {}
    sizes: dict[str, dict[str, int]] = {}
    for step in range(repeats + 1):
        for system in systems:
            folder = rank.folder / system.name.replace(" ", "-")
            found = measure(rank, lambda s=system, f=folder, n=step: s.save(state, f, n))
            add(table, "save", system.name, found)
            if not isinstance(system, OursNewRun):
                scramble(target)
                rank.together()
                if rank.rank == 0:
                    drop_cache(folder)
                found = measure(rank, lambda s=system, f=folder, n=step: s.load(target, f, n))
                add(table, "load, cold", system.name, found)
                if step == 0:
                    check_equal(target, state, what=system.name)
            sizes.setdefault(system.name, size_of(folder))
            remove(rank, folder)
        for writer in asynchronous:
            save_in_background(rank, table, writer, state, step)
    for writer in asynchronous:
        if isinstance(writer, DcpAsync):
            writer.close()
    bounds = limits(rank, state)
    return {"results": summarize(table), "stored": sizes, "nbytes": nbytes(shapes), "limits": bounds}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--tensors", type=int, default=20_000)
    args = parser.parse_args(arguments)
    return run(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    num, repeats = (200, 1) if args.tiny else (args.tensors, args.repeats)
    with options.scratch(args.dir) as folder:
        found = run_ranks(body, 2, folder, num=num, repeats=repeats)
        found["ratios"] = ratios(found["results"], "ckpt")
        made = options.report("small", folder, {"tensors": num, "ranks": 2, "repeats": repeats}, found)
    print(show(found["results"], "ckpt"))
    for task, target in TARGETS.items():
        print(f"{task}: {found['ratios'][task]['dcp']:.1f} times faster than dcp (target {target:.0f})")
    print(f"stall: dcp.async_save takes {stall_ratio(found['results']):.1f} times as long (target {STALL_TARGET:.0f})")
    print(show_limits(found["limits"]))
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
