"""Goal: whatever way a tensor was cut when it was saved, any other cut reads back exactly its elements.

Method: fill each global tensor with its own element index, cut it by random layout A over random ranks (with replicas), run
the real planner, packer, index and reader in memory, read with random cut B, compare with B cut directly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt.commit.assemble import Assembler
from ckpt.config import Options
from ckpt.engine.read import ReadJob, find_damage, run_reads
from ckpt.errors import DamagedError
from ckpt.format import index
from ckpt.format.image import lay_out, parse_header
from ckpt.format.receipt import ImageTable, Receipt, pack, unpack
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import Box, BoxTable, boxes_of_flat_range
from ckpt.plan.read import plan_read, uncovered
from ckpt.plan.records import make_records
from ckpt.plan.save import plan_save, rows_of_rank
from ckpt.snapshot.pack import Packer, bind, make_program

DTYPES = {"uint8": np.uint8, "int16": np.int16, "int32": np.int32, "int64": np.int64}
CHUNK, BLOCK = 4096, 64


def grid(draw: Any, shape: tuple[int, ...]) -> list[Box]:
    """Random cuts of every dim: boxes that tile the tensor."""
    boxes = [Box(offsets=(), lengths=())]
    for length in shape:
        edges = sorted(draw(st.lists(st.integers(0, length), max_size=2)))
        edges = [0, *edges, length]
        parts = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
        boxes = [Box(offsets=(*x.offsets, o), lengths=(*x.lengths, n)) for x in boxes for o, n in parts]
    return boxes


def flat(draw: Any, shape: tuple[int, ...]) -> list[list[Box]]:
    """Random ranges of the row-major elements, each as its boxes: a flat ZeRO shard."""
    size = math.prod(shape)
    edges = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size]
    return [boxes_of_flat_range(shape, a, b) for a, b in zip(edges, edges[1:], strict=False)]


@st.composite
def cut(draw: Any, shape: tuple[int, ...], num_ranks: int) -> list[list[Box]]:
    """Per rank its boxes of one tensor: a tiling dealt to ranks, each part held by one or more of them."""
    if math.prod(shape) == 0:
        return [[] for _ in range(num_ranks)]
    groups = [[box] for box in grid(draw, shape)] if draw(st.booleans()) else flat(draw, shape)
    out: list[list[Box]] = [[] for _ in range(num_ranks)]
    for boxes in groups:
        for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks)):
            out[rank].extend(boxes)
    return out


@st.composite
def cases(draw: Any) -> Any:
    num_ranks, num_readers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tensors = []
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 12), max_size=4)))
        spec = TensorSpec(
            name=f"t{i}",
            role=draw(st.sampled_from(["param", "buffer"])),
            dtype=draw(st.sampled_from(sorted(DTYPES))),
            shape=shape,
        )
        tensors.append((spec, draw(cut(shape, num_ranks)), draw(cut(shape, num_readers))))
    return num_ranks, num_readers, tensors


def held(specs: list[TensorSpec], boxes: list[list[Box]], arrays: list[np.ndarray], *, fill: bool) -> Any:
    """A rank's pieces in fresh memory, every second one with its dims transposed in memory. Returns (table, memory)."""
    rows, memory = [], []
    for tensor, parts in enumerate(boxes):
        for box in parts:
            local = (
                np.ascontiguousarray(arrays[tensor][box.slices()])
                if fill
                else np.zeros(box.lengths, arrays[tensor].dtype)
            )
            if len(memory) % 2:
                local = np.asfortranarray(local)
            rows.append((tensor, box))
            memory.append(local)
    table = BoxTable.build(rows)
    strides = np.zeros((len(rows), table.num_dims), np.int64)
    for row, local in enumerate(memory):
        strides[row, : local.ndim] = local.strides
    address = np.array([m.ctypes.data for m in memory], np.uint64)
    limit = address + np.array([m.nbytes for m in memory], np.uint64)
    return PieceTable(boxes=table, address=address, limit=limit, strides=strides), memory


class MemoryStore:
    """Only what the reader needs."""

    local_files = False

    def __init__(self, files: list[np.ndarray]) -> None:
        self.files = files

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        data = self.files[int(key)][start : start + len(buffer)]
        if len(data) < len(buffer):
            raise DamagedError("short")
        buffer[:] = data.tobytes()


