"""pack puts every part in its place and sums the segments as they then are, on any shape, cut and thread count.

Method: hypothesis draws strided boxes and segments; target and checksums must equal those of the NumPy reference. Large
boxes, which are cut into pieces and shared over threads, must equal NumPy indexing and crc32c of the result.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, crc32c, pack, reference
from ckpt.kernels.choice import Status

ITEMSIZES = [1, 2, 3, 4, 8, 16, 40]
Columns = dict[str, Any]


def columns_of(views: list[NDArray[Any]], positions: list[int], edges: list[tuple[int, int]]) -> Columns:
    """Columns that pack `views` at `positions` and sum the segments `edges`."""
    num_dims = max((view.ndim for view in views), default=0)

    def table(values: list[tuple[int, ...]], fill: int) -> NDArray[np.int64]:
        padded = [[*[fill] * (num_dims - len(row)), *row] for row in values]
        return np.array(padded, np.int64).reshape(len(views), num_dims)

    return {
        "source": np.array([view.ctypes.data for view in views], np.uint64),
        "source_limit": np.array([np.lib.array_utils.byte_bounds(view)[1] for view in views], np.uint64),
        "position": np.array(positions, np.int64),
        "lengths": table([view.shape for view in views], 1),
        "source_strides": table([view.strides for view in views], 0),
        "itemsize": np.array([view.itemsize for view in views], np.int64),
        "segment_starts": np.array([low for low, _ in edges], np.int64),
        "segment_stops": np.array([high for _, high in edges], np.int64),
    }


def by_reference(target: NDArray[np.uint8], start: int, columns: Columns) -> tuple[tuple[int, int, int], list[int]]:
    out = np.zeros(len(columns["segment_starts"]), np.uint32)
    status = reference.pack(target=target, start=start, **columns, out=out)
    return status, out.tolist()


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[NDArray[Any]], list[int], list[tuple[int, int]], int, int]:
    """Views, their positions, segments, and the range of the image."""
    start = draw(st.sampled_from([0, 7, 1 << 40]))
    views, positions, at = [], [], start
    for seed in range(draw(st.integers(0, 5))):
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), max_size=4))
        dtype = np.dtype(f"V{draw(st.sampled_from(ITEMSIZES))}")
        steps = [draw(st.integers(1, 3)) for _ in lengths]
        whole = np.random.default_rng(seed).integers(
            0, 256, dtype.itemsize * int(np.prod([n * s for n, s in zip(lengths, steps, strict=True)])), np.uint8
        )
        base = whole.view(dtype).reshape([n * s for n, s in zip(lengths, steps, strict=True)])
        view = base[(..., *(slice(None, None, step) for step in steps))].transpose(
            draw(st.permutations(range(base.ndim)))
        )
        if view.ndim and draw(st.booleans()):
            view = np.broadcast_to(view[:1], view.shape)  # a stride of 0
        at += draw(st.integers(0, 9))
        views.append(view)
        positions.append(at)
        at += view.nbytes
    stop = at + draw(st.integers(0, 9))
    cuts = sorted(draw(st.lists(st.integers(start, stop), max_size=8)))
    return views, positions, list(zip(cuts[::2], cuts[1::2], strict=False)), start, stop


@given(packs(), st.integers(1, 4))
def test_native_pack_equals_reference_in_bytes_and_checksums(drawn: Any, threads: int) -> None:
    views, positions, edges, start, stop = drawn
    columns = columns_of(views, positions, edges)
    native, plain = np.full(stop - start, 7, np.uint8), np.full(stop - start, 7, np.uint8)
    found = pack(native, start=start, **columns, threads=threads).tolist()
    status, expected = by_reference(plain, start, columns)
    assert (status, found, native.tobytes()) == ((Status.OK, -1, -1), expected, plain.tobytes())


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
def test_large_rows_and_segments_cut_anywhere_equal_numpy(threads: int, itemsize: int) -> None:
    dtype = np.dtype(f"V{itemsize}")
    source = np.random.default_rng(1).integers(0, 256, 6_000_000 // itemsize * itemsize, np.uint8).view(dtype)
    wide = source[: len(source) // 1200 * 1200].reshape(-1, 1200)
    views = [source, wide[:, 100:1100], wide.T, wide.reshape(-1, 60, 20).transpose(2, 0, 1), source[:3], wide[::3, ::2]]
    positions, expected = [], np.zeros(0, np.uint8)
    for gap, view in enumerate(views):
        expected = np.concatenate([expected, np.zeros(gap * 1000, np.uint8)])
        positions.append(expected.size)
        expected = np.concatenate([expected, np.ascontiguousarray(view).reshape(-1).view(np.uint8)])
    cuts = sorted(
        {0, 5, 5_000, 5_001, *np.random.default_rng(2).integers(0, expected.size, 30).tolist(), expected.size}
    )
    edges = list(zip(cuts, cuts[1:], strict=False))
    del edges[3]  # bytes that are not summed
    target = np.zeros(expected.size, np.uint8)
    found = pack(target, **columns_of(views, positions, edges), threads=threads)
    assert target.tobytes() == expected.tobytes()
    assert found.tolist() == [crc32c(expected[low:high]) for low, high in edges]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("kernel", choice.available())
def test_many_small_rows_and_one_segment_over_all(threads: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, kernel)
    small = np.random.default_rng(2).integers(0, 256, (60_000, 96), np.uint8)
    target = np.zeros(small.size, np.uint8)
    columns = columns_of(list(small), list(range(0, small.size, 96)), [(0, small.size)])
    assert pack(target, **columns, threads=threads).tolist() == [crc32c(small)]
    assert target.tobytes() == small.tobytes()


def test_segments_alone_are_summed_and_nothing_written() -> None:
    target = np.random.default_rng(3).integers(0, 256, 5_000_000, np.uint8)
    before = target.tobytes()
    found = pack(target, **columns_of([], [], [(0, 4_999_999), (4_999_999, 5_000_000)]), threads=2)
    assert found.tolist() == [crc32c(before[:4_999_999]), crc32c(before[4_999_999:])]
    assert target.tobytes() == before


def test_checksum_is_of_the_bytes_written_while_the_source_changes() -> None:
    source, target = np.zeros(16 << 20, np.uint8), np.zeros(16 << 20, np.uint8)
    over = threading.Event()

    def scribble() -> None:
        value = 0
        while not over.is_set():
            value = (value + 1) % 256
            source[:] = value

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        columns = columns_of([source], [0], [(0, source.size)])
        pairs = [(int(pack(target, **columns, threads=2)[0]), crc32c(target)) for _ in range(10)]
    finally:
        over.set()
        thread.join()
    assert [summed for summed, _ in pairs] == [written for _, written in pairs]


def test_other_python_threads_run_meanwhile() -> None:
    source, target = np.ones(256 << 20, np.uint8), np.ones(256 << 20, np.uint8)
    columns = columns_of([source], [0], [(0, source.size)])
    started, stamps, over = threading.Event(), [], threading.Event()

    def tick() -> None:
        while not over.is_set():
            stamps.append(time.monotonic())
            started.set()
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    begin = time.monotonic()
    pack(target, **columns)
    end = time.monotonic()
    over.set()
    thread.join()
    assert sum(begin < stamp < end for stamp in stamps) >= 2


def one_row(**changes: Any) -> tuple[Columns, NDArray[np.uint8]]:
    """2 x 3 items of 4 bytes at byte 8 of an image of 64, one segment over the whole; the last entry keeps the source."""
    source = np.arange(24, dtype=np.uint8).view(np.uint32).reshape(2, 3)
    columns = columns_of([source], [8], [(0, 64)])
    for name, value in changes.items():
        columns[name] = np.asarray(value, columns[name].dtype).reshape(columns[name].shape)
    return columns, source.view(np.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lengths": [-1, 3]}, "negative"),
        ({"lengths": [0, -3]}, "negative"),
        ({"source_strides": [-12, 4]}, "negative"),
        ({"itemsize": 0}, "item size"),
        ({"lengths": [3, 3]}, "source limit"),
        ({"lengths": [2**62, 2**62]}, "source limit"),
        ({"lengths": [2**31, 2**33], "source_strides": [0, 0]}, "outside the target"),
        ({"source_strides": [2**63 - 1, 4]}, "source limit"),
        ({"itemsize": 2**63 - 1}, "source limit"),
        ({"position": 41}, "outside the target"),
        ({"position": -1}, "outside the target"),
        ({"position": 2**63 - 1}, "outside the target"),
    ],
)
def test_impossible_row_is_refused_alike_by_native_and_reference(changes: dict[str, Any], expected: str) -> None:
    columns, keep = one_row(**changes)
    target = np.zeros(64, np.uint8)
    with pytest.raises(InvalidInputError, match=f"row 0 .*{expected}"):
        pack(target, **columns)
    assert by_reference(target, 0, columns)[0][1:] == (0, -1)
    assert not target.any() and keep.size


def test_row_that_begins_inside_the_one_before_is_refused() -> None:
    source, target = np.ones(8, np.uint8), np.zeros(32, np.uint8)
    for positions in ([0, 7], [8, 0]):
        columns = columns_of([source, source], positions, [])
        with pytest.raises(InvalidInputError, match="row 1 .*before the row before it ends"):
            pack(target, **columns)
        assert by_reference(target, 0, columns)[0] == (Status.TARGET_OVERLAPS, 1, -1)
    assert not target.any()


@pytest.mark.parametrize("edges", [[(0, 5), (4, 9)], [(5, 9), (0, 3)], [(0, 1), (5, 4)], [(0, 1), (60, 65)], [(-1, 4)]])
def test_segments_out_of_order_or_bounds_are_refused_before_anything_is_written(edges: list[tuple[int, int]]) -> None:
    source, target = np.ones(8, np.uint8), np.zeros(64, np.uint8)
    columns = columns_of([source], [0], edges)
    with pytest.raises(InvalidInputError, match=f"segment {len(edges) - 1}, "):
        pack(target, **columns)
    assert by_reference(target, 0, columns)[0] == (Status.SEGMENT_OUT_OF_BOUNDS, -1, len(edges) - 1)
    assert not target.any()


def test_row_with_zero_length_needs_no_memory_and_no_place() -> None:
    columns, _ = one_row(lengths=[0, 3], position=10_000, source=1)
    target = np.full(64, 3, np.uint8)
    assert pack(target, **columns).tolist() == [crc32c(b"\x03" * 64)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"position": np.zeros(2, np.int64)}, r"`position` must have shape \(1,\)"),
        ({"lengths": np.zeros(1, np.int64)}, "`lengths` must have shape"),
        ({"segment_stops": np.zeros(3, np.int64)}, "`segment_stops` must have shape"),
        ({"itemsize": np.ones(1)}, "`itemsize` must hold integers"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"start": -1}, "`start` must be"),
        ({"start": 2**63 - 8}, "`start` must be"),
        ({"target": bytes(64)}, "`target` must be writable"),
    ],
)
def test_malformed_argument_is_named(changes: dict[str, Any], expected: str) -> None:
    columns, _ = one_row()
    arguments = {"target": np.zeros(64, np.uint8), **columns, **changes}
    with pytest.raises(InvalidInputError, match=expected):
        pack(arguments.pop("target"), **arguments)
