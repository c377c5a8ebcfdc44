"""Decide which bytes to read for a set of wanted boxes, which blocks verify them, and which copies put them in place.

In: the fragments of a checkpoint and the wanted boxes with their memory. Out: `ReadPlan`: chunks (one read each), the blocks
to verify and the copies to make out of each. Pure: no I/O; no loop per fragment. Never reads a byte that shares no block with a
wanted one, except gaps shorter than `gap_bytes_max`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable, Int64Array, pad_dims
from ckpt.plan.records import corners
from ckpt.plan.save import arange_per

PAIRS_MAX = 1 << 22  # wanted x fragment pairs looked at in one go, to bound memory


@dataclass(frozen=True, kw_only=True)
class CopyTable:
    """Copies out of file bytes. Row i: the box of `lengths[i]` elements that starts at byte `source[i]` of its file."""

    writer: NDArray[np.int32]  # [N]
    fragment: Int64Array  # [N] row of the fragment table
    piece: Int64Array  # [N] row of the piece table
    source: Int64Array  # [N] bytes from the start of the file
    target: NDArray[np.uint64]  # [N] memory address
    lengths: Int64Array  # [N, D] elements
    source_strides: Int64Array  # [N, D] bytes
    target_strides: Int64Array  # [N, D] bytes
    itemsize: Int64Array  # [N] bytes

    def __len__(self) -> int:
        return len(self.writer)

    def take(self, rows: NDArray[np.integer]) -> CopyTable:
        return CopyTable(**{key: value[rows] for key, value in vars(self).items()})

    def span(self) -> Int64Array:
        """[N] bytes from the first to the last source byte of each row."""
        out: Int64Array = ((self.lengths - 1) * self.source_strides).sum(axis=1) + self.itemsize
        return out


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Chunk c reads `start[c]` to `stop[c]` of the image of `writer[c]`."""

    writer: NDArray[np.int32]  # [C]
    start: Int64Array  # [C] bytes
    stop: Int64Array  # [C] bytes, exclusive
    copies: CopyTable  # sorted by chunk
    copy_starts: Int64Array  # [C + 1]
    block_start: Int64Array  # [B] bytes from the start of the file, sorted by chunk
    block_stop: Int64Array  # [B]
    block_crc: NDArray[np.uint32]  # [B] expected
    block_fragment: Int64Array  # [B] row of the fragment table, for messages
    block_starts: Int64Array  # [C + 1]
    wanted_nbytes: int

    @property
    def read_nbytes(self) -> int:
        return int((self.stop - self.start).sum())


