"""copy_boxes puts exactly the asked bytes in place, on any shape and thread count, and refuses before it writes.

Method: hypothesis draws strided boxes inside two buffers; the target after the native copy must equal, byte for byte
and gaps included, the target after the NumPy reference. Large boxes, which threads split, must equal NumPy indexing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import copy_boxes, reference
from ckpt.kernels.choice import Status

ITEMSIZES = [1, 2, 3, 4, 5, 8, 12, 16, 40]
Row = dict[str, Any]


def make_columns(rows: list[Row], source: NDArray[np.uint8], target: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Rows with offsets into the two buffers, as the columns that copy_boxes takes."""
    num_dims = max((len(row["lengths"]) for row in rows), default=0)

    def table(name: str, fill: int) -> NDArray[np.int64]:
        padded = [[*row[name], *[fill] * (num_dims - len(row[name]))] for row in rows]
        return np.array(padded, np.int64).reshape(len(rows), num_dims)

    def address(side: NDArray[np.uint8], name: str) -> NDArray[np.uint64]:
        return np.array([side.ctypes.data + row[name] for row in rows], np.uint64)

    return {
        "source": address(source, "source"),
        "source_limit": np.full(len(rows), source.ctypes.data + source.nbytes, np.uint64),
        "target": address(target, "target"),
        "target_limit": np.full(len(rows), target.ctypes.data + target.nbytes, np.uint64),
        "lengths": table("lengths", 1),
        "source_strides": table("source_strides", 0),
        "target_strides": table("target_strides", 0),
        "itemsize": np.array([row["itemsize"] for row in rows], np.int64),
    }


def nested_strides(draw: st.DrawFn, lengths: list[int], itemsize: int) -> list[int]:
    """Strides under which no two elements share a byte: dims in any order, with gaps or without."""
    strides = [0] * len(lengths)
    extent = itemsize
    for dim in draw(st.permutations(range(len(lengths)))):
        strides[dim] = extent + draw(st.sampled_from([0, 0, 0, 1, itemsize, 7]))
        extent += max(lengths[dim] - 1, 0) * strides[dim]
    return strides


def extent_of(lengths: list[int], strides: list[int], itemsize: int) -> int:
    return 0 if 0 in lengths else itemsize + sum((n - 1) * s for n, s in zip(lengths, strides, strict=True))


@st.composite
def rows_strategy(draw: st.DrawFn) -> tuple[list[Row], int, int]:
    """Rows, and the sizes of the buffers that just hold them. Targets follow each other, sources may overlap."""
    rows: list[Row] = []
    source_bytes, target_bytes = 0, 0
    for _ in range(draw(st.integers(0, 5))):
        lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 7]), max_size=5))
        itemsize = draw(st.sampled_from(ITEMSIZES))
        source_strides = nested_strides(draw, lengths, itemsize)
        if draw(st.booleans()):
            source_strides = [draw(st.sampled_from([stride, 0])) for stride in source_strides]  # repeated elements
        same = draw(st.booleans())
        target_strides = source_strides if same and 0 not in source_strides else nested_strides(draw, lengths, itemsize)
        source, target = draw(st.integers(0, 9)), target_bytes + draw(st.integers(0, 9))
        source_bytes = max(source_bytes, source + extent_of(lengths, source_strides, itemsize))
        target_bytes = target + extent_of(lengths, target_strides, itemsize)
        rows.append(
            {
                "source": source,
                "target": target,
                "lengths": lengths,
                "itemsize": itemsize,
                "source_strides": source_strides,
                "target_strides": target_strides,
            }
        )
    return rows, source_bytes, target_bytes


@given(rows_strategy(), st.integers(1, 4))
def test_native_copy_equals_reference_byte_for_byte(drawn: tuple[list[Row], int, int], threads: int) -> None:
    rows, source_bytes, target_bytes = drawn
    source = np.random.default_rng(0).integers(1, 256, source_bytes + 9, np.uint8)
    native, plain = np.zeros(target_bytes + 9, np.uint8), np.zeros(target_bytes + 9, np.uint8)
    copy_boxes(**make_columns(rows, source, native), threads=threads)
    status = reference.copy_boxes(**make_columns(rows, source, plain))
    assert (status, native.tobytes()) == ((Status.OK, -1), plain.tobytes())


@given(rows_strategy(), st.data())
def test_box_out_of_bounds_is_refused_and_writes_nothing(
    drawn: tuple[list[Row], int, int], data: st.DataObject
) -> None:
    rows, source_bytes, target_bytes = drawn
    full = [i for i, row in enumerate(rows) if 0 not in row["lengths"]]
    if not full:
        return
    source, target = np.ones(source_bytes + 9, np.uint8), np.zeros(target_bytes + 9, np.uint8)
    columns = make_columns(rows, source, target)
    bad = data.draw(st.sampled_from(full))
    side = data.draw(st.sampled_from(["source", "target"]))
    extent = extent_of(rows[bad]["lengths"], rows[bad][f"{side}_strides"], rows[bad]["itemsize"])
    columns[f"{side}_limit"][bad] = columns[side][bad] + np.uint64(data.draw(st.integers(0, extent - 1)))
    with pytest.raises(InvalidInputError, match=f"row {bad}: .*beyond the {side} limit"):
        copy_boxes(**columns, threads=data.draw(st.integers(1, 4)))
    assert reference.copy_boxes(**columns)[1] == bad
    assert not target.any()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
