"""Turn a rank's pieces into the bytes of its image, chunk by chunk, with checksums on the way.

In: an image layout and the pieces in memory. Out: filled chunks and block checksums. Chunk boundaries are multiples of
`chunk_bytes`; a fragment or block may lie across one. Never writes to a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.checksum import block_ranges
from ckpt.format.image import ImageLayout
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import crc32c_join, crc32c_ranges, pack
from ckpt.layout.box import BoxTable, Int64Array, boxes_of_flat_range


@dataclass(frozen=True, kw_only=True)
class PackProgram:
    """What to copy into which chunk: depends on the structure only, so it is made once and used at every step."""

    layout: ImageLayout
    chunk_bytes: int
    piece: Int64Array  # [K] row of the piece table
    within: Int64Array  # [K, D] offset of the part in its piece, elements
    lengths: Int64Array  # [K, D] elements
    itemsize: Int64Array  # [K] bytes
    position: Int64Array  # [K] bytes from the start of the image
    part_starts: Int64Array  # [chunks + 1]
    segment_start: Int64Array  # [S] bytes from the start of the image; a block, or its part in one chunk (and piece)
    segment_stop: Int64Array  # [S]
    segment_block: Int64Array  # [S] number of the block
    segment_starts: Int64Array  # [chunks + 1]
    num_blocks: int
    cut_bytes: int  # no segment lies across a multiple of it; 0: only of `chunk_bytes`

    @property
    def num_chunks(self) -> int:
        return len(self.part_starts) - 1

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First byte and end of a chunk in the image."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.layout.total_bytes)


def make_program(
    layout: ImageLayout,
    specs: Sequence[TensorSpec],
    pieces: BoxTable,
    piece_of_row: Int64Array,
    *,
    chunk_bytes: int,
    block_bytes: int,
    cut_bytes: int = 0,
) -> PackProgram:
    """Cut an image layout at chunk boundaries.

    Args:
        pieces: the boxes of the rank's pieces.
        piece_of_row: [N] for each row of `layout.rows` the piece that it is a part of.
        cut_bytes: also sum up what lies between its multiples by itself, for `Packer.checksums_between`.
    """
    itemsize = np.array([spec.itemsize for spec in specs], np.int64)[layout.rows.tensor]
    within = layout.rows.offsets - pieces.offsets[piece_of_row]
    table = [piece_of_row, within, layout.rows.lengths, itemsize, layout.offsets]
    crossing = np.flatnonzero(layout.offsets // chunk_bytes != (layout.offsets + layout.nbytes - 1) // chunk_bytes)
    if len(crossing):
        keep = np.ones(len(layout.rows), bool)
        keep[crossing] = False
        cut = [_cut_at_chunks([column[row] for column in table], chunk_bytes) for row in crossing]
        table = [np.concatenate([column[keep], *(part[i] for part in cut)]) for i, column in enumerate(table)]
        order = np.argsort(table[-1], kind="stable")
        table = [column[order] for column in table]
    num_chunks = max(1, -(-layout.total_bytes // chunk_bytes))
    edges = np.arange(num_chunks + 1) * chunk_bytes
    starts, stops = block_ranges(layout.offsets, layout.nbytes, block_bytes)
    segments = _cut_segments(starts, stops, chunk_bytes)
    if cut_bytes:
        low, high, which = _cut_segments(segments[0], segments[1], cut_bytes)
        segments = low, high, segments[2][which]
    return PackProgram(
        layout=layout,
        chunk_bytes=chunk_bytes,
        piece=table[0],
        within=table[1],
        lengths=table[2],
        itemsize=table[3],
        position=table[4],
        part_starts=np.searchsorted(table[4], edges),
        segment_start=segments[0],
        segment_stop=segments[1],
        segment_block=segments[2],
        segment_starts=np.searchsorted(segments[0], edges),
        num_blocks=len(starts),
        cut_bytes=cut_bytes,
    )


def _cut_at_chunks(row: list[NDArray[np.int64]], chunk_bytes: int) -> list[NDArray[np.int64]]:
    """One row that lies across chunk boundaries, as rows that do not."""
    piece, within, lengths, itemsize, position = row
    nbytes = int(np.prod(lengths)) * int(itemsize)
    first = int(position)
    edges = [first, *range((first // chunk_bytes + 1) * chunk_bytes, first + nbytes, chunk_bytes), first + nbytes]
    offsets: list[tuple[int, ...]] = []
    sizes: list[tuple[int, ...]] = []
    positions: list[int] = []
    for low, high in zip(edges, edges[1:], strict=False):
        at = low
        for box in boxes_of_flat_range(
            lengths.tolist(), (low - first) // int(itemsize), (high - first) // int(itemsize)
        ):
            offsets.append(box.offsets)
            sizes.append(box.lengths)
            positions.append(at)
            at += box.volume * int(itemsize)
    n = len(positions)
    return [
        np.full(n, piece, np.int64),
        within[None, :] + np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.full(n, itemsize, np.int64),
        np.array(positions, np.int64),
    ]


def _cut_segments(starts: Int64Array, stops: Int64Array, chunk_bytes: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Blocks cut at chunk boundaries: starts, stops, block numbers, sorted. A block may reach over several chunks."""
    first, last = starts // chunk_bytes, (stops - 1) // chunk_bytes
    counts = last - first + 1
    block = np.repeat(np.arange(len(starts)), counts)
    chunk = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts) + first[block]
    low = np.maximum(starts[block], chunk * chunk_bytes)
    high = np.minimum(stops[block], (chunk + 1) * chunk_bytes)
    order = np.argsort(low, kind="stable")
    return low[order], high[order], block[order]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the parts of a program lie in memory at one step; made anew only when the pieces moved."""

    program: PackProgram
    pieces: PieceTable
    source: NDArray[np.uint64]  # [K]
    limit: NDArray[np.uint64]  # [K]
    strides: Int64Array  # [K, D]
    storage: NDArray[np.uint64]  # [K] where the block of memory begins that the part lies in; 0 where nobody knows


def bind(
    program: PackProgram,
    pieces: PieceTable,
    storage: NDArray[np.uint64] | None = None,
    last: Sources | None = None,
) -> Sources:
    """The sources of `program` in `pieces`; `last` itself when both are the very objects that it was made of.

    Args:
        storage: [N] where the block of memory begins that piece i lies in.
    """
    if last is not None and last.program is program and last.pieces is pieces:
        return last
    strides = pieces.strides[program.piece]
    return Sources(
        program=program,
        pieces=pieces,
        source=pieces.address[program.piece] + (program.within * strides).sum(axis=1).astype(np.uint64),
        limit=pieces.limit[program.piece],
        strides=strides,
        storage=np.zeros(len(program.piece), np.uint64) if storage is None else storage[program.piece],
    )


class Packer:
    """One step's image: the program, bound to this step's memory, objects and checksums.

    Different threads may work on different chunks; of one chunk, `checksum` comes after `fill`.
    """

    def __init__(self, sources: Sources, objects: Sequence[bytes], *, threads: int) -> None:
        self._sources = sources
        self._program = program = sources.program
        self._threads = threads
        layout = program.layout
        self._raw = [(0, layout.header), *zip(layout.object_offsets, objects, strict=True)]
        self._crc = np.zeros(len(program.segment_start), np.uint32)  # of each segment

    @property
    def sources(self) -> Sources:
        return self._sources

    def rows_of(self, chunk: int) -> slice:
        """The parts that lie in `chunk`."""
        return slice(int(self._program.part_starts[chunk]), int(self._program.part_starts[chunk + 1]))

    def fill(self, chunk: int, buffer: NDArray[np.uint8]) -> None:
        """Copy everything of `chunk` into the front of `buffer`."""
        self.copy_parts(self.rows_of(chunk), buffer, self._program.chunk_range(chunk)[0])
        self.put_raw(chunk, buffer)

    def pack(
        self, chunk: int, buffer: NDArray[np.uint8], rows: slice | Int64Array | None = None, threads: int | None = None
    ) -> None:
        """`fill` and `checksum` in one pass over the memory.

        Args:
            rows: the parts to copy, ascending; all of the chunk's when None. What they leave out is in `buffer` already.
            threads: other than this packer's.
        """
        segments = self._segments(chunk)
        rows = self.rows_of(chunk) if rows is None else rows
        self._crc[segments] = self._copy(rows, buffer, self._program.chunk_range(chunk)[0], segments, threads)
        self.put_raw(chunk, buffer)  # the header and objects: no block covers them

    def checksum(self, chunk: int, buffer: NDArray[np.uint8]) -> None:
        """Sum the blocks of `chunk`, whose bytes are in `buffer`. Chunks in any order."""
        program, rows = self._program, self._segments(chunk)
        start, _ = program.chunk_range(chunk)
        low, high = program.segment_start[rows] - start, program.segment_stop[rows] - start
        self._crc[rows] = crc32c_ranges(buffer, low, high, threads=self._threads)

    def copy_parts(self, rows: slice | Int64Array, buffer: NDArray[np.uint8], start: int) -> None:
        """Copy these parts, ascending, to their places in `buffer`, whose first byte is byte `start` of the image."""
        self._copy(rows, buffer, start, slice(0, 0))

    def put_raw(self, chunk: int, buffer: NDArray[np.uint8]) -> None:
        """Put the bytes of the header and of objects that lie in `chunk` into `buffer`."""
        start, stop = self._program.chunk_range(chunk)
        for offset, data in self._raw:
            low, high = max(offset, start), min(offset + len(data), stop)
            if low < high:
                buffer[low - start : high - start] = np.frombuffer(data, np.uint8)[low - offset : high - offset]

    def _copy(
        self,
        rows: slice | Int64Array,
        buffer: NDArray[np.uint8],
        start: int,
        segments: slice,
        threads: int | None = None,
    ) -> NDArray[np.uint32]:
        program, sources = self._program, self._sources
        return pack(
            buffer,
            start=start,
            source=sources.source[rows],
            source_limit=sources.limit[rows],
            position=program.position[rows],
            lengths=program.lengths[rows],
            source_strides=sources.strides[rows],
            itemsize=program.itemsize[rows],
            segment_starts=program.segment_start[segments],
            segment_stops=program.segment_stop[segments],
            threads=self._threads if threads is None else threads,
        )

    def _segments(self, chunk: int) -> slice:
        return slice(int(self._program.segment_starts[chunk]), int(self._program.segment_starts[chunk + 1]))

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """[B] of all blocks, in image order. All chunks have been summed."""
        program = self._program
        firsts = np.searchsorted(program.segment_block, np.arange(program.num_blocks + 1))
        return crc32c_join(self._crc, program.segment_stop - program.segment_start, firsts)

    def checksums_between(self, step_bytes: int) -> NDArray[np.uint32]:
        """[P] of each `step_bytes` of the image, the last of which may be fewer. All chunks have been summed.

        Nothing is read from the image: what no block covers is summed as it was given.

        Args:
            step_bytes: a multiple of the `cut_bytes` that the program was made with.
        """
        program, total = self._program, self._program.layout.total_bytes
        first, nbytes, crcs = [program.segment_start], [program.segment_stop - program.segment_start], [self._crc]
        for offset, data in self._raw:
            if data:
                low, high, _ = _cut_segments(np.array([offset]), np.array([offset + len(data)]), step_bytes)
                first, nbytes = [*first, low], [*nbytes, high - low]
                crcs.append(crc32c_ranges(data, low - offset, high - offset))
        starts, sizes = np.concatenate(first), np.concatenate(nbytes)
        if not program.cut_bytes or step_bytes % program.cut_bytes or int(sizes.sum()) != total:
            raise InvalidInputError(
                f"no checksums of each {step_bytes} bytes: the image of {total} bytes is cut at {program.cut_bytes}"
            )
        order = np.argsort(starts, kind="stable")
        edges = np.arange(-(-total // step_bytes) + 1) * step_bytes
        return crc32c_join(np.concatenate(crcs)[order], sizes[order], np.searchsorted(starts[order], edges))

    def tensor_of_block(self, block: int) -> int:
        """Number of the spec that a block is of."""
        segment = int(np.searchsorted(self._program.segment_block, block))
        layout = self._program.layout
        row = int(np.searchsorted(layout.offsets, self._program.segment_start[segment], "right")) - 1
        return int(layout.rows.tensor[row])
