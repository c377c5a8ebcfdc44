"""Bytes that a reshard reads over the bytes that it wants, every layout into every layout. Run: `python -m bench.reshard_bytes`.

A GPT in bf16 with fp32 master copies on up to 4 gloo ranks. Counted at the store (`CountingStore`), checked against what the
load says of itself, and the values compared bit by bit. A target of the project: at most 1.02 for every pair. Where ranks read
for each other a byte that several want is read once, and the ratio falls below 1: there `read_over_state`, bytes read over the
bytes of the whole state (all of it is wanted by some rank), is the figure to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import ckpt
from bench import options
from bench.ranks import Rank, run_ranks
from bench.workloads import (
    Shapes,
    State,
    check_equal,
    gpt_params,
    nbytes,
    plain,
    scramble,
    sharded,
    tp_placement,
    whole,
)
from ckpt.config import Options
from ckpt.engine.load import load_state
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.torch_world import current_world
from ckpt.store.counting import CountingStore
from ckpt.store.open import open_store

TARGET = 1.02
RANKS = 4


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the ranks `0 .. size - 1` hold the state."""

    name: str
    mesh: tuple[int, ...]  # () for pipeline stages and single ranks: plain tensors
    kind: str

    @property
    def size(self) -> int:
        out = 1
        for n in self.mesh:
            out *= n
        return out


LAYOUTS = (
    _Layout(name="1 rank", mesh=(1,), kind="stages"),
    _Layout(name="FSDP 2", mesh=(2,), kind="fsdp"),
    _Layout(name="TP 2", mesh=(2,), kind="tp"),
    _Layout(name="PP 2", mesh=(2,), kind="stages"),
    _Layout(name="FSDP 4", mesh=(4,), kind="fsdp"),
    _Layout(name="TP 4", mesh=(4,), kind="tp"),
    _Layout(name="FSDP 2 x TP 2", mesh=(2, 2), kind="fsdp-tp"),
    _Layout(name="HSDP 2 x 2", mesh=(2, 2), kind="hsdp"),
    _Layout(name="PP 4", mesh=(4,), kind="stages"),
)


def placements(kind: str, name: str, mesh: tuple[int, ...]) -> tuple[Placement, ...]:
    """DTensor placements of one tensor."""
    tp = tp_placement(name)
    if kind == "fsdp":
        return (Shard(0),)
    if kind == "tp":
        return (tp,)
    if kind == "hsdp":
        return (Replicate(), Shard(0))
    if tp == Shard(0):  # both cut dim 0: FSDP cuts what tensor parallelism left
        return (_StridedShard(0, split_factor=mesh[1]), tp)
    return (Shard(0), tp)


class _Job:
    """The ranks of one layout: their group and state. Made by all ranks of the benchmark together."""

    def __init__(self, rank: Rank, layout: _Layout, shapes: Shapes, layers: int) -> None:
        self.layout, self.member = layout, rank.rank < layout.size
        self.group = dist.new_group(list(range(layout.size)))
        self._rank, self._shapes, self._layers = rank, shapes, layers
        self._mesh = None
        if layout.kind != "stages":
            self._mesh = DeviceMesh("cpu", torch.arange(layout.size).reshape(layout.mesh))

    def state(self, *, fill: bool) -> State:
        if not self.member:
            return {}
        if self._mesh is not None:
            how = {name: placements(self.layout.kind, name, self.layout.mesh) for name in self._shapes}
            return sharded(self._shapes, self._mesh, how, fill=fill)
        mine = {name for name in self._shapes if self._stage(name) == self._rank.rank}
        numbers = {name: number for number, name in enumerate(self._shapes)}
        own = {name: shape for name, shape in self._shapes.items() if name in mine}
        if not fill:
            return plain(own, fill=False)
        return {name: whole(numbers[name], *shape) for name, shape in own.items()}

    def _stage(self, name: str) -> int:
        parts = name.split(".")[1:]
        if parts[0] == "h":
            return int(parts[1]) * self.layout.size // self._layers
        return self.layout.size - 1 if parts[0] == "ln_f" else 0

    def load(self, url: Path, expected: Mapping[str, Any]) -> dict[str, float]:
        """Load step 0 of `url` and count. Members call."""
        chosen = Options(exchange="always")  # as on several hosts: on one, "auto" may read twice
        store = CountingStore(open_store(url, options=chosen))
        stored = StoredCheckpoint(store, 0, chosen)
        state = self.state(fill=False)
        scramble(state)
        found = load_state(stored, state, current_world(self.group, 300.0))
        check_equal(state, dict(expected), what=f"{url.name} -> {self.layout.name}")
        images = sum(n for key, n in store.traffic.bytes_read_of.items() if key.endswith(".safetensors"))
        objects = {row.digest: row.nbytes for row in stored.objects}
        if images != found.read_nbytes + sum(objects.values()):
            raise AssertionError(f"the store gave {images} bytes, the load says {found.read_nbytes} and its objects")
        total = sum(store.traffic.bytes_read_of.values())
        return {
            "wanted": found.wanted_nbytes,
            "read": images,
            "all": total,
            "exchanged": float(found.exchanged),
        }