def test_large_boxes_split_over_threads_equal_numpy(threads: int, itemsize: int) -> None:
    dtype = np.dtype(f"V{itemsize}")
    elements = 6_000_000 // itemsize
    source = np.random.default_rng(1).integers(0, 256, elements * itemsize, np.uint8).view(dtype)
    wide = source[: elements // 1200 * 1200].reshape(-1, 1200)
    views = [source, wide[:, 100:1100], wide.T, wide.reshape(-1, 60, 20).transpose(2, 0, 1), wide[::3, ::2]]
    targets = [np.zeros(view.shape, dtype) for view in views]
    copy_boxes(**columns_of_arrays(views, targets), threads=threads)
    assert [target.tobytes() for target in targets] == [np.ascontiguousarray(view).tobytes() for view in views]


@pytest.mark.parametrize("threads", [1, 3])
def test_many_small_rows_beside_one_large_one_all_arrive(threads: int) -> None:
    small = np.random.default_rng(2).integers(0, 256, (20_000, 96), np.uint8)
    large = np.random.default_rng(3).integers(0, 256, 8_000_000, np.uint8)
    sources = [*small[:10_000], large, *small[10_000:]]
    targets = [np.zeros_like(source) for source in sources]
    copy_boxes(**columns_of_arrays(sources, targets), threads=threads)
    assert b"".join(t.tobytes() for t in targets) == b"".join(s.tobytes() for s in sources)


def columns_of_arrays(sources: list[NDArray[Any]], targets: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    num_dims = max(source.ndim for source in sources)

    def table(values: list[tuple[int, ...]], fill: int) -> NDArray[np.int64]:
        return np.array([[*row, *[fill] * (num_dims - len(row))] for row in values], np.int64)

    def limits(arrays: list[NDArray[Any]]) -> NDArray[np.uint64]:
        ends = [np.lib.array_utils.byte_bounds(array)[1] for array in arrays]
        return np.array(ends, np.uint64)

    return {
        "source": np.array([array.ctypes.data for array in sources], np.uint64),
        "source_limit": limits(sources),
        "target": np.array([array.ctypes.data for array in targets], np.uint64),
        "target_limit": limits(targets),
        "lengths": table([array.shape for array in sources], 1),
        "source_strides": table([array.strides for array in sources], 0),
        "target_strides": table([array.strides for array in targets], 0),
        "itemsize": np.array([array.itemsize for array in sources], np.int64),
    }


def one_row(**changes: Any) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """A copy of 2 x 3 items of 4 bytes, with some columns changed."""
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    row = {
        "source": 0,
        "target": 0,
        "lengths": [2, 3],
        "itemsize": 4,
        "source_strides": [12, 4],
        "target_strides": [12, 4],
    }
    columns = make_columns([{**row, **changes}], source, target)
    return {**columns, "keep": source}, target


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lengths": [-1, 3]}, "negative"),
        ({"lengths": [0, -3]}, "negative"),
        ({"source_strides": [-12, 4]}, "negative"),
        ({"target_strides": [12, -4]}, "negative"),
        ({"itemsize": 0}, "item size"),
        ({"target_strides": [12, 3]}, "share bytes"),
        ({"target_strides": [0, 4]}, "share bytes"),
        ({"target_strides": [4, 4]}, "share bytes"),
        ({"lengths": [2**62, 2**62]}, "source limit"),
        ({"lengths": [2**31, 2**33], "source_strides": [0, 0]}, "target limit"),
        ({"source_strides": [2**63 - 1, 4]}, "source limit"),
        ({"target_strides": [2**63 - 1, 4]}, "target limit"),
        ({"itemsize": 2**63 - 1}, "source limit"),
        ({"source": 60}, "source limit"),
        ({"target": 200}, "target limit"),
    ],
)
def test_impossible_box_is_refused_alike_by_native_and_reference(changes: dict[str, Any], expected: str) -> None:
    columns, target = one_row(**changes)
    columns.pop("keep")
    with pytest.raises(InvalidInputError, match=f"row 0: .*{expected}"):
        copy_boxes(**columns)
    assert reference.copy_boxes(**columns)[0] != Status.OK
    assert not target.any()


def test_row_with_zero_length_needs_no_memory() -> None:
    columns, target = one_row(lengths=[0, 3], source=10_000, target=10_000)
    columns.pop("keep")
    copy_boxes(**columns)
    assert not target.any()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("target", np.zeros(2, np.uint64), r"`target` must have shape \(1,\)"),
        ("lengths", np.zeros((1, 2)), "`lengths` must hold integers"),
        ("lengths", np.zeros(1, np.int64), "`lengths` must have shape"),
        ("source", np.array([-1]), "`source` has values outside uint64"),
        ("threads", 0, "`threads` must be at least 1"),
    ],
)
def test_malformed_column_is_named(name: str, value: Any, expected: str) -> None:
    columns, target = one_row()
    columns.pop("keep")
    with pytest.raises(InvalidInputError, match=expected):
        copy_boxes(**{**columns, name: value})
    assert not target.any()


def test_too_many_dims_are_refused() -> None:
    columns, target = one_row(lengths=[1] * 65, source_strides=[0] * 65, target_strides=[0] * 65)
    columns.pop("keep")
    with pytest.raises(InvalidInputError, match="65 dims"):
        copy_boxes(**columns)
    assert reference.copy_boxes(**columns) == (Status.BAD_ARGUMENT, -1)
    assert not target.any()
