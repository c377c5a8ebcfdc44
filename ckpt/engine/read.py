"""Carry out a read plan: read chunks in parallel, verify every block, copy boxes into place.

In: a `ReadPlan` and a store. Out: the wanted pieces, filled. A block is verified before anything is copied out of it, so a
damaged byte never reaches the caller's memory. Holds at most `read_threads` chunks at a time, and no more than
`read_buffer_bytes_max` of them. Images that are local files are read by one native call; others through the store's `read_into`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckpt.config import Options
from ckpt.errors import CheckpointError, DamagedError, NotFoundError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import (
    Chunks,
    Outcome,
    ReadBuffer,
    ReadMode,
    buffer_nbytes,
    copy_boxes,
    crc32c_ranges,
    read_chunks,
)
from ckpt.layout.box import Int64Array
from ckpt.plan.read import ReadPlan
from ckpt.plan.save import arange_per
from ckpt.store.base import Store

_BATCH_BYTES = 1 << 30  # of one native call
_BATCH_FILES = 64  # open at a time, twice

Progress = Callable[[int], None]  # called with the bytes done since the last call, from any thread


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One block that is not what was written, or could not be read."""

    key: str
    start: int  # bytes
    stop: int  # bytes, exclusive
    tensor: str
    message: str


@dataclass(frozen=True, kw_only=True)
class ReadJob:
    """Everything that `run_reads` needs."""

    store: Store
    keys: Sequence[str]  # of the images, by number
    plan: ReadPlan
    fragments: FragmentTable
    specs: Sequence[TensorSpec]
    pieces: PieceTable
    options: Options
    missing: Callable[[int], str] | None = None  # what to say of the image of this number when it is gone
    buffer: ReadBuffer = field(default_factory=ReadBuffer)  # handed on from job to job where many follow each other


