"""A GPT of 124M parameters, cut as FSDP2 does over 2 gloo ranks, 1.74 GB. Run: `python -m bench.gpt`.

bf16 parameters, fp32 master copies and both moments of Adam: 592 sharded tensors. Save, async save (stall and durable), load
on the same layout, on one rank and tensor-parallel, from disk and from the page cache; ckpt and torch.distributed.checkpoint
in turn in one run, and as floors safetensors with a sync and direct I/O. What comes back is compared bit by bit once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.background import save_in_background, stall_ratio
from bench.floors import Direct, DirectImages, drop_cache, warm_cache
from bench.limits import limits, show_limits
from bench.measure import Measured, measure, remove, size_of
from bench.ranks import Rank, run_ranks
from bench.series import Table, add, ratios, show, summarize
from bench.systems import Dcp, DcpAsync, Ours, OursFenced, OursNewRun, Phases, Safetensors
from bench.workloads import State, check_equal, gpt_shapes, local_of, nbytes, plain, scramble, sharded, tp_placement

STALL_TARGET = 10.0  # dcp.async_save's best variant over ours
LONG_PASS_S = 0.5  # between a save and the next step, beside the usual 0.1
_ROOM_BYTES = 64 << 20  # header and objects of an image
COPIES = 6  # of the state, on disk or in memory at one time, with some room


class _Loads:
    """The three targets of a load, each with the values that it must hold afterwards."""

    def __init__(self, rank: Rank, shapes: Any, state: State) -> None:
        mesh = init_device_mesh("cpu", (rank.size,))
        tp = {name: (tp_placement(name),) for name in shapes}
        fsdp = {name: (Shard(0),) for name in shapes}
        self._rank, self._shapes = rank, shapes
        self._alone = dist.new_group([0])
        self._targets = {
            "same layout": (sharded(shapes, mesh, fsdp, fill=False), lambda: state),
            "to TP": (sharded(shapes, mesh, tp, fill=False), lambda: sharded(shapes, mesh, tp, fill=True)),
        }
        self._whole = plain(shapes, fill=False) if rank.rank == 0 else {}

    def all(self) -> list[str]:
        return [*self._targets, "to 1 rank"]

    def run(self, kind: str, system: Ours | Dcp, folder: Path, step: int) -> Measured:
        """Load one target. All ranks call; ranks without a target wait."""
        if kind != "to 1 rank":
            state = self._targets[kind][0]
            scramble(state)
            return measure(self._rank, lambda: system.load(state, folder, step))
        scramble(self._whole)
        return measure(self._rank, lambda: self._load_alone(system, folder, step))

    def _load_alone(self, system: Ours | Dcp, folder: Path, step: int) -> Phases:
        if self._rank.rank != 0:
            return {}
        if isinstance(system, Dcp):
            return system.load_alone(self._whole, folder, step)
        group = self._alone
        return ckpt.load({"model": self._whole}, folder / "run", step=step, process_group=group).seconds

    def check(self, kind: str, system: str) -> None:
        """What was loaded is what was saved."""
        if kind != "to 1 rank":
            found, expected = self._targets[kind]
            check_equal(found, expected(), what=f"{system}, {kind}")
        elif self._rank.rank == 0:
            check_equal(self._whole, plain(self._shapes, fill=True), what=f"{system}, {kind}")


def body(rank: Rank, size: dict[str, int], repeats: int) -> dict[str, Any]:
    """One rank: all systems in turn, `repeats` + 1 times."""
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    state = sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True)
    loads = _Loads(rank, shapes, state)
    table: Table = {}
    sizes: dict[str, dict[str, int]] = {}
    asynchronous = [OursFenced(), OursFenced(LONG_PASS_S), DcpAsync(keep=False), DcpAsync(keep=True)]
    direct, images = Direct(), DirectImages(sum(local_of(t).nbytes for t in state.values()) + _ROOM_BYTES)
    for step in range(repeats + 1):
        for system in (Ours(), OursNewRun(), Dcp(), Safetensors(), direct):
            folder = rank.folder / system.name.replace(" ", "-").replace("/", "-")
            add(table, "save", system.name, measure(rank, _call(system.save, state, folder, step)))
            sizes.setdefault(system.name, size_of(folder))
            if isinstance(system, Dcp) or type(system) is Ours:
                _load_all(rank, table, loads, system, folder, step)
                if not isinstance(system, Dcp):
                    _read_images(rank, table, images, folder, step)
            elif not isinstance(system, OursNewRun):
                _load_own(rank, table, state, loads, system, folder, step)
            remove(rank, folder)
        for writer in asynchronous:
            save_in_background(rank, table, writer, state, step)
    for writer in asynchronous:
        if isinstance(writer, DcpAsync):
            writer.close()
    bounds = limits(rank, state)
    return {
        "results": summarize(table),
        "stored": sizes,
        "nbytes": nbytes(shapes),
        "tensors": len(shapes),
        "limits": bounds,
    }


def _call(work: Callable[..., Phases], *arguments: Any) -> Callable[[], Phases]:
    return lambda: work(*arguments)


def _load_all(rank: Rank, table: Table, loads: _Loads, system: Ours | Dcp, folder: Path, step: int) -> None:
    for cache in ("cold", "warm"):
        for kind in loads.all():
            rank.together()
            if rank.rank == 0:
                (drop_cache if cache == "cold" else warm_cache)(folder)
            add(table, f"load {kind}, {cache}", system.name, loads.run(kind, system, folder, step))
            if step == 0 and cache == "cold":
                loads.check(kind, system.name)


def _read_images(rank: Rank, table: Table, images: DirectImages, folder: Path, step: int) -> None:
    rank.together()
    if rank.rank == 0:
        drop_cache(folder)
    add(table, "load same layout, cold", images.name, measure(rank, lambda: images.load(folder, step)))


def _load_own(rank: Rank, table: Table, state: State, loads: _Loads, system: Any, folder: Path, step: int) -> None:
    """A floor that can only read its own files back, into the state that they came from."""
    for cache in ("cold", "warm"):
        rank.together()
        if rank.rank == 0:
            (drop_cache if cache == "cold" else warm_cache)(folder)
        add(table, f"load same layout, {cache}", system.name, measure(rank, lambda: system.load(state, folder, step)))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size = {"layers": args.layers, "width": args.width, "vocabulary": 50257}
    repeats = args.repeats
    if args.tiny:
        size, repeats = {"layers": 1, "width": 32, "vocabulary": 257}, 1
    options.check_space(args.dir, COPIES * nbytes(gpt_shapes(**size)))
    with options.scratch(args.dir) as folder:
        found = run_ranks(body, 2, folder, size=size, repeats=repeats)
        found["ratios"] = ratios(found["results"], "ckpt")
        made = options.report("gpt", folder, {**size, "ranks": 2, "repeats": repeats, "cold": "fadvise"}, found)
    print(show(found["results"], "ckpt"))
    print(f"{found['nbytes'] / 1e9:.3f} GB in {found['tensors']} tensors")
    print(f"stall: dcp.async_save takes {stall_ratio(found['results']):.1f} times as long (target {STALL_TARGET:.0f})")
    print(show_limits(found["limits"]))
    for task, row in found["ratios"].items():
        print(f"{task}: dcp takes {row['dcp']:.2f} times as long (target at least 1)")
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
