"""Write one range of an open file, with several writes in flight.

In: a descriptor and a buffer. Out: bytes given to the kernel, or OSError. The GIL is dropped while writing. Never syncs,
and never closes the descriptor.
"""

from __future__ import annotations

import os

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import Buffer, bytes_view

MIB = 1 << 20


def write_at(fd: int, data: Buffer, offset: int, *, slice_bytes: int = 4 * MIB, in_flight: int = 1) -> bool:
    """Write all of `data` at byte `offset`; whether the file is still open for direct I/O afterwards.

    Short writes are continued, interrupted ones repeated. A descriptor with O_DIRECT whose write the system refuses with
    EINVAL, or takes only to the middle of a block, loses the flag, and the rest goes through the page cache. Any thread
    may call it; no other call may change the descriptor's flags meanwhile.

    Args:
        slice_bytes: of one write when there are several, a multiple of 4,096 up to 1 GiB.
        in_flight: writes at once, each on a thread; with 1 the data go uncut, on the caller's thread.

    Raises:
        OSError: the first failure of the system. Any part of the range may have been written.
    """
    view = bytes_view("data", data)
    if not 0 <= offset < 1 << 62 or in_flight < 1 or not 0 < slice_bytes <= 1 << 30 or slice_bytes % 4096:
        raise InvalidInputError(
            f"cannot write at byte {offset} with {in_flight} writes of {slice_bytes} bytes: the offset must not be"
            " negative, `in_flight` at least 1, `slice_bytes` a multiple of 4,096 up to 1 GiB"
        )
    if choice.demanded() == choice.REFERENCE:
        status, direct, error = reference.write_at(fd, view, offset)
    else:
        status, direct, error = choice.native().write_at(fd, view, offset, slice_bytes, min(in_flight, 1 << 16))
    if status == Status.SYSTEM_ERROR:
        raise OSError(error, os.strerror(error))
    assert status == Status.OK, Status(status)
    return bool(direct)