def read_bytes_max(store: Store, options: Options) -> int:
    """Soft bound of one read: so that the memory budget holds a chunk, at most twice as long, for each thread."""
    wanted = options.local_read_bytes_max if store.local_files else options.read_bytes_max
    return max(1, min(wanted, options.read_buffer_bytes_max // (2 * options.read_threads)))


def run_reads(job: ReadJob, *, progress: Progress | None = None) -> None:
    """Read, verify and copy. Raises DamagedError at the first damage; pieces not yet copied are then untouched."""
    for damage in _run(job, progress, stop_at_first=True):
        raise DamagedError(damage.message, hints=("`ckpt verify` lists all damage of a checkpoint",))


def find_damage(job: ReadJob, *, progress: Progress | None = None) -> list[Damage]:
    """Read and verify everything; all damage found, sorted by place. A block that two chunks share counts once."""
    found = {(damage.key, damage.start): damage for damage in _run(job, progress, stop_at_first=False)}
    return [found[place] for place in sorted(found)]


def _run(job: ReadJob, progress: Progress | None, *, stop_at_first: bool) -> list[Damage]:
    """Read the images that are local files natively, all others through the store."""
    plan = job.plan
    if not len(plan.writer):
        return []
    out: list[Damage] = []
    left = np.arange(len(plan.writer))
    if job.store.local_files:
        rest: list[int] = []
        for batch in _batches(plan):
            found, through_store = _read_local(job, batch, stop_at_first=stop_at_first)
            rest += through_store
            out += found
            if found and stop_at_first:
                return out
            if progress is not None:
                done = np.setdiff1d(np.arange(batch.start, batch.stop), through_store)
                progress(int((plan.stop[done] - plan.start[done]).sum()))
        left = np.array(rest, np.int64)
    return out + _run_through_store(job, left, progress, stop_at_first=stop_at_first)


def _batches(plan: ReadPlan) -> Iterator[range]:
    """Chunks for one native call each: of few files, and short enough that an interrupt of the user is heard."""
    sizes = np.cumsum(plan.stop - plan.start)
    files = np.cumsum(np.append(0, plan.writer[1:] != plan.writer[:-1]))
    first = 0
    while first < len(sizes):
        done, file = sizes[first] - (plan.stop[first] - plan.start[first]), files[first]
        last = int(np.searchsorted(sizes, done + _BATCH_BYTES, "right"))
        last = max(first + 1, min(last, int(np.searchsorted(files, file + _BATCH_FILES, "left"))))
        yield range(first, last)
        first = last


def _read_local(job: ReadJob, batch: range, *, stop_at_first: bool) -> tuple[list[Damage], list[int]]:
    """(damage, chunks to be read through the store: of files that did not open or that a read failed of).

    The store then reads them again and says what is wrong in its own words.
    """
    plan = job.plan
    writers = np.unique(plan.writer[batch.start : batch.stop])
    with contextlib.ExitStack() as stack:
        opened = [_open(job, int(writer), stack) for writer in writers]
        usable = np.array([files is not None for files in opened])
        row = np.cumsum(usable) - 1
        at = np.searchsorted(writers, plan.writer[batch.start : batch.stop])
        some = np.arange(batch.start, batch.stop)[usable[at]]
        if not len(some):
            return [], list(batch)
        files = [found for found in opened if found is not None]
        chunks, blocks = _chunks_of(job, some, row[np.searchsorted(writers, plan.writer[some])])
        done = read_chunks(
            [file.fd for file in files],
            [file.direct_fd for file in files],
            chunks,
            buffer=job.buffer,
            mode=ReadMode.auto if job.options.direct_io else ReadMode.buffered,
            threads=_threads(job, buffer_nbytes(chunks), len(some)),
            stop_at_first=stop_at_first,
            mapped=[file.memory for file in files],
        )
    wrong = done.found_crc != chunks.block_crc
    wrong &= np.repeat(done.outcome == Outcome.DAMAGED, np.diff(chunks.block_starts))
    found = [
        _damage(job, job.keys[int(plan.writer[some[c]])], int(blocks[b]), int(done.found_crc[b]))
        for b in np.flatnonzero(wrong)
        for c in [int(np.searchsorted(chunks.block_starts, b, "right")) - 1]
    ]
    again = some[(done.outcome > 0) | (done.outcome == Outcome.SHORT)].tolist()
    again += [] if found and stop_at_first else some[done.outcome == Outcome.NOT_READ].tolist()
    again += np.setdiff1d(np.arange(batch.start, batch.stop), some).tolist()
    return found, sorted(again)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Local:
    """An image as the kernel reads it."""

    fd: int = -1
    direct_fd: int = -1  # for reads around the page cache, -1 where there are none
    memory: NDArray[np.uint8] | None = None  # instead of a file


def _open(job: ReadJob, writer: int, stack: contextlib.ExitStack) -> _Local | None:
    """An image of this machine; None when it does not open."""
    key = job.keys[writer]
    memory = getattr(job.store, "local_memory", lambda key: None)(key)
    if memory is not None:
        return _Local(memory=memory)
    try:
        fd = job.store.open_local(key)
        if fd is None:
            return None
        stack.callback(os.close, fd)
        direct = job.store.open_local(key, direct=True) if job.options.direct_io else None
    except CheckpointError:
        return None
    if direct is None:
        return _Local(fd=fd)
    stack.callback(os.close, direct)
    return _Local(fd=fd, direct_fd=direct)


def _chunks_of(job: ReadJob, some: Int64Array, file: Int64Array) -> tuple[Chunks, Int64Array]:
    """The plan's chunks `some` as the kernel takes them, and the rows of their blocks in the plan."""
    plan = job.plan
    copies = plan.copies
    num_blocks, num_copies = np.diff(plan.block_starts)[some], np.diff(plan.copy_starts)[some]
    blocks = np.repeat(plan.block_starts[some], num_blocks) + arange_per(num_blocks)
    rows = np.repeat(plan.copy_starts[some], num_copies) + arange_per(num_copies)
    chunks = Chunks(
        file=file.astype(np.int32),
        start=plan.start[some],
        stop=plan.stop[some],
        block_starts=np.append(0, np.cumsum(num_blocks)),
        block_start=plan.block_start[blocks],
        block_stop=plan.block_stop[blocks],
        block_crc=plan.block_crc[blocks],
        copy_starts=np.append(0, np.cumsum(num_copies)),
        source=copies.source[rows].astype(np.uint64),
        target=copies.target[rows],
        target_limit=job.pieces.limit[copies.piece[rows]],
        lengths=copies.lengths[rows],
        source_strides=copies.source_strides[rows],
        target_strides=copies.target_strides[rows],
        itemsize=copies.itemsize[rows],
    )
    return chunks, blocks


def _threads(job: ReadJob, chunk_nbytes: int, num_chunks: int) -> int:
    """As many as there are chunks, are allowed, and fit into the memory budget with a chunk each; at least one."""
    fitting = job.options.read_buffer_bytes_max // max(chunk_nbytes, 1)
    return max(1, min(job.options.read_threads, num_chunks, fitting))


def _run_through_store(
    job: ReadJob, chunks: Int64Array, progress: Progress | None, *, stop_at_first: bool
) -> list[Damage]:
    if not len(chunks):
        return []
    longest = int((job.plan.stop - job.plan.start)[chunks].max())
    local = threading.local()
    stop = threading.Event()

    def one(chunk: int) -> list[Damage]:
        if stop.is_set():
            return []
        if not hasattr(local, "buffer"):
            local.buffer = np.empty(longest, np.uint8)
        found = _read_chunk(job, chunk, local.buffer)
        if found and stop_at_first:
            stop.set()
        if progress is not None:
            progress(int(job.plan.stop[chunk] - job.plan.start[chunk]))
        return found

    out: list[Damage] = []
    with ThreadPoolExecutor(_threads(job, longest, len(chunks)), thread_name_prefix="ckpt-read") as pool:
        futures = [pool.submit(one, chunk) for chunk in chunks.tolist()]
        try:
            for future in as_completed(futures):
                out.extend(future.result())
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return out


def _read_chunk(job: ReadJob, chunk: int, buffer: NDArray[np.uint8]) -> list[Damage]:
    plan = job.plan
    start, stop = int(plan.start[chunk]), int(plan.stop[chunk])
    image = int(plan.writer[chunk])
    key = job.keys[image]
    data = buffer[: stop - start]
    try:
        job.store.read_into(key, start, data.data)
    except (DamagedError, NotFoundError) as error:  # an image that a manifest names and that is gone is damage
        tensor = _tensor(job, _first_fragment(plan, chunk))
        reason = job.missing(image) if job.missing and isinstance(error, NotFoundError) else error.message
        message = f"tensor `{tensor}` is damaged: bytes [{start}, {stop}) of `{key}`: {reason}"
        return [Damage(key=key, start=start, stop=stop, tensor=tensor, message=message)]
    blocks = slice(int(plan.block_starts[chunk]), int(plan.block_starts[chunk + 1]))
    low, high = plan.block_start[blocks] - start, plan.block_stop[blocks] - start
    found = crc32c_ranges(data, low, high)
    wrong = np.flatnonzero(found != plan.block_crc[blocks])
    if len(wrong):
        return [_damage(job, key, blocks.start + int(i), int(found[i])) for i in wrong]
    _copy(job, chunk, data)
    return []


def _damage(job: ReadJob, key: str, block: int, found: int) -> Damage:
    plan = job.plan
    start, stop = int(plan.block_start[block]), int(plan.block_stop[block])
    tensor = _tensor(job, int(plan.block_fragment[block]))
    return Damage(
        key=key,
        start=start,
        stop=stop,
        tensor=tensor,
        message=f"tensor `{tensor}` is damaged: bytes [{start}, {stop}) of `{key}`: "
        f"expected crc32c {int(plan.block_crc[block]):08x}, found {found:08x}",
    )


def _first_fragment(plan: ReadPlan, chunk: int) -> int:
    """A fragment that a chunk reads of, for messages."""
    if plan.block_starts[chunk] < plan.block_starts[chunk + 1]:
        return int(plan.block_fragment[plan.block_starts[chunk]])
    return int(plan.copies.fragment[plan.copy_starts[chunk]])


def _tensor(job: ReadJob, fragment: int) -> str:
    return job.specs[int(job.fragments.boxes.tensor[fragment])].name


def _copy(job: ReadJob, chunk: int, data: NDArray[np.uint8]) -> None:
    plan = job.plan
    rows = slice(int(plan.copy_starts[chunk]), int(plan.copy_starts[chunk + 1]))
    if rows.start == rows.stop:
        return
    copies = plan.copies
    base = data.ctypes.data
    copy_boxes(
        source=(copies.source[rows] - int(plan.start[chunk]) + base).astype(np.uint64),
        source_limit=np.full(rows.stop - rows.start, base + len(data), np.uint64),
        target=copies.target[rows],
        target_limit=job.pieces.limit[copies.piece[rows]],
        lengths=copies.lengths[rows],
        source_strides=copies.source_strides[rows],
        target_strides=copies.target_strides[rows],
        itemsize=copies.itemsize[rows],
    )


def check_files(store: Store, sizes: Sequence[tuple[str, int]]) -> list[CheckpointError]:
    """Errors of images that are missing or of another size than the manifest says."""
    out: list[CheckpointError] = []
    for key, nbytes in sizes:
        try:
            found = store.size(key)
        except CheckpointError as error:
            out.append(error)
            continue
        if found != nbytes:
            out.append(DamagedError(f"`{key}` is damaged: expected {nbytes} bytes, found {found}", kind="truncated"))
    return out
