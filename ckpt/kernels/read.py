"""Read chunks of open files, verify their blocks, and copy boxes out of them.

In: descriptors and columns of chunks, blocks and boxes. Out: bytes at the targets, and what became of each chunk. A chunk
with a block that is not what its checksum says is not copied. The GIL is dropped for all of it. Never opens or closes a file,
never holds more than one chunk per thread.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import integer_column, thread_count

READ_ALIGN = 4096  # CKPT_READ_ALIGN in native/include/ckpt_core.h
_THREADS_MAX = 64  # CKPT_THREADS_MAX


class ReadMode(IntEnum):
    """As `ckpt_read_mode` in native/include/ckpt_core.h."""

    auto = 0  # around the page cache, except for what is in it already
    buffered = 1
    direct = 2


class Outcome(IntEnum):
    """What became of a chunk, as in native/include/ckpt_core.h; a number above 0 is an errno."""

    DONE = 0
    NOT_READ = -1
    SHORT = -2
    DAMAGED = -3


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """C chunks of files, B blocks to verify in them, N boxes to copy out of them."""

    file: NDArray[np.int32]  # [C] which of the descriptors
    start: NDArray[np.int64]  # [C] bytes of the file
    stop: NDArray[np.int64]  # [C] exclusive
    block_starts: NDArray[np.int64]  # [C + 1] rows of the blocks of each chunk
    block_start: NDArray[np.int64]  # [B] bytes of the file, inside the chunk
    block_stop: NDArray[np.int64]  # [B] exclusive
    block_crc: NDArray[np.uint32]  # [B] expected CRC-32C
    copy_starts: NDArray[np.int64]  # [C + 1] rows of the boxes of each chunk
    source: NDArray[np.uint64]  # [N] byte of the file, inside the chunk
    target: NDArray[np.uint64]  # [N] address
    target_limit: NDArray[np.uint64]  # [N] address, exclusive
    lengths: NDArray[np.int64]  # [N, D] elements
    source_strides: NDArray[np.int64]  # [N, D] bytes
    target_strides: NDArray[np.int64]  # [N, D] bytes
    itemsize: NDArray[np.int64]  # [N] bytes


@dataclass(frozen=True, kw_only=True)
class ReadOutcome:
    """What `read_chunks` did."""

    outcome: NDArray[np.int32]  # [C] see `Outcome`
    found_crc: NDArray[np.uint32]  # [B] of the chunks that are done or damaged
    direct_nbytes: int  # read around the page cache
    cached_nbytes: int  # read through it
    direct_refused: bool  # a file that was opened for direct reads could not be read so


class ReadBuffer:
    """Page-aligned memory for the chunks in flight, used again from call to call. One owner, one call at a time."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, READ_ALIGN)

    def address(self, nbytes: int) -> int:
        """Where at least `nbytes` begin; taken anew when there are fewer so far."""
        if len(self._memory) < nbytes:
            self._memory = mmap.mmap(-1, nbytes)
        return int(np.frombuffer(self._memory, np.uint8).ctypes.data)


