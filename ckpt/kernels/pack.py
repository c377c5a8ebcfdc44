"""Copy parts of tensors to their places in an image and sum segments of it, in one pass over the memory.

In: columns of parts, sorted by place, the memory that holds a range of the image, and segments. Out: filled memory and
CRC-32C checksums. Every bound is checked before the first byte is copied; the GIL is dropped. Never keeps the memory
alive, and never does arithmetic on the columns: they are made once for a structure and passed in slices.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import Buffer, bytes_view, integer_column, thread_count


def pack(
    target: Buffer,
    *,
    start: int = 0,
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    position: NDArray[np.int64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    segment_starts: NDArray[np.int64],
    segment_stops: NDArray[np.int64],
    threads: int = 1,
) -> NDArray[np.uint32]:
    """[S] the CRC-32C of each segment of `target`, after N boxes of D dims were copied into it.

    Row r goes to byte `position[r]` of the image, dense, its last dim running fastest. What is summed is what was written,
    even while a source changes. Any thread may call it; the caller keeps the sources alive until it returns.

    Args:
        target: writable memory of bytes [start, start + its size) of the image.
        source, source_limit, source_strides, lengths, itemsize: as in `copy_boxes`.
        position: [N] bytes from the start of the image, sorted; rows do not overlap and lie inside `target`. The
            position of a row with a zero length does not matter.
        segment_starts, segment_stops: [S] bytes from the start of the image, stops exclusive, sorted, disjoint, inside
            `target`. They may leave bytes out, and may cover bytes that no row writes.
        threads: at most this many; small targets use fewer. A long segment is shared as well.

    Raises:
        InvalidInputError: naming the first row or segment at fault. Nothing was written.
    """
    view = bytes_view("target", target)
    if not view.flags.writeable:
        raise InvalidInputError("`target` must be writable memory")
    if not 0 <= start <= (1 << 63) - 1 - view.size:
        raise InvalidInputError(f"`start` must be a place in an image, found {start}")
    columns = _columns(source, source_limit, position, lengths, source_strides, itemsize, segment_starts, segment_stops)
    out = np.zeros(len(segment_starts), np.uint32)
    threads = thread_count(threads)
    if choice.demanded() == choice.REFERENCE:
        status, row, segment = reference.pack(target=view, start=start, **columns, out=out)
    else:
        native = choice.native().pack
        status, row, segment = native(choice.crc_kernel(), view, start, **columns, out=out, threads=threads)
    if status != Status.OK:
        _refuse(Status(status), row, segment, columns, (start, start + view.size))
    return out


def _columns(
    source: NDArray[Any],
    source_limit: NDArray[Any],
    position: NDArray[Any],
    lengths: NDArray[Any],
    source_strides: NDArray[Any],
    itemsize: NDArray[Any],
    segment_starts: NDArray[Any],
    segment_stops: NDArray[Any],
) -> dict[str, NDArray[Any]]:
    rows, segments = (len(source),), (len(segment_starts),)
    given = np.shape(lengths)
    if len(given) != 2:
        raise InvalidInputError(f"`lengths` must have shape (rows, dims), found {given}")
    table = (*rows, given[1])
    return {
        "source": integer_column("source", source, np.uint64, rows),
        "source_limit": integer_column("source_limit", source_limit, np.uint64, rows),
        "position": integer_column("position", position, np.int64, rows),
        "lengths": integer_column("lengths", lengths, np.int64, table),
        "source_strides": integer_column("source_strides", source_strides, np.int64, table),
        "itemsize": integer_column("itemsize", itemsize, np.int64, rows),
        "segment_starts": integer_column("segment_starts", segment_starts, np.int64, segments),
        "segment_stops": integer_column("segment_stops", segment_stops, np.int64, segments),
    }


_REASONS = {
    Status.BAD_ARGUMENT: "a length or stride is negative, the item size is below 1, or there are too many dims",
    Status.SOURCE_OUT_OF_BOUNDS: "it would read beyond the source limit",
    Status.TARGET_OUT_OF_BOUNDS: "it would write outside the target",
    Status.TARGET_OVERLAPS: "it begins before the row before it ends",
}


def _refuse(
    status: Status, row: int, segment: int, columns: dict[str, NDArray[Any]], target: tuple[int, int]
) -> NoReturn:
    where = f"the target holds bytes [{target[0]}, {target[1]}) of the image"
    if segment >= 0:
        low, high = columns["segment_starts"][segment], columns["segment_stops"][segment]
        raise InvalidInputError(
            f"cannot sum segment {segment}, bytes [{low}, {high}): segments must be sorted, disjoint and inside; {where}",
            kind="bad-range",
        )
    if row < 0:
        raise InvalidInputError(
            f"cannot pack rows of {columns['lengths'].shape[1]} dims: {_REASONS[status]}", kind="bad-box"
        )
    values = {name: columns[name][row].tolist() for name in columns if not name.startswith("segment")}
    raise InvalidInputError(
        f"cannot pack row {row} at byte {values['position']}: {_REASONS[status]}: lengths {values['lengths']}, "
        f"itemsize {values['itemsize']}, source strides {values['source_strides']} in "
        f"{values['source_limit'] - values['source']} bytes; {where}",
        kind="bad-box",
    )
