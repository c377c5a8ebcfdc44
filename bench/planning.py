"""Planning for many ranks, with the real planner: seconds and index bytes. Run: `python -m bench.planning [--ranks 1024]`.

Simulates a job of R ranks with T sharded tensors (every tensor cut over all ranks on dim 0, as FSDP2 does), without data:
the records of all ranks are made as the ranks would make them, then timed: planning a save (what every rank computes),
making the index (what the committer does once per structure, and at every step), planning a load (what one rank of a new
layout does: read its part of the index, intersect, lay out reads).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import options
from bench.dcp_planning import coordinator
from ckpt.format import index
from ckpt.format.checksum import num_blocks
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable
from ckpt.plan.cover import not_tiled
from ckpt.plan.read import plan_read
from ckpt.plan.records import corners, make_records
from ckpt.plan.save import plan_save, rows_of_rank

BLOCK_BYTES = 1 << 20


def specs_of(num: int, ranks: int) -> list[TensorSpec]:
    shapes = [(ranks * 8, 4096), (ranks * 12, 2048), (ranks * 4, 8192), (ranks * 64,)]
    return [
        TensorSpec(name=f"model/layers.{i:04d}.weight", role="param", dtype="bfloat16", shape=shapes[i % len(shapes)])
        for i in range(num)
    ]


def boxes_of(specs: list[TensorSpec], rank: int, ranks: int) -> BoxTable:
    offsets, lengths = np.zeros((len(specs), 2), np.int64), np.ones((len(specs), 2), np.int64)
    for i, spec in enumerate(specs):
        lengths[i, : len(spec.shape)] = spec.shape
        lengths[i, 0] = spec.shape[0] // ranks
        offsets[i, 0] = rank * lengths[i, 0]
    return BoxTable(tensor=np.arange(len(specs), dtype=np.int32), offsets=offsets, lengths=lengths)


def timed(work: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Median, least and largest seconds of some runs (wall, and of the CPU), and what the last one gave."""
    wall, cpu, out = [], [], None
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        out = work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    figures = {"median_s": statistics.median(wall), "min_s": min(wall), "max_s": max(wall)}
    return figures | {"cpu_median_s": statistics.median(cpu)}, out


def measure_save(specs: list[TensorSpec], tables: list[BoxTable], repeats: int) -> dict[str, Any]:
    """What every rank does once per structure."""
    found: dict[str, Any] = {}
    records = []
    base = make_records(specs, tables[0])
    for table in tables:  # as make_records, without hashing the names once per rank in one process
        own = base.copy()
        own["first"], own["last"] = corners(specs, table)
        records.append(own)
    one = min(5, len(tables) - 1)
    found["save: own records"], _ = timed(lambda: make_records(specs, tables[one]), repeats)

    def plan() -> Any:
        return rows_of_rank(plan_save(records), one, specs, tables[one])

    found["save: plan of all ranks, rows of one"], (rows, _) = timed(plan, repeats)
    assert len(rows) == len(specs)
    half = len(records) // 2
    replicas = [np.concatenate([r, q]) for r, q in zip(records, records[half:] + records[:half], strict=True)]
    found["save: same, every fragment held by two ranks"], _ = timed(lambda: plan_save(replicas), repeats)
    return found


def fragments_of(specs: list[TensorSpec], tables: list[BoxTable]) -> index.FragmentTable:
    """The fragments that the ranks store, in the order of the index."""
    ranks, tensors = len(tables), len(specs)
    everything = BoxTable(
        tensor=np.tile(np.arange(tensors, dtype=np.int32), ranks),
        offsets=np.concatenate([t.offsets for t in tables]),
        lengths=np.concatenate([t.lengths for t in tables]),
    )
    boxes = everything.take(np.lexsort((everything.offsets[:, 0], everything.tensor)))
    nbytes = boxes.volumes() * 2
    per_rank = np.cumsum(nbytes[::ranks]) - nbytes[::ranks]
    blocks = num_blocks(nbytes, BLOCK_BYTES)
    return index.FragmentTable(
        boxes=boxes,
        writer=np.tile(np.arange(ranks, dtype=np.int32), tensors),
        offsets=4096 + np.repeat(per_rank, ranks),
        nbytes=nbytes,
        checksums=np.random.default_rng(0).integers(0, 2**32, int(blocks.sum()), dtype=np.uint32),
        block_starts=np.append(0, np.cumsum(blocks)),
    )


