"""Carry out a read plan: read chunks in parallel, verify every block, copy boxes into place.

In: a `ReadPlan` and a store. Out: the wanted pieces, filled. A block is verified before anything is copied out of it, so a
damaged byte never reaches the caller's memory. Holds at most `read_threads` chunks at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.config import Options
from ckpt.errors import CheckpointError, DamagedError, NotFoundError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import copy_boxes, crc32c_ranges
from ckpt.plan.read import ReadPlan
from ckpt.store.base import Store

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


def run_reads(job: ReadJob, *, progress: Progress | None = None) -> None:
    """Read, verify and copy. Raises DamagedError at the first damage; pieces not yet copied are then untouched."""
    for damage in _run(job, progress, stop_at_first=True):
        raise DamagedError(damage.message, hints=("`ckpt verify` lists all damage of a checkpoint",))


def find_damage(job: ReadJob, *, progress: Progress | None = None) -> list[Damage]:
    """Read and verify everything; all damage found, sorted by place. A block that two chunks share counts once."""
    found = {(damage.key, damage.start): damage for damage in _run(job, progress, stop_at_first=False)}
    return [found[place] for place in sorted(found)]


def _run(job: ReadJob, progress: Progress | None, *, stop_at_first: bool) -> list[Damage]:
    num_chunks = len(job.plan.writer)
    if not num_chunks:
        return []
    longest = int((job.plan.stop - job.plan.start).max())
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
    threads = max(1, min(job.options.read_threads, num_chunks))
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-read") as pool:
        futures = [pool.submit(one, chunk) for chunk in range(num_chunks)]
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
        tensor = _tensor(job, int(plan.block_fragment[plan.block_starts[chunk]]))
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
