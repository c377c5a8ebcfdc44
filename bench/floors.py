"""What the machine can do: direct writes and reads of the same bytes, and memory copies. No metadata, no resharding.

In: a state and a folder. Out: files, or the state filled. Direct I/O through one aligned buffer per rank.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bench.workloads import State, local_of

BUFFER_BYTES = 16 << 20
_BLOCK = 4096


class Direct:
    """Own fragments through one 16 MiB aligned buffer with O_DIRECT (where the file system has it), and one sync."""

    name = "direct I/O"

    def __init__(self) -> None:
        self._buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)

    def save(self, state: State, folder: Path, step: int) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        fd = _open(self._file(folder, step), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        at = total = 0
        for part in _bytes_of(state):
            done = 0
            while done < len(part):
                count = min(len(part) - done, BUFFER_BYTES - at)
                self._buffer[at : at + count] = part[done : done + count]
                at, done = at + count, done + count
                if at == BUFFER_BYTES:
                    os.write(fd, memoryview(self._buffer))
                    at = 0
            total += len(part)
        os.write(fd, memoryview(self._buffer[: -(-at // _BLOCK) * _BLOCK]))
        os.ftruncate(fd, total)
        os.fsync(fd)
        os.close(fd)
        return {}

    def load(self, state: State, folder: Path, step: int) -> dict[str, float]:
        fd = _open(self._file(folder, step), os.O_RDONLY)
        at = have = position = 0
        for part in _bytes_of(state):
            done = 0
            while done < len(part):
                if at == have:
                    have, at = os.preadv(fd, [memoryview(self._buffer)], position), 0
                    position += have
                count = min(len(part) - done, have - at)
                part[done : done + count] = self._buffer[at : at + count]
                at, done = at + count, done + count
        os.close(fd)
        return {}

    @staticmethod
    def _file(folder: Path, step: int) -> Path:
        return folder / f"direct-{step}-{dist.get_rank()}"


class DirectImages:
    """The files that ckpt loads, read as `Direct` reads its own: the rate of a disk can depend on where a file lies."""

    name = "direct I/O, ckpt's files"

    def __init__(self, nbytes: int) -> None:
        """`nbytes`: of this rank's image, at least."""
        self._buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)
        self._target = np.ones(nbytes, np.uint8)

    def load(self, folder: Path, step: int) -> dict[str, float]:
        """Read the image of this rank's number."""
        (file,) = (folder / "run" / f"step-{step:012d}").glob(f"*/{dist.get_rank():05d}-of-*.safetensors")
        fd = _open(file, os.O_RDONLY)
        at = 0
        while have := os.preadv(fd, [memoryview(self._buffer)], at):
            self._target[at : at + have] = self._buffer[:have]
            at += have
        os.close(fd)
        return {}


def _open(file: Path, flags: int) -> int:
    try:
        return os.open(file, flags | os.O_DIRECT, 0o666)
    except OSError:  # a file system without it, such as tmpfs on older kernels
        return os.open(file, flags, 0o666)


def _bytes_of(state: State) -> Iterator[NDArray[np.uint8]]:
    """The memory of each local tensor, without torch's dtypes that numpy lacks."""
    for tensor in state.values():
        local = local_of(tensor)
        size = local.numel() * local.element_size()
        if size:
            yield np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(local.data_ptr()))


def memcpy_rate(nbytes: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes per second of one rank that copies between two buffers that it touched before; the best of some runs."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, nbytes / (time.perf_counter() - start))
    return best


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the cached pages of every file below `folder` (fadvise; needs no root)."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def warm_cache(folder: Path) -> None:
    """Read every file below `folder`, so that its pages are cached (direct writes leave none behind)."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(BUFFER_BYTES):
                    pass
