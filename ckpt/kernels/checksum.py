"""CRC-32C (Castagnoli, RFC 3720 B.4) of buffers and of many ranges of one buffer.

In: contiguous buffers, read-only or not. Out: checksums as integers. The GIL is dropped while reading. Never copies the
data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import Buffer, bytes_view, integer_column, thread_count


def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC-32C of `data`, going on from `value`, the CRC-32C of the bytes before it. Any thread may call it."""
    _check_crc("value", value)
    view = bytes_view("data", data)
    if choice.demanded() == choice.REFERENCE:
        return reference.crc32c(view, value)
    status, out = choice.native().crc32c(choice.crc_kernel(), view, value)
    assert status == Status.OK, Status(status)
    return int(out)


def crc32c_ranges(
    data: Buffer, starts: NDArray[np.int64], stops: NDArray[np.int64], threads: int = 1
) -> NDArray[np.uint32]:
    """[M] the CRC-32C of `data[starts[i]:stops[i]]` for each i, in bytes. Any thread may call it.

    Threads share out whole ranges, so one long range runs on one thread.

    Raises:
        InvalidInputError: naming the first range that is not inside the data.
    """
    view = bytes_view("data", data)
    starts = integer_column("starts", starts, np.int64, (len(starts),))
    stops = integer_column("stops", stops, np.int64, (len(starts),))
    threads = thread_count(threads)
    out = np.zeros(len(starts), np.uint32)
    if choice.demanded() == choice.REFERENCE:
        status, row = reference.crc32c_ranges(view, starts, stops, out)
    else:
        status, row = choice.native().crc32c_ranges(choice.crc_kernel(), view, starts, stops, out, threads)
    if status != Status.OK:
        raise InvalidInputError(
            f"range {row}, bytes [{starts[row]}, {stops[row]}), is not inside data of {view.nbytes} bytes",
            kind="bad-range",
        )
    return out


def crc32c_combine(a: int, b: int, nbytes_b: int) -> int:
    """CRC-32C of A followed by B, from the CRC-32C of A, that of B, and the size of B in bytes."""
    _check_crc("a", a)
    _check_crc("b", b)
    if not 0 <= nbytes_b < 1 << 64:
        raise InvalidInputError(f"`nbytes_b` must be a size in bytes, found {nbytes_b}")
    if choice.demanded() == choice.REFERENCE:
        return reference.crc32c_combine(a, b, nbytes_b)
    return int(choice.native().crc32c_combine(a, b, nbytes_b))


def crc32c_join(crcs: NDArray[np.uint32], nbytes: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[G] the CRC-32C of runs `firsts[g]` to `firsts[g + 1]` one after the other, from that of each; 0 for none.

    Args:
        crcs, nbytes: [M] of the runs.
        firsts: [G + 1], ascending, within 0 to M.
    """
    crcs = integer_column("crcs", crcs, np.uint32, (len(crcs),))
    nbytes = integer_column("nbytes", nbytes, np.int64, (len(crcs),))
    if len(firsts) < 1:
        raise InvalidInputError("`firsts` must hold at least one number")
    firsts = integer_column("firsts", firsts, np.int64, (len(firsts),))
    out = np.zeros(len(firsts) - 1, np.uint32)
    join = reference.crc32c_join if choice.demanded() == choice.REFERENCE else choice.native().crc32c_join
    if join(crcs, nbytes, firsts, out) != Status.OK:
        raise InvalidInputError(f"`firsts` must ascend within 0 to {len(crcs)}, and sizes must not be negative")
    return out


def _check_crc(name: str, value: int) -> None:
    if not 0 <= value < 1 << 32:
        raise InvalidInputError(f"`{name}` must be a CRC-32C (0 <= value < 2**32), found {value}")
