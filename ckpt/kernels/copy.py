"""Copy strided n-d boxes between addresses of this process.

In: columns of addresses, limits, lengths and strides. Out: bytes at the targets. Every bound is checked before the
first byte is copied; the GIL is dropped while copying. Never allocates the memory it copies, never keeps it alive.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import integer_column, thread_count


def copy_boxes(
    *,
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    target: NDArray[np.uint64],
    target_limit: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    target_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    threads: int = 1,
) -> None:
    """Copy N boxes of D dims. Any thread may call it; the caller keeps all memory alive until it returns.

    Element (i0, i1, ...) of box r lies `itemsize[r]` bytes long at `source[r] + sum(i_d * source_strides[r, d])`,
    likewise for the target. A box with a zero length copies nothing. A source stride of 0 repeats an element; elements
    of one target must be disjoint and nest (checked), sources must be disjoint from targets and targets from each
    other (not checked).

    Args:
        source, target: [N] addresses of the first elements.
        source_limit, target_limit: [N] exclusive ends of the memory that may be touched, addresses.
        lengths: [N, D] elements. source_strides, target_strides: [N, D] bytes, not negative. itemsize: [N] bytes.
        threads: at most this many; small copies use fewer.

    Raises:
        InvalidInputError: naming the first row that cannot be copied. Nothing was written.
    """
    num_rows = len(source)
    given = np.shape(lengths)
    if len(given) != 2:
        raise InvalidInputError(f"`lengths` must have shape (boxes, dims), found {given}")
    shape = (num_rows, given[1])
    columns = {
        "source": integer_column("source", source, np.uint64, (num_rows,)),
        "source_limit": integer_column("source_limit", source_limit, np.uint64, (num_rows,)),
        "target": integer_column("target", target, np.uint64, (num_rows,)),
        "target_limit": integer_column("target_limit", target_limit, np.uint64, (num_rows,)),
        "lengths": integer_column("lengths", lengths, np.int64, shape),
        "source_strides": integer_column("source_strides", source_strides, np.int64, shape),
        "target_strides": integer_column("target_strides", target_strides, np.int64, shape),
        "itemsize": integer_column("itemsize", itemsize, np.int64, (num_rows,)),
    }
    threads = thread_count(threads)
    if choice.demanded() == choice.REFERENCE:
        status, row = reference.copy_boxes(**columns)
    else:
        status, row = choice.native().copy_boxes(**columns, threads=threads)
    if status != Status.OK:
        _refuse(Status(status), row, columns)


_REASONS = {
    Status.BAD_ARGUMENT: "a length or stride is negative, the item size is below 1, or there are too many dims",
    Status.SOURCE_OUT_OF_BOUNDS: "it would read beyond the source limit",
    Status.TARGET_OUT_OF_BOUNDS: "it would write beyond the target limit",
    Status.TARGET_OVERLAPS: "two elements of the target share bytes or interleave",
}


def _refuse(status: Status, row: int, columns: dict[str, NDArray[np.integer]]) -> NoReturn:
    if row < 0:
        dims = columns["lengths"].shape[1]
        raise InvalidInputError(f"cannot copy boxes of {dims} dims: {_REASONS[status]}", kind="bad-box")
    values = {name: column[row].tolist() for name, column in columns.items()}
    room = {side: values[f"{side}_limit"] - values[side] for side in ("source", "target")}
    raise InvalidInputError(
        f"cannot copy box in row {row}: {_REASONS[status]}: "
        f"lengths {values['lengths']}, itemsize {values['itemsize']}, "
        f"source strides {values['source_strides']} in {room['source']} bytes, "
        f"target strides {values['target_strides']} in {room['target']} bytes",
        kind="bad-box",
    )