def buffer_nbytes(chunks: Chunks) -> int:
    """Bytes of one thread's buffer: the longest chunk with both ends rounded out to what direct reads need."""
    if not len(chunks.start):
        return 0
    first = chunks.start // READ_ALIGN * READ_ALIGN
    last = -(-chunks.stop // READ_ALIGN) * READ_ALIGN
    return int((last - first).max())


def read_chunks(
    descriptors: Sequence[int],
    direct: Sequence[int],
    chunks: Chunks,
    *,
    buffer: ReadBuffer,
    mode: ReadMode = ReadMode.auto,
    threads: int = 1,
    stop_at_first: bool = True,
    mapped: Sequence[NDArray[np.uint8] | None] | None = None,
) -> ReadOutcome:
    """Read, verify and copy. One thread at a time per `buffer`; the caller keeps all memory and files until it returns.

    Args:
        descriptors: files open for reading. direct: the same ones opened with O_DIRECT, -1 where that is refused.
        stop_at_first: begin no chunk after one that failed.
        mapped: per file, memory that takes its place; its descriptors are not looked at.

    Raises:
        InvalidInputError: a chunk, block or box that does not fit. Nothing was read.
    """
    num_chunks, num_blocks = len(chunks.file), len(chunks.block_start)
    places = [None] * len(descriptors) if mapped is None else list(mapped)
    threads = min(thread_count(threads), _THREADS_MAX, max(num_chunks, 1))
    room = buffer_nbytes(chunks)
    outcome = np.full(num_chunks, Outcome.NOT_READ, np.int32)
    found = np.zeros(num_blocks, np.uint32)
    columns = {
        "fd": integer_column("descriptors", descriptors, np.int32, (len(descriptors),)),
        "direct_fd": integer_column("direct", direct, np.int32, (len(descriptors),)),
        "memory": np.array([0 if one is None else one.ctypes.data for one in places], np.uint64),
        "memory_bytes": np.array([0 if one is None else len(one) for one in places], np.int64),
        **_columns(chunks),
    }
    if choice.demanded() == choice.REFERENCE:
        status, row, direct_nbytes, cached_nbytes, refused = reference.read_chunks(
            **columns, stop_at_first=stop_at_first, outcome=outcome, found_crc=found
        )
    else:
        status, row, direct_nbytes, cached_nbytes, refused = choice.native().read_chunks(
            **columns,
            buffer=buffer.address(room * threads),
            buffer_bytes=room,
            kernel=choice.crc_kernel(),
            mode=mode,
            threads=threads,
            stop_at_first=stop_at_first,
            outcome=outcome,
            found_crc=found,
        )
    if status != Status.OK:
        place = f"box {row}" if row >= 0 else "a chunk or block"
        raise InvalidInputError(f"cannot read chunks: {place} does not fit ({Status(status).name})", kind="bad-box")
    return ReadOutcome(
        outcome=outcome,
        found_crc=found,
        direct_nbytes=direct_nbytes,
        cached_nbytes=cached_nbytes,
        direct_refused=refused,
    )


def _columns(chunks: Chunks) -> dict[str, NDArray[np.integer]]:
    """Checked, and as the kernels take them."""
    num_chunks, num_blocks = len(chunks.file), len(chunks.block_start)
    shape = (len(chunks.source), np.shape(chunks.lengths)[1])
    return {
        "file": integer_column("file", chunks.file, np.int32, (num_chunks,)),
        "start": integer_column("start", chunks.start, np.int64, (num_chunks,)),
        "stop": integer_column("stop", chunks.stop, np.int64, (num_chunks,)),
        "block_starts": integer_column("block_starts", chunks.block_starts, np.int64, (num_chunks + 1,)),
        "block_start": integer_column("block_start", chunks.block_start, np.int64, (num_blocks,)),
        "block_stop": integer_column("block_stop", chunks.block_stop, np.int64, (num_blocks,)),
        "block_crc": integer_column("block_crc", chunks.block_crc, np.uint32, (num_blocks,)),
        "copy_starts": integer_column("copy_starts", chunks.copy_starts, np.int64, (num_chunks + 1,)),
        "source": integer_column("source", chunks.source, np.uint64, shape[:1]),
        "target": integer_column("target", chunks.target, np.uint64, shape[:1]),
        "target_limit": integer_column("target_limit", chunks.target_limit, np.uint64, shape[:1]),
        "lengths": integer_column("lengths", chunks.lengths, np.int64, shape),
        "source_strides": integer_column("source_strides", chunks.source_strides, np.int64, shape),
        "target_strides": integer_column("target_strides", chunks.target_strides, np.int64, shape),
        "itemsize": integer_column("itemsize", chunks.itemsize, np.int64, shape[:1]),
    }
