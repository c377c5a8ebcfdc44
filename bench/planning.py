"""Planning for many ranks, with the real planner: seconds and index bytes. Run: `python bench/planning.py [--ranks 1024]`.

Simulates a job of R ranks with T sharded tensors (every tensor cut over all ranks on dim 0, as FSDP2 does), without data:
the records of all ranks are made as the ranks would make them, then timed: planning a save (what every rank computes),
making the index (what the committer does once per structure, and at every step), planning a load (what one rank of a new
layout does: read its part of the index, intersect, lay out reads).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from ckpt.format import index
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable
from ckpt.plan.cover import not_tiled
from ckpt.plan.read import plan_read
from ckpt.plan.records import corners, make_records
from ckpt.plan.save import plan_save, rows_of_rank

DCP_BYTES_PER_SHARD = (
    190  # pickled .metadata, measured: research on torch 2.13's DCP; bench/dcp_metadata.py measures it anew
)


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


def timed(work, repeats: int):
    seconds, out = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        out = work()
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}, out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    specs = specs_of(args.tensors, args.ranks)
    tables = [boxes_of(specs, rank, args.ranks) for rank in range(args.ranks)]
    records = []
    base = make_records(specs, tables[0])
    for table in tables:  # as make_records, without hashing the names once per rank in one process
        own = base.copy()
        own["first"], own["last"] = corners(specs, table)
        records.append(own)
    report: dict[str, object] = {"ranks": args.ranks, "tensors": args.tensors, "fragments": args.ranks * args.tensors}

    report["save: own records"], _ = timed(lambda: make_records(specs, tables[1]), args.repeats)

    def plan():
        made = plan_save(records)
        return rows_of_rank(made, 5, specs, tables[5])

    report["save: plan of all ranks, rows of one"], (rows, _) = timed(plan, args.repeats)
    assert len(rows) == args.tensors
    replicas = [np.concatenate([r, q]) for r, q in zip(records, records[512:] + records[:512], strict=True)]
    report["save: same, every fragment held by two ranks"], _ = timed(lambda: plan_save(replicas), args.repeats)
    everything = BoxTable(
        tensor=np.tile(np.arange(args.tensors, dtype=np.int32), args.ranks),
        offsets=np.concatenate([t.offsets for t in tables]),
        lengths=np.concatenate([t.lengths for t in tables]),
    )
    order = np.lexsort((everything.offsets[:, 0], everything.tensor))
    boxes = everything.take(order)
    nbytes = boxes.volumes() * 2
    per_rank = np.cumsum(nbytes[:: args.ranks]) - nbytes[:: args.ranks]
    rng = np.random.default_rng(0)
    table = index.FragmentTable(
        boxes=boxes,
        writer=np.tile(np.arange(args.ranks, dtype=np.int32), args.tensors),
        offsets=4096 + np.repeat(per_rank, args.ranks),
        nbytes=nbytes,
        checksums=rng.integers(0, 2**32, len(boxes), dtype=np.uint32),
        block_starts=np.arange(len(boxes) + 1),
    )
    dims = np.array([len(s.shape) for s in specs], np.int32)[boxes.tensor]
    report["commit: proof that all tensors are whole"], wrong = timed(lambda: not_tiled(specs, boxes), args.repeats)
    assert not wrong
    report["commit: write the index"], data = timed(lambda: index.pack_fragments(table, dims), args.repeats)
    counts = np.full(len(specs), args.ranks)
    tensors_file = index.pack_tensors(specs, counts)
    size = len(data) + len(tensors_file)
    report["index_bytes"], report["index_bytes_per_fragment"] = size, size / len(boxes)
    report["dcp .metadata / index"] = DCP_BYTES_PER_SHARD * len(boxes) / size
    record = index.file_record("f", data)
    block = 1 << 20

    def load(part: slice, readers: int):
        wanted_ids = np.arange(args.tensors)[part]
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
        fragments = index.unpack_fragments(file, specs, wanted_ids, block, name="f", counts=counts)
        made = plan_read(fragments, specs, pieces, block_bytes=block, read_bytes_max=1 << 24, gap_bytes_max=1 << 14)
        return file.read_nbytes, made

    for label, part, readers in (
        ("one of 512 ranks, FSDP", slice(None), 512),
        ("one of 8 pipeline stages", slice(0, args.tensors // 8), 1),
        ("everything on one rank", slice(None), 1),
    ):
        report[f"load: {label}"], (read, made) = timed(lambda p=part, r=readers: load(p, r), args.repeats)
        report[f"load: {label}"] |= {"index_bytes_read": read, "chunks": len(made.writer)}
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
