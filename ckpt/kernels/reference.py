"""The kernels in plain NumPy: what the native ones are tested against, and what `CKPT_KERNEL=reference` runs.

In: checked columns (ckpt.kernels.columns). Out: the same bytes, checksums and refusals as the native core. Written to
be read, not to be fast. Never calls the native core.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels.choice import Status

DIMS_MAX = 64  # CKPT_DIMS_MAX in native/include/ckpt_core.h
_INT64_MAX = 2**63 - 1
_BLOCK_BYTES = 4096  # what direct I/O takes


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
) -> tuple[int, int]:
    """(status, first row at fault or -1); nothing is copied unless every row passes."""
    if lengths.shape[1] > DIMS_MAX:
        return Status.BAD_ARGUMENT, -1
    rows = [
        _Row(
            source=(int(source[r]), int(source_limit[r])),
            target=(int(target[r]), int(target_limit[r])),
            lengths=tuple(lengths[r].tolist()),
            source_strides=tuple(source_strides[r].tolist()),
            target_strides=tuple(target_strides[r].tolist()),
            itemsize=int(itemsize[r]),
        )
        for r in range(len(source))
    ]
    for r, row in enumerate(rows):
        status = row.check()
        if status != Status.OK:
            return status, r
    for row in rows:
        row.copy()
    return Status.OK, -1


class _Row:
    """One box to copy."""

    def __init__(
        self,
        *,
        source: tuple[int, int],
        target: tuple[int, int],
        lengths: tuple[int, ...],
        source_strides: tuple[int, ...],
        target_strides: tuple[int, ...],
        itemsize: int,
    ) -> None:
        self.source, self.source_limit = source
        self.target, self.target_limit = target
        self.lengths = lengths
        self.source_strides = source_strides
        self.target_strides = target_strides
        self.itemsize = itemsize

    def check(self) -> Status:
        if self.itemsize < 1 or any(n < 0 for n in (*self.lengths, *self.source_strides, *self.target_strides)):
            return Status.BAD_ARGUMENT
        if 0 in self.lengths:
            return Status.OK
        if self.source + self._extent(self.source_strides) > self.source_limit:
            return Status.SOURCE_OUT_OF_BOUNDS
        if self.target + self._extent(self.target_strides) > self.target_limit:
            return Status.TARGET_OUT_OF_BOUNDS
        inner = self.itemsize  # extent of the dims with smaller strides
        for stride, length in sorted(zip(self.target_strides, self.lengths, strict=True)):
            if length > 1 and stride < inner:
                return Status.TARGET_OVERLAPS
            inner += (length - 1) * stride
        return Status.OK

    def _extent(self, strides: tuple[int, ...]) -> int:
        """Bytes from the first to past the last byte of the box."""
        extent = self.itemsize + sum((n - 1) * stride for n, stride in zip(self.lengths, strides, strict=True))
        return extent if extent <= _INT64_MAX else 1 << 65

    def copy(self) -> None:
        if 0 in self.lengths:
            return
        target = _memory(self.target, self._extent(self.target_strides))
        source = _memory(self.source, self._extent(self.source_strides))
        shape = (*self.lengths, self.itemsize)
        np.lib.stride_tricks.as_strided(target, shape, (*self.target_strides, 1))[...] = (
            np.lib.stride_tricks.as_strided(source, shape, (*self.source_strides, 1))
        )


def _memory(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def read_chunks(
    *,
    fd: NDArray[np.int32],
    direct_fd: NDArray[np.int32],
    memory: NDArray[np.uint64],
    memory_bytes: NDArray[np.int64],
    file: NDArray[np.int32],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    block_starts: NDArray[np.int64],
    block_start: NDArray[np.int64],
    block_stop: NDArray[np.int64],
    block_crc: NDArray[np.uint32],
    copy_starts: NDArray[np.int64],
    source: NDArray[np.uint64],
    target: NDArray[np.uint64],
    target_limit: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    target_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    stop_at_first: bool,
    outcome: NDArray[np.int32],
    found_crc: NDArray[np.uint32],
) -> tuple[int, int, int, int, bool]:
    """As the native one, through the page cache: (status, box at fault, bytes read directly, bytes cached, refused)."""
    del direct_fd
    cached = 0
    for c in range(len(file)):
        first, last = int(start[c]), int(stop[c])
        if memory[file[c]]:
            if last > memory_bytes[file[c]]:
                return Status.SOURCE_OUT_OF_BOUNDS, -1, 0, 0, False
            address = ctypes.c_char * (last - first)
            mapped = memoryview(address.from_address(int(memory[file[c]]) + first)).cast("B")
            data, code = np.frombuffer(mapped, np.uint8), 0
        else:
            data, code = _read_file(int(fd[file[c]]), first, last)
        if code == 0:
            cached += last - first
            blocks, rows = slice(block_starts[c], block_starts[c + 1]), slice(copy_starts[c], copy_starts[c + 1])
            crc32c_ranges(data, block_start[blocks] - first, block_stop[blocks] - first, found_crc[blocks])
            base = data.ctypes.data
            code = 0 if (found_crc[blocks] == block_crc[blocks]).all() else _DAMAGED
        if code == 0:
            status, row = copy_boxes(
                source=source[rows] - np.uint64(first) + np.uint64(base),
                source_limit=np.full(rows.stop - rows.start, base + len(data), np.uint64),
                target=target[rows],
                target_limit=target_limit[rows],
                lengths=lengths[rows],
                source_strides=source_strides[rows],
                target_strides=target_strides[rows],
                itemsize=itemsize[rows],
            )
            if status != Status.OK:
                return status, rows.start + row, 0, 0, False
        outcome[c] = code
        if code != 0 and stop_at_first:
            break
    return Status.OK, -1, 0, cached, False


_SHORT, _DAMAGED = -2, -3  # CKPT_READ_SHORT, CKPT_READ_DAMAGED


def _read_file(fd: int, start: int, stop: int) -> tuple[NDArray[np.uint8], int]:
    data = bytearray(stop - start)
    done = 0
    while done < len(data):
        try:
            count = os.preadv(fd, [memoryview(data)[done:]], start + done)
        except OSError as error:
            return np.empty(0, np.uint8), error.errno or -1
        if count == 0:
            return np.empty(0, np.uint8), _SHORT
        done += count
    return np.frombuffer(data, np.uint8), 0


# CRC-32C. Registers are polynomials over GF(2) modulo the Castagnoli polynomial, bit-reflected (bit 31 is x^0).
_POLYNOMIAL = 0x82F63B78
_ONE = 0x80000000


def _times_x(a: Any) -> Any:
    return (a >> 1) ^ ((a & 1) * _POLYNOMIAL)


def _multiply(a: Any, b: int) -> Any:
    """The product; `a` may be an int or a uint64 array."""
    product = a & 0
    for bit in range(31, -1, -1):
        product = product ^ (((a >> bit) & 1) * b)
        b = _times_x(b)
    return product


def _power_of_bytes(nbytes: int) -> int:
    """x^(8 * nbytes)."""
    power, base = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            power = _multiply(power, base)
        base = _multiply(base, base)
        nbytes >>= 1
    return power


def _make_table() -> NDArray[np.uint64]:
    state = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        state = _times_x(state)
    return state


_TABLE = _make_table()


def crc32c(data: NDArray[np.uint8], value: int = 0) -> int:
    """Cut the data into rows, run all rows at once column by column, and join the rows pairwise.

    Zero bytes in front of a zero register change nothing, so the data are padded in front to a full rectangle.
    """
    if not data.size:
        return value
    width = math.isqrt(data.size) + 1
    num_rows = 1 << (-(-data.size // width) - 1).bit_length()
    padded = np.zeros(num_rows * width, np.uint64)
    padded[padded.size - data.size :] = data
    states = np.zeros(num_rows, np.uint64)
    for column in np.ascontiguousarray(padded.reshape(num_rows, width).T):
        states = _TABLE[(states ^ column) & 255] ^ (states >> 8)
    shift = _power_of_bytes(width)
    while states.size > 1:
        states = _multiply(states[0::2], shift) ^ states[1::2]
        shift = _multiply(shift, shift)
    start = _multiply(value ^ 0xFFFFFFFF, _power_of_bytes(data.size))
    return int(start) ^ int(states[0]) ^ 0xFFFFFFFF


def crc32c_ranges(
    data: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64], out: NDArray[np.uint32]
) -> tuple[int, int]:
    """(status, first range at fault or -1); `out` is untouched unless every range passes."""
    bad = np.flatnonzero((starts < 0) | (stops < starts) | (stops > data.size))
    if bad.size:
        return Status.SOURCE_OUT_OF_BOUNDS, int(bad[0])
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        out[i] = crc32c(data[start:stop])
    return Status.OK, -1


def crc32c_combine(a: int, b: int, nbytes_b: int) -> int:
    """CRC-32C of A followed by B."""
    return int(_multiply(a, _power_of_bytes(nbytes_b))) ^ b


def crc32c_join(
    crcs: NDArray[np.uint32], nbytes: NDArray[np.int64], firsts: NDArray[np.int64], out: NDArray[np.uint32]
) -> int:
    """Status; `out` is untouched unless the columns pass."""
    bounds = firsts.tolist()
    if bounds[0] < 0 or bounds[-1] > len(crcs) or bounds != sorted(bounds) or (nbytes < 0).any():
        return Status.BAD_ARGUMENT
    for group, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        joined = 0
        for run in range(first, last):
            joined = crc32c_combine(joined, int(crcs[run]), int(nbytes[run]))
        out[group] = joined
    return Status.OK


def pack(
    *,
    target: NDArray[np.uint8],
    start: int,
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    position: NDArray[np.int64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    segment_starts: NDArray[np.int64],
    segment_stops: NDArray[np.int64],
    out: NDArray[np.uint32],
) -> tuple[int, int, int]:
    """(status, first row at fault or -1, first segment at fault or -1); checks all, then copies all, then sums."""
    if lengths.shape[1] > DIMS_MAX:
        return Status.BAD_ARGUMENT, -1, -1
    rows = []
    previous, stop = start, start + target.size
    for r in range(len(source)):
        row = _packed_row(r, source, source_limit, lengths, source_strides, itemsize)
        status = row.check()
        at = int(position[r])
        if status == Status.OK and 0 not in row.lengths:
            nbytes = math.prod(row.lengths) * row.itemsize
            if at < start or at + nbytes > stop:
                status = Status.TARGET_OUT_OF_BOUNDS
            elif at < previous:
                status = Status.TARGET_OVERLAPS
            previous = at + nbytes
            row.target = target.ctypes.data + at - start
            rows.append(row)
        if status != Status.OK:
            return status, r, -1
    previous = start
    for i, (low, high) in enumerate(zip(segment_starts.tolist(), segment_stops.tolist(), strict=True)):
        if not previous <= low <= high <= stop:
            return Status.SEGMENT_OUT_OF_BOUNDS, -1, i
        previous = high
    for row in rows:
        row.copy()
    for i, (low, high) in enumerate(zip(segment_starts.tolist(), segment_stops.tolist(), strict=True)):
        out[i] = crc32c(target[low - start : high - start])
    return Status.OK, -1, -1


def _packed_row(
    r: int,
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
) -> _Row:
    """Row `r` with dense target strides, the last dim fastest; the target itself is set and bounded by the caller."""
    shape = tuple(lengths[r].tolist())
    size = int(itemsize[r])
    return _Row(
        source=(int(source[r]), int(source_limit[r])),
        target=(0, 1 << 66),
        lengths=shape,
        source_strides=tuple(source_strides[r].tolist()),
        target_strides=tuple(math.prod(shape[d + 1 :]) * size for d in range(len(shape))),
        itemsize=size,
    )


def write_at(fd: int, data: NDArray[np.uint8], offset: int) -> tuple[int, bool, int]:
    """(status, still direct, errno): one write after the other, continued where one was short."""
    direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
    view, start = data.data, 0
    while start < len(view):
        try:
            count = os.pwrite(fd, view[start:], offset + start)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                return Status.SYSTEM_ERROR, direct, int(error.errno or errno.EIO)
            direct = _leave_direct(fd)
            continue
        if count == 0:
            return Status.SYSTEM_ERROR, direct, errno.EIO
        start += count
        if direct and start < len(view) and count % _BLOCK_BYTES:
            direct = _leave_direct(fd)  # the next position is not on a block
    return Status.OK, direct, 0


def _leave_direct(fd: int) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return False