def body(rank: Rank, layers: int, width: int, vocabulary: int, names: list[str]) -> dict[str, Any]:
    """One rank: save each layout, load it into each."""
    params = gpt_params(layers=layers, width=width, vocabulary=vocabulary)
    slots = {"param": torch.bfloat16, "master": torch.float32}
    shapes: Shapes = {f"{slot}.{name}": (shape, kind) for slot, kind in slots.items() for name, shape in params.items()}
    jobs = [_Job(rank, layout, shapes, layers) for layout in LAYOUTS if layout.name in names]
    states = [job.state(fill=True) for job in jobs]
    pairs: dict[str, dict[str, dict[str, float]]] = {}
    for job, state in zip(jobs, states, strict=True):
        url = rank.folder / job.layout.name.replace(" ", "-")
        if job.member:
            ckpt.save(state, url, step=0, process_group=job.group)
        rank.together()
        for other, expected in zip(jobs, states, strict=True):
            found = other.load(url, expected) if other.member else {}
            sums = {key: rank.total(found.get(key, 0.0)) for key in ("wanted", "read", "all", "exchanged")}
            pairs.setdefault(job.layout.name, {})[other.layout.name] = {
                "wanted_bytes": sums["wanted"],
                "image_bytes_read": sums["read"],
                "all_bytes_read": sums["all"],
                "ratio": round(sums["read"] / sums["wanted"], 4),
                "read_over_state": round(sums["read"] / nbytes(shapes), 4),
                "shared_reads": float(sums["exchanged"] > 0),
            }
            rank.together()
    return {"pairs": pairs, "nbytes": nbytes(shapes)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    return run(options.parser(__doc__ or "", repeats=1).parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size = {"layers": 4, "width": 512, "vocabulary": 8191}
    names = [layout.name for layout in LAYOUTS]
    if args.tiny:
        size, names = {"layers": 4, "width": 32, "vocabulary": 257}, ["1 rank", "FSDP 2 x TP 2", "PP 2"]
    with options.scratch(args.dir) as folder:
        found = run_ranks(body, RANKS, folder, names=names, **size)
        ratios = [pair["ratio"] for row in found["pairs"].values() for pair in row.values()]
        shared = [p["read_over_state"] for row in found["pairs"].values() for p in row.values() if p["shared_reads"]]
        found["ratios"] = {"worst read / wanted": max(ratios), "worst read / state, shared": max(shared, default=0.0)}
        made = options.report("reshard_bytes", folder, {**size, "ranks": RANKS}, found)
    _show(found)
    options.keep(made, args.json, args.plot)
    return made


def _show(found: dict[str, Any]) -> None:
    print("bytes read from images / bytes wanted; * ranks read for each other")
    print(f"{'from / to':<14}" + "".join(f"{name:>15}" for name in found["pairs"]))
    for source, row in found["pairs"].items():
        cells = [f"{pair['ratio']:.4f}{'*' if pair['shared_reads'] else ' '}" for pair in row.values()]
        print(f"{source:<14}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"{found['nbytes'] / 1e6:.0f} MB; " + "; ".join(f"{k} {v:.4f}" for k, v in found["ratios"].items()))
    print(f"target {TARGET}")


if __name__ == "__main__":
    main()