def plan_read(
    fragments: FragmentTable,
    specs: Sequence[TensorSpec],
    pieces: PieceTable,
    *,
    block_bytes: int,
    read_bytes_max: int,
    gap_bytes_max: int,
) -> ReadPlan:
    """Plan the reads that fill `pieces` from `fragments`.

    Args:
        specs: the checkpoint's tensors by id; `pieces.boxes.tensor` and `fragments.boxes.tensor` are ids.
        read_bytes_max: soft bound of one chunk; a chunk is at most twice as long.
    """
    num_dims = max(fragments.boxes.num_dims, pieces.boxes.num_dims)
    copies = _join(fragments, pieces, specs, num_dims)
    wanted = int((np.prod(copies.lengths, axis=1) * copies.itemsize).sum()) if len(copies) else 0
    copies = _split(copies, max(read_bytes_max // 2, block_bytes), 2 * block_bytes)
    return _chunks(copies, fragments, block_bytes, read_bytes_max, gap_bytes_max, wanted)


def uncovered(copies: CopyTable, pieces: PieceTable) -> Int64Array:
    """Rows of `pieces` of which some element is in no fragment."""
    found = np.bincount(copies.piece, weights=np.prod(copies.lengths, axis=1), minlength=len(pieces.boxes))
    return np.flatnonzero(found != pieces.boxes.volumes())


def _join(fragments: FragmentTable, pieces: PieceTable, specs: Sequence[TensorSpec], num_dims: int) -> CopyTable:
    """All non-empty intersections of a piece with a fragment of its tensor."""
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    low, counts = candidates(fragments.boxes, pieces.boxes, specs)
    tables = [
        _join_rows(fragments, pieces, itemsizes, num_dims, rows, low, counts) for rows in _batches(counts, PAIRS_MAX)
    ]
    if len(tables) == 1:
        return tables[0]
    return CopyTable(**{key: np.concatenate([vars(t)[key] for t in tables]) for key in vars(tables[0])})


def candidates(fragments: BoxTable, pieces: BoxTable, specs: Sequence[TensorSpec]) -> tuple[Int64Array, Int64Array]:
    """For each piece the first row and the number of rows of the fragments that can meet it.

    Fragments are sorted by tensor and first element. `reach` is the farthest last element so far: both only grow, so that
    the fragments between the piece's first and last element are found by bisection, without looking at all of a tensor's.
    """
    sizes = np.array([math.prod(spec.shape) for spec in specs], np.int64)
    base = np.cumsum(sizes) - sizes
    first, last = (x + base[fragments.tensor] for x in corners(specs, fragments))
    reach = np.maximum.accumulate(last)
    piece_first, piece_last = (x + base[pieces.tensor] for x in corners(specs, pieces))
    low = np.searchsorted(reach, piece_first, "left")
    return low, np.maximum(np.searchsorted(first, piece_last, "right") - low, 0)


def _batches(counts: Int64Array, limit: int) -> list[Int64Array]:
    """Split all piece rows into runs with at most about `limit` pairs each."""
    number = np.cumsum(counts) // limit
    edges = np.flatnonzero(np.append(True, number[1:] != number[:-1])) if len(counts) else np.zeros(1, np.int64)
    return [np.arange(a, b) for a, b in zip(edges, np.append(edges[1:], len(counts)), strict=True)]


def _join_rows(
    fragments: FragmentTable,
    pieces: PieceTable,
    itemsizes: Int64Array,
    num_dims: int,
    rows: Int64Array,
    low: Int64Array,
    counts: Int64Array,
) -> CopyTable:
    piece = np.repeat(rows, counts[rows])
    fragment = np.repeat(low[rows], counts[rows]) + arange_per(counts[rows])
    keep = pieces.boxes.volumes()[piece] > 0
    for dim in range(min(fragments.boxes.num_dims, pieces.boxes.num_dims)):
        f0, p0 = fragments.boxes.offsets[fragment, dim], pieces.boxes.offsets[piece, dim]
        keep &= f0 < p0 + pieces.boxes.lengths[piece, dim]
        keep &= p0 < f0 + fragments.boxes.lengths[fragment, dim]
    piece, fragment = piece[keep], fragment[keep]
    f_off = pad_dims(fragments.boxes.offsets[fragment], num_dims, 0)
    f_len = pad_dims(fragments.boxes.lengths[fragment], num_dims, 1)
    p_off = pad_dims(pieces.boxes.offsets[piece], num_dims, 0)
    p_len = pad_dims(pieces.boxes.lengths[piece], num_dims, 1)
    start = np.maximum(f_off, p_off)
    itemsize = itemsizes[fragments.boxes.tensor[fragment]]
    source_strides = contiguous_strides(f_len, itemsize)
    target_strides = pad_dims(pieces.strides[piece], num_dims, 0)
    target = pieces.address[piece] + ((start - p_off) * target_strides).sum(axis=1).astype(np.uint64)
    return CopyTable(
        writer=fragments.writer[fragment],
        fragment=fragment,
        piece=piece,
        source=fragments.offsets[fragment] + ((start - f_off) * source_strides).sum(axis=1),
        target=target,
        lengths=np.minimum(f_off + f_len, p_off + p_len) - start,
        source_strides=source_strides,
        target_strides=target_strides,
        itemsize=itemsize,
    )


def contiguous_strides(lengths: Int64Array, itemsize: Int64Array) -> Int64Array:
    """[N, D] byte strides of row-major boxes."""
    out = np.empty_like(lengths)
    out[:, -1] = itemsize
    for dim in range(lengths.shape[1] - 2, -1, -1):
        out[:, dim] = out[:, dim + 1] * lengths[:, dim + 1]
    return out


def _split(copies: CopyTable, span_max: int, gap_max: int) -> CopyTable:
    """Cut rows along a dim while they span more than `span_max` bytes or skip over more than `gap_max` bytes inside."""
    for dim in range(copies.lengths.shape[1] if len(copies) else 0):
        inner = ((copies.lengths[:, dim + 1 :] - 1) * copies.source_strides[:, dim + 1 :]).sum(axis=1) + copies.itemsize
        stride, length = copies.source_strides[:, dim], copies.lengths[:, dim]
        span = (length - 1) * stride + inner
        step = np.maximum((span_max - inner) // np.maximum(stride, 1) + 1, 1)  # indices per part
        step = np.where((stride - inner > gap_max), 1, step)
        step = np.where((span <= span_max) & (stride - inner <= gap_max), length, step)
        parts = -(-length // np.maximum(step, 1))
        if (parts <= 1).all():
            continue
        rows = np.repeat(np.arange(len(copies)), parts)
        begin = arange_per(parts) * step[rows]
        out = copies.take(rows)
        out.lengths[:, dim] = np.minimum(step[rows], length[rows] - begin)
        copies = CopyTable(
            **{
                **vars(out),
                "source": out.source + begin * out.source_strides[:, dim],
                "target": out.target + (begin * out.target_strides[:, dim]).astype(np.uint64),
            }
        )
    return copies


def _chunks(
    copies: CopyTable,
    fragments: FragmentTable,
    block_bytes: int,
    read_bytes_max: int,
    gap_bytes_max: int,
    wanted_nbytes: int,
) -> ReadPlan:
    base = fragments.offsets[copies.fragment]
    first_block = (copies.source - base) // block_bytes
    last_block = (copies.source - base + copies.span() - 1) // block_bytes
    start = base + first_block * block_bytes
    stop = np.minimum(base + (last_block + 1) * block_bytes, base + fragments.nbytes[copies.fragment])
    order = np.lexsort((copies.target, start, copies.writer))
    copies, start, stop = copies.take(order), start[order], stop[order]
    first_block, last_block = first_block[order], last_block[order]
    chunk = _number_chunks(copies.writer, start, stop, read_bytes_max, gap_bytes_max)
    num = int(chunk[-1]) + 1 if len(chunk) else 0
    edges = np.searchsorted(chunk, np.arange(num + 1))
    chunk_start = np.minimum.reduceat(start, edges[:-1]) if num else np.empty(0, np.int64)
    chunk_stop = np.maximum.reduceat(stop, edges[:-1]) if num else np.empty(0, np.int64)
    blocks = _blocks(copies.fragment, chunk, first_block, last_block, fragments, block_bytes)
    return ReadPlan(
        writer=copies.writer[edges[:-1]],
        start=chunk_start,
        stop=chunk_stop,
        copies=copies,
        copy_starts=edges,
        wanted_nbytes=wanted_nbytes,
        block_starts=np.searchsorted(blocks[0], np.arange(num + 1)),
        block_start=blocks[1],
        block_stop=blocks[2],
        block_crc=blocks[3],
        block_fragment=blocks[4],
    )


def _number_chunks(
    writer: NDArray[np.int32], start: Int64Array, stop: Int64Array, read_bytes_max: int, gap_bytes_max: int
) -> Int64Array:
    """[N] chunk of each extent; extents are sorted by file and start."""
    if not len(start):
        return np.empty(0, np.int64)
    # reach[i]: how far the earlier extents of the same file go. Offsetting each file makes one running maximum do.
    file_base = writer.astype(np.int64) * (int(stop.max()) + 1)
    reach = np.maximum.accumulate(stop + file_base)
    new_run = np.append(True, start[1:] + file_base[1:] > reach[:-1] + gap_bytes_max)
    new_run |= np.append(True, writer[1:] != writer[:-1])
    run = np.cumsum(new_run) - 1
    bucket = (start - start[np.flatnonzero(new_run)][run]) // read_bytes_max
    new = new_run | np.append(True, bucket[1:] != bucket[:-1])
    out: Int64Array = np.cumsum(new) - 1
    return out


def _blocks(
    fragment: Int64Array,
    chunk: Int64Array,
    first: Int64Array,
    last: Int64Array,
    fragments: FragmentTable,
    block_bytes: int,
) -> tuple[Int64Array, Int64Array, Int64Array, NDArray[np.uint32], Int64Array]:
    """Blocks to verify: (chunk, start, stop, crc, fragment), each once per chunk, sorted by chunk."""
    if not fragments.are_checked:
        none = np.empty(0, np.int64)
        return none, none, none, np.empty(0, np.uint32), none
    counts = last - first + 1
    in_fragment = np.repeat(first, counts) + arange_per(counts)
    owner = np.repeat(fragment, counts)
    number = fragments.block_starts[owner] + in_fragment
    key = np.repeat(chunk, counts) * (len(fragments.checksums) + 1) + number
    _, keep = np.unique(key, return_index=True)
    owner, in_fragment, number = owner[keep], in_fragment[keep], number[keep]
    start = fragments.offsets[owner] + in_fragment * block_bytes
    stop = np.minimum(start + block_bytes, fragments.offsets[owner] + fragments.nbytes[owner])
    return np.repeat(chunk, counts)[keep], start, stop, fragments.checksums[number], owner


def plan_verify(
    fragments: FragmentTable,
    *,
    block_bytes: int,
    read_bytes_max: int,
    gap_bytes_max: int,
    readable: Int64Array,
) -> ReadPlan:
    """Plan to read every block of every fragment once, and to copy nothing.

    Args:
        read_bytes_max: soft bound of one chunk; a chunk is at most one block longer.
        readable: [W] bytes that the image of each writer has; blocks that end behind are left out.
    """
    counts = np.diff(fragments.block_starts)
    owner, in_fragment = np.repeat(np.arange(len(fragments)), counts), arange_per(counts)
    start = fragments.offsets[owner] + in_fragment * block_bytes
    stop = np.minimum(start + block_bytes, fragments.offsets[owner] + fragments.nbytes[owner])
    writer = fragments.writer[owner]
    kept = np.flatnonzero(stop <= readable[writer])
    order = kept[np.lexsort((start[kept], writer[kept]))]
    owner, start, stop, writer = owner[order], start[order], stop[order], writer[order]
    chunk = _number_chunks(writer, start, stop, read_bytes_max, gap_bytes_max)
    num = int(chunk[-1]) + 1 if len(chunk) else 0
    edges = np.searchsorted(chunk, np.arange(num + 1))
    return ReadPlan(
        writer=writer[edges[:-1]],
        start=start[edges[:-1]],
        stop=np.maximum.reduceat(stop, edges[:-1]) if num else np.empty(0, np.int64),
        copies=_no_copies(),
        copy_starts=np.zeros(num + 1, np.int64),
        block_start=start,
        block_stop=stop,
        block_crc=fragments.checksums[order],
        block_fragment=owner,
        block_starts=edges,
        wanted_nbytes=int((stop - start).sum()),
    )


def _no_copies() -> CopyTable:
    none, table = np.empty(0, np.int64), np.empty((0, 1), np.int64)
    return CopyTable(
        writer=np.empty(0, np.int32),
        fragment=none,
        piece=none,
        source=none,
        target=np.empty(0, np.uint64),
        lengths=table,
        source_strides=table,
        target_strides=table,
        itemsize=none,
    )


def subset_pieces(
    pieces: PieceTable, rows: NDArray[np.integer] | NDArray[np.bool_], tensor: NDArray[np.int32]
) -> PieceTable:
    """The given rows of `pieces`, with their tensors renumbered to `tensor` (one per kept row)."""
    boxes = BoxTable(tensor=tensor, offsets=pieces.boxes.offsets[rows], lengths=pieces.boxes.lengths[rows])
    order = np.argsort(tensor, kind="stable")
    return PieceTable(
        boxes=boxes.take(order),
        address=pieces.address[rows][order],
        limit=pieces.limit[rows][order],
        strides=pieces.strides[rows][order],
    )