def measure_commit(
    specs: list[TensorSpec], table: index.FragmentTable, ranks: int, repeats: int
) -> tuple[dict[str, Any], bytes]:
    """What the committer does; and the index."""
    found: dict[str, Any] = {}
    dims = np.array([len(s.shape) for s in specs], np.int32)[table.boxes.tensor]
    found["commit: proof that all tensors are whole"], wrong = timed(lambda: not_tiled(specs, table.boxes), repeats)
    assert not wrong
    found["commit: write the index"], data = timed(lambda: index.pack_fragments(table, dims), repeats)
    size = len(data) + len(index.pack_tensors(specs, np.full(len(specs), ranks)))
    found["index"] = {"bytes": size, "bytes_per_fragment": size / len(table.boxes)}
    return found, data


def measure_load(specs: list[TensorSpec], data: bytes, ranks: int, repeats: int) -> dict[str, Any]:
    """What one rank of a new layout does."""
    found: dict[str, Any] = {}
    record, counts = index.file_record("f", data), np.full(len(specs), ranks)

    def load(part: slice, readers: int) -> tuple[int, Any]:
        wanted_ids = np.arange(len(specs))[part]
        lengths = np.ones((len(wanted_ids), 2), np.int64)
        for row, i in enumerate(wanted_ids):
            lengths[row, : len(specs[i].shape)] = specs[i].shape
        offsets = np.zeros_like(lengths)
        lengths[:, 0] //= readers
        offsets[:, 0] = 3 % readers * lengths[:, 0]
        wanted = BoxTable(tensor=wanted_ids.astype(np.int32), offsets=offsets, lengths=lengths)
        strides = np.stack([lengths[:, 1] * 2, np.full(len(lengths), 2)], axis=1)
        address = np.full(len(wanted), 4096, np.uint64)
        pieces = PieceTable(boxes=wanted, address=address, limit=address, strides=strides)
        file = index.VerifiedFile(record, lambda a, b: data[a:b], name="f")
        fragments = index.unpack_fragments(file, specs, wanted_ids, BLOCK_BYTES, name="f", counts=counts)
        made = plan_read(
            fragments, specs, pieces, block_bytes=BLOCK_BYTES, read_bytes_max=1 << 24, gap_bytes_max=1 << 14
        )
        return file.read_nbytes, made

    for label, part, readers in (
        ("one of half as many ranks, FSDP", slice(None), 0),
        ("one of 8 pipeline stages", slice(0, max(1, len(specs) // 8)), 1),
        ("everything on one rank", slice(None), 1),
    ):
        readers = readers or max(1, specs[-1].shape[0] // 128)  # the smallest tensor has 64 rows per saving rank
        figures, (read, made) = timed(lambda p=part, r=readers: load(p, r), repeats)
        found[f"load: {label}"] = figures | {"index_bytes_read": read, "reads": len(made.writer)}
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--dcp-ranks", type=int, default=64)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    ranks, tensors, dcp_ranks, repeats = args.ranks, args.tensors, args.dcp_ranks, args.repeats
    if args.tiny:
        ranks, tensors, dcp_ranks, repeats = 16, 12, 4, 1
    specs = specs_of(tensors, ranks)
    tables = [boxes_of(specs, rank, ranks) for rank in range(ranks)]
    found = measure_save(specs, tables, repeats)
    table = fragments_of(specs, tables)
    commit, data = measure_commit(specs, table, ranks, repeats)
    found |= commit | measure_load(specs, data, ranks, repeats)
    del table, tables, data
    dcp = coordinator(specs_of(tensors, dcp_ranks), dcp_ranks)
    per_fragment = found["index"]["bytes_per_fragment"]
    compared = {"dcp .metadata / index, per shard": round(dcp["metadata_bytes_per_shard"] / per_fragment, 1)}
    made = options.report(
        "planning",
        args.dir,
        {"ranks": ranks, "tensors": tensors, "fragments": ranks * tensors, "dcp_ranks": dcp_ranks, "repeats": repeats},
        {"results": found, "dcp": dcp, "ratios": compared},
    )
    _show(found, dcp, compared)
    options.keep(made, args.json, args.plot)
    return made


def _show(found: dict[str, Any], dcp: dict[str, float], compared: dict[str, float]) -> None:
    for name, figures in found.items():
        print(f"{name:<48} " + "  ".join(f"{key} {value:,.3f}" for key, value in figures.items()))
    for name, value in dcp.items():
        print(f"dcp: {name:<43} {value:,.3f}")
    for name, value in compared.items():
        print(f"{name}: {value} (target 25)")


if __name__ == "__main__":
    main()
