"""Goal: the native read fills the same bytes as the reference, in every mode, and never copies out of a damaged chunk.

Method: random chunks, blocks and 2-d boxes over one file of random bytes; all modes against `CKPT_KERNEL=reference`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckpt.errors import InvalidInputError
from ckpt.kernels import Chunks, Outcome, ReadBuffer, ReadMode, ReadOutcome, crc32c, read_chunks

FILE_BYTES = 3 * 1024 * 1024 + 777
FILL = 0xEE


class Job:
    """Chunks over one file, with a target of exactly the bytes that the boxes need."""

    def __init__(self, data: bytes, seed: int, num_chunks: int = 13) -> None:
        rng = np.random.default_rng(seed)
        edges = np.sort(rng.choice(len(data), 2 * num_chunks, replace=False))
        start, stop = edges[0::2], edges[1::2]
        blocks = [np.unique(np.append(np.arange(a, b, 50_000), b)) for a, b in zip(start, stop, strict=True)]
        block_start = np.concatenate([b[:-1] for b in blocks])
        block_stop = np.concatenate([b[1:] for b in blocks])
        rows = np.maximum((stop - start) // 7, 1)  # boxes of `rows` x 3 bytes out of rows of 7
        width = np.minimum(3, stop - start)
        rows = np.minimum(rows, (stop - start - width) // 7 + 1)
        self.sizes = rows * width
        self.target = np.full(int(self.sizes.sum()), FILL, np.uint8)
        at = (np.cumsum(self.sizes) - self.sizes + self.target.ctypes.data).astype(np.uint64)
        self.chunks = Chunks(
            file=np.zeros(num_chunks, np.int32),
            start=start,
            stop=stop,
            block_starts=np.append(0, np.cumsum([len(b) - 1 for b in blocks])),
            block_start=block_start,
            block_stop=block_stop,
            block_crc=np.array(
                [crc32c(data[a:b]) for a, b in zip(block_start.tolist(), block_stop.tolist(), strict=True)], np.uint32
            ),
            copy_starts=np.arange(num_chunks + 1),
            source=start.astype(np.uint64),
            target=at,
            target_limit=at + self.sizes.astype(np.uint64),
            lengths=np.stack([rows, width], axis=1),
            source_strides=np.tile([7, 1], (num_chunks, 1)),
            target_strides=np.stack([width, np.ones_like(width)], axis=1),
            itemsize=np.ones(num_chunks, np.int64),
        )

    def part(self, chunk: int) -> np.ndarray:
        end = np.cumsum(self.sizes)
        return self.target[end[chunk] - self.sizes[chunk] : end[chunk]]


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(7).bytes(FILE_BYTES)


@pytest.fixture
def files(tmp_path: Path, data: bytes) -> Iterator[tuple[int, int, Path]]:
    path = tmp_path / "image"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        direct = -1
    yield fd, direct, path
    for opened in (fd, direct):
        if opened >= 0:
            os.close(opened)


def run(job: Job, files: tuple[int, int, Path], mode: ReadMode = ReadMode.auto, *, stop: bool = False) -> ReadOutcome:
    return read_chunks(
        [files[0]], [files[1]], job.chunks, buffer=ReadBuffer(), mode=mode, threads=3, stop_at_first=stop
    )


@pytest.mark.parametrize("mode", list(ReadMode))
@pytest.mark.parametrize("seed", range(5))
def test_every_mode_gives_the_bytes_of_the_reference(
    files: tuple[int, int, Path], data: bytes, mode: ReadMode, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, plain = Job(data, seed), Job(data, seed)
    found = run(native, files, mode)
    monkeypatch.setenv("CKPT_KERNEL", "reference")
    expected = run(plain, files)

    assert (found.outcome.tolist(), native.target.tolist(), found.found_crc.tolist()) == (
        expected.outcome.tolist(),
        plain.target.tolist(),
        expected.found_crc.tolist(),
    )
    assert (native.target != FILL).any() and not found.outcome.any()


@pytest.mark.parametrize("kernel", ["table", "reference"])
def test_mapped_memory_takes_the_place_of_a_file(data: bytes, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_KERNEL", kernel)
    memory = np.frombuffer(data, np.uint8)
    job, plain = Job(data, 3), Job(data, 3)
    job.chunks.block_crc[int(job.chunks.block_starts[6]) - 1] ^= 1  # the last block of chunk 5
    found = read_chunks([-1], [-1], job.chunks, buffer=ReadBuffer(), threads=3, stop_at_first=False, mapped=[memory])
    read_chunks([-1], [-1], plain.chunks, buffer=ReadBuffer(), mapped=[memory])

    assert found.outcome.tolist() == [Outcome.DAMAGED if c == 5 else Outcome.DONE for c in range(13)]
    assert set(job.part(5).tolist()) == {FILL}
    np.testing.assert_array_equal(job.part(6), plain.part(6))
    expected = memory[int(job.chunks.start[6]) :][: job.sizes[6] // 3 * 7]
    np.testing.assert_array_equal(plain.part(6)[:3], expected[:3])
    with pytest.raises(InvalidInputError, match="does not fit"):
        short = memory[: int(job.chunks.stop[-1]) - 1]
        read_chunks([-1], [-1], job.chunks, buffer=ReadBuffer(), stop_at_first=False, mapped=[short])


def test_a_damaged_chunk_is_not_copied_and_all_others_are(files: tuple[int, int, Path], data: bytes) -> None:
    job = Job(data, 3)
    bad = int(job.chunks.block_starts[6]) - 1  # the last block of chunk 5
    job.chunks.block_crc[bad] ^= 1
    found = run(job, files)

    assert found.outcome.tolist() == [Outcome.DAMAGED if c == 5 else Outcome.DONE for c in range(13)]
    assert set(job.part(5).tolist()) == {FILL}
    assert np.flatnonzero(found.found_crc != job.chunks.block_crc).tolist() == [bad]


@pytest.mark.parametrize("mode", list(ReadMode))
def test_a_file_that_ends_early_is_short_and_not_copied(
    files: tuple[int, int, Path], data: bytes, mode: ReadMode
) -> None:
    job = Job(data, 4)
    os.truncate(files[2], int(job.chunks.stop[12]) - 1)
    found = run(job, files, mode)

    assert found.outcome.tolist() == [Outcome.DONE] * 12 + [Outcome.SHORT]
    assert set(job.part(12).tolist()) == {FILL}


def test_stop_at_first_begins_no_chunk_after_the_damaged_one(files: tuple[int, int, Path], data: bytes) -> None:
    job = Job(data, 5)
    job.chunks.block_crc[0] ^= 1
    found = read_chunks([files[0]], [-1], job.chunks, buffer=ReadBuffer(), threads=1, stop_at_first=True)

    assert found.outcome.tolist() == [Outcome.DAMAGED] + [Outcome.NOT_READ] * 12


def test_a_failed_read_gives_its_errno(tmp_path: Path, data: bytes) -> None:
    job = Job(data, 6)
    folder = os.open(tmp_path, os.O_RDONLY)
    found = read_chunks([folder], [-1], job.chunks, buffer=ReadBuffer(), threads=2, stop_at_first=False)
    os.close(folder)

    assert set(found.outcome.tolist()) == {errno.EISDIR}


def test_without_direct_reads_everything_comes_through_the_cache(files: tuple[int, int, Path], data: bytes) -> None:
    job = Job(data, 1)
    found = read_chunks([files[0]], [-1], job.chunks, buffer=ReadBuffer(), mode=ReadMode.direct, threads=2)

    assert (found.direct_nbytes, found.cached_nbytes) == (0, int((job.chunks.stop - job.chunks.start).sum()))


@pytest.mark.parametrize("column", ["source", "target_limit", "block_stop", "stop"])
def test_what_does_not_fit_is_refused_before_anything_is_read(
    files: tuple[int, int, Path], data: bytes, column: str
) -> None:
    job = Job(data, 2)
    values = getattr(job.chunks, column)
    values[4] = {"source": values[4] - 1, "target_limit": values[4] - 1}.get(column, FILE_BYTES * 2)
    if column == "stop":
        values[4] = job.chunks.start[4] - 1
    with pytest.raises(InvalidInputError):
        run(job, files)
    assert set(job.target.tolist()) == {FILL}
