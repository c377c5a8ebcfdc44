"""Save and load through S3, beside what the same client moves as bare objects. Run: `python -m bench.s3`.

`rclone serve s3` on loopback, 2 gloo ranks, a sharded GPT state. The floor moves objects of the very sizes that ckpt's
checkpoint has, with the same client, part size and number of requests in flight, from and into memory that is there: no plan, no
checksum, no commit. In turn in one run. The server takes its share of the same cores.
"""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.limits import limits, show_limits
from bench.measure import measure
from bench.ranks import Rank, run_ranks
from bench.series import Table, add, ratios, show, summarize
from bench.systems import Phases
from bench.workloads import check_equal, gpt_shapes, nbytes, scramble, sharded
from ckpt.config import Options
from ckpt.store.base import Store
from ckpt.store.open import open_store
from tests.servers import rclone_server

COPIES = 5  # of the state, on disk or in memory at one time, with some room
TARGET = 0.87  # the floor's seconds over ours: within 15 %
FLOOR = "bare objects"


class Bare:
    """Objects of given sizes, moved by the store that ckpt uses: one writer per object, as many reads at a time."""

    def __init__(self, store: Store, chosen: Options, sizes: dict[str, int]) -> None:
        self._store, self._options, self._sizes = store, chosen, sizes
        self._memory = {key: np.ones(size, np.uint8) for key, size in sizes.items()}

    def save(self, prefix: str) -> None:
        for key, size in self._sizes.items():
            writer = self._store.open_writer(f"{prefix}/{key}", nbytes=size)
            memory, chunk = memoryview(self._memory[key]), self._options.chunk_bytes
            for start in range(0, size, chunk):
                writer.write(memory[start : start + chunk])
            writer.commit()

    def load(self, prefix: str) -> None:
        step = self._options.read_bytes_max
        with ThreadPoolExecutor(self._options.read_threads) as pool:
            reads = [
                pool.submit(self._store.read_into, f"{prefix}/{key}", start, memoryview(memory)[start : start + step])
                for key, memory in self._memory.items()
                for start in range(0, len(memory), step)
            ]
            for read in reads:
                read.result()


def body(rank: Rank, url: str, storage_options: dict[str, str], size: dict[str, int], repeats: int) -> dict[str, Any]:
    """One rank: both in turn, `repeats` + 1 times."""
    shapes, chosen = gpt_shapes(**size), Options()
    mesh = init_device_mesh("cpu", (rank.size,))
    placements = {name: (Shard(0),) for name in shapes}
    state, target = (sharded(shapes, mesh, placements, fill=fill) for fill in (True, False))
    bounds, store = limits(rank, state, repeats=1), open_store(url, options=chosen, storage_options=storage_options)
    table: Table = {}
    bare = Bare(store, chosen, {})
    for step in range(repeats + 1):
        ours = _Ours(f"{url}/run", step, storage_options)
        add(table, "save", "ckpt", measure(rank, lambda o=ours: o.save(state)))
        scramble(target)
        add(table, "load", "ckpt", measure(rank, lambda o=ours: o.load(target)))
        if step == 0:
            check_equal(target, state, what="ckpt")
            sizes = {entry.key.rpartition("/")[2]: entry.nbytes for entry in store.list("run/")}
            bare = Bare(store, chosen, _share(rank, sizes))
        add(table, "save", FLOOR, measure(rank, lambda b=bare, n=step: b.save(f"bare-{n}")))
        add(table, "load", FLOOR, measure(rank, lambda b=bare, n=step: b.load(f"bare-{n}")))
        _forget(rank, store, ["run/", f"bare-{step}/"])
    store.close()
    return {"results": summarize(table), "nbytes": nbytes(shapes), "limits": bounds}


class _Ours:
    """ckpt: one run for all steps, so that later saves reuse the plan, as in training."""

    def __init__(self, run: str, step: int, storage_options: dict[str, str]) -> None:
        self._run, self._step, self._storage_options = run, step, storage_options

    def save(self, state: Any) -> Phases:
        return ckpt.save({"model": state}, self._run, step=self._step, storage_options=self._storage_options).seconds

    def load(self, state: Any) -> Phases:
        return ckpt.load({"model": state}, self._run, step=self._step, storage_options=self._storage_options).seconds


def _share(rank: Rank, sizes: dict[str, int]) -> dict[str, int]:
    """The objects that this rank writes: its own image; the small rest falls to rank 0."""
    images = [key for key in sorted(sizes) if key.endswith(".safetensors")]
    return {
        f"{rank.rank}-{key}": size
        for key, size in sizes.items()
        if (images.index(key) % rank.size if key in images else 0) == rank.rank
    }


def _forget(rank: Rank, store: Store, prefixes: list[str]) -> None:
    """Remove what one round has made. All ranks call."""
    rank.together()
    if rank.rank == 0:
        for prefix in prefixes:
            store.delete([entry.key for entry in store.list(prefix)])
    rank.together()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, repeats = {"layers": args.layers, "width": args.width}, args.repeats
    if args.tiny:
        size, repeats = {"layers": 1, "width": 32, "vocabulary": 257}, 1
    options.check_space(args.dir, COPIES * nbytes(gpt_shapes(**size)))
    with options.scratch(args.dir) as folder:
        served = Path(folder) / "server"
        served.mkdir()
        with rclone_server(served) as server:
            found = run_ranks(
                body,
                2,
                folder,
                url=server.url("bench"),
                storage_options=server.storage_options,
                size=size,
                repeats=repeats,
            )
        shutil.rmtree(served, ignore_errors=True)
        found["ratios"] = ratios(found["results"], "ckpt")
        made = options.report("s3", folder, {**size, "ranks": 2, "repeats": repeats, "server": "rclone"}, found)
    print(show(found["results"], "ckpt"))
    for task, row in found["ratios"].items():
        print(f"{task}: bare objects take {row[FLOOR]:.2f} of ckpt's time (target at least {TARGET})")
    print(show_limits(found["limits"]))
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