def write(num_ranks: int, tensors: Any) -> Any:
    specs = [t[0] for t in tensors]
    arrays = [np.arange(math.prod(s.shape)).astype(DTYPES[s.dtype]).reshape(s.shape) for s in specs]
    ranks = [held(specs, [t[1][rank] for t in tensors], arrays, fill=True) for rank in range(num_ranks)]
    plan = plan_save([make_records(specs, pieces.boxes) for pieces, _ in ranks])
    files, receipts = [], []
    for rank, (pieces, _memory) in enumerate(ranks):
        rows, piece_of_row = rows_of_rank(plan, rank, specs, pieces.boxes)
        layout = lay_out(specs, rows, [("o", 1024)])
        program = make_program(
            layout, specs, pieces.boxes, piece_of_row[layout.source], chunk_bytes=CHUNK, block_bytes=BLOCK
        )
        packer = Packer(bind(program, pieces), [b"{}".ljust(1024)], threads=1)
        file = np.zeros(layout.total_bytes, np.uint8)
        for chunk in range(program.num_chunks):
            low, high = program.chunk_range(chunk)
            buffer = np.zeros(CHUNK, np.uint8)
            packer.fill(chunk, buffer)
            packer.checksum(chunk, buffer)
            file[low:high] = buffer[: high - low]
        parse_header(layout.header, file="x", file_bytes=len(file))
        files.append(file)
        image = ImageTable(
            specs=specs,
            rows=layout.rows,
            offsets=layout.offsets,
            nbytes=layout.nbytes,
            header_bytes=len(layout.header),
            header_crc32c=crc32c(layout.header),
        )
        receipt = Receipt(
            rank=rank,
            world=num_ranks,
            step=1,
            attempt="a" * 8,
            structure=str(rank),
            file=str(rank),
            file_bytes=len(file),
            block_bytes=BLOCK,
            checksums=packer.checksums,
            objects=[],
            image=image,
        )
        receipts.append(unpack(pack(receipt), name="r"))
    assembled = Assembler("test").assemble(receipts, metadata={}, metrics={}, layout=None)
    return specs, arrays, files, assembled


def fragments_of(specs: list[TensorSpec], assembled: Any) -> index.FragmentTable:
    data = assembled.files[index.FRAGMENTS_FILE]
    file = index.VerifiedFile(assembled.manifest.fragments, lambda a, b: data[a:b], name="f")
    return index.unpack_fragments(file, specs, None, BLOCK, name="f")


@given(cases())
def test_any_cut_reads_back_every_element_saved_by_any_other(case: Any) -> None:
    num_ranks, num_readers, tensors = case
    specs, arrays, files, assembled = write(num_ranks, tensors)
    fragments = fragments_of(specs, assembled)
    assert int(fragments.nbytes.sum()) == sum(s.nbytes for s in specs)
    for reader in range(num_readers):
        pieces, memory = held(specs, [t[2][reader] for t in tensors], arrays, fill=False)
        order = np.argsort(pieces.boxes.tensor, kind="stable")
        assert (order == np.arange(len(order))).all()
        plan = plan_read(fragments, specs, pieces, block_bytes=BLOCK, read_bytes_max=256, gap_bytes_max=16)
        assert not len(uncovered(plan.copies, pieces))
        job = ReadJob(
            store=MemoryStore(files),
            keys=[str(i) for i in range(num_ranks)],
            plan=plan,
            fragments=fragments,
            specs=specs,
            pieces=pieces,
            options=Options(),
        )
        run_reads(job)
        expected = [arrays[i][box.slices()] for i, t in enumerate(tensors) for box in t[2][reader]]

        for found, wanted in zip(memory, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@given(cases(), st.data())
def test_a_flipped_byte_of_a_fragment_is_found(case: Any, data: Any) -> None:
    num_ranks, _, tensors = case
    specs, arrays, files, assembled = write(num_ranks, tensors)
    fragments = fragments_of(specs, assembled)
    if not len(fragments):
        return
    row = data.draw(st.integers(0, len(fragments) - 1))
    at = int(fragments.offsets[row]) + data.draw(st.integers(0, int(fragments.nbytes[row]) - 1))
    files[int(fragments.writer[row])][at] ^= 1 << data.draw(st.integers(0, 7))
    everything = BoxTable.build(
        [(i, Box(offsets=(0,) * len(s.shape), lengths=s.shape)) for i, s in enumerate(specs) if s.nbytes]
    )
    memory = [np.zeros(s.shape, DTYPES[s.dtype]) for s in specs if s.nbytes]
    address = np.array([m.ctypes.data for m in memory], np.uint64)
    strides = np.zeros((len(memory), everything.num_dims), np.int64)
    for i, m in enumerate(memory):
        strides[i, : m.ndim] = m.strides
    pieces = PieceTable(
        boxes=everything,
        address=address,
        limit=address + np.array([m.nbytes for m in memory], np.uint64),
        strides=strides,
    )
    plan = plan_read(fragments, specs, pieces, block_bytes=BLOCK, read_bytes_max=256, gap_bytes_max=16)
    job = ReadJob(
        store=MemoryStore(files),
        keys=[str(i) for i in range(num_ranks)],
        plan=plan,
        fragments=fragments,
        specs=specs,
        pieces=pieces,
        options=Options(),
    )
    damage = find_damage(job)

    assert [d.tensor for d in damage] == [specs[int(fragments.boxes.tensor[row])].name]
    assert damage[0].start <= at < damage[0].stop
