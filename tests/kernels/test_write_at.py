"""write_at gives the kernel every byte at its place, with any number of writes in flight, direct or not.

Method: a file is written in slices and read back; direct I/O is refused for real by memory that is not aligned.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, write_at

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()


@pytest.fixture(params=[choice.REFERENCE, ""])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


@contextlib.contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_direct(path: Path) -> Iterator[int]:
    try:
        with opened(path, os.O_DIRECT) as fd:
            yield fd
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no direct I/O")


@pytest.mark.parametrize("in_flight", [1, 2, 4, 100])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 65536, 65537, len(DATA)])
def test_every_byte_arrives_at_its_place(kernel: str, tmp_path: Path, in_flight: int, nbytes: int) -> None:
    with opened(tmp_path / "file") as fd:
        assert not write_at(fd, DATA[:nbytes], 777, slice_bytes=65536, in_flight=in_flight)
    assert (tmp_path / "file").read_bytes() == (bytes(777) + DATA[:nbytes] if nbytes else b"")


@pytest.mark.parametrize("in_flight", [1, 4])
def test_aligned_data_stay_direct(kernel: str, tmp_path: Path, in_flight: int) -> None:
    with contextlib.closing(mmap.mmap(-1, 1 << 20)) as pages, opened_direct(tmp_path / "file") as fd:
        pages[:] = DATA[: 1 << 20]
        assert write_at(fd, pages, 4096, slice_bytes=65536, in_flight=in_flight)
    assert (tmp_path / "file").read_bytes() == bytes(4096) + DATA[: 1 << 20]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_refused_direct_writes_go_through_the_page_cache_and_say_so(
    kernel: str, tmp_path: Path, in_flight: int
) -> None:
    with contextlib.closing(mmap.mmap(-1, (1 << 20) + 4096)) as pages, opened_direct(tmp_path / "file") as fd:
        pages[1 : (1 << 20) + 2] = DATA[: (1 << 20) + 1]
        with memoryview(pages) as view, view[1 : (1 << 20) + 2] as part:
            assert not write_at(fd, part, 0, slice_bytes=65536, in_flight=in_flight)
    assert (tmp_path / "file").read_bytes() == DATA[: (1 << 20) + 1]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_the_first_failure_of_the_system_is_raised(kernel: str, tmp_path: Path, in_flight: int) -> None:
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT, 0o600)
    with contextlib.closing(os.fdopen(fd)), pytest.raises(OSError) as caught:
        write_at(fd, DATA, 0, slice_bytes=65536, in_flight=in_flight)
    assert caught.value.errno == errno.EBADF


def test_a_write_cut_short_by_the_file_size_limit_ends_in_its_error(kernel: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path / "file") as fd:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError) as caught:
                write_at(fd, DATA, 0, slice_bytes=65536, in_flight=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, (tmp_path / "file").stat().st_size) == (errno.EFBIG, 100_000)


@pytest.mark.parametrize(
    ("offset", "slice_bytes", "in_flight"),
    [(-1, 4096, 1), (1 << 62, 4096, 1), (0, 0, 1), (0, 5000, 1), (0, 2 << 30, 1), (0, 4096, 0)],
)
def test_impossible_arguments_are_refused(offset: int, slice_bytes: int, in_flight: int) -> None:
    with pytest.raises(InvalidInputError, match="cannot write at byte"):
        write_at(0, b"x", offset, slice_bytes=slice_bytes, in_flight=in_flight)
