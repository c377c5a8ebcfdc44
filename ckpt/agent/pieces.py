"""Checksums of the pieces of a blob as it was when it was sealed, so that what is sent of it later is compared with that.

In: a blob. Out: CRC-32Cs of it, and of ranges of whole pieces. Without them a bit that flips before the parity is made would be
sent with a fresh checksum, and go into the parity as if it had been saved. Pure.
"""

from __future__ import annotations

import numpy as np

from ckpt.config import KIB, MIB
from ckpt.kernels import crc32c_combine
from ckpt.kernels.checksum import crc32c_ranges

_SMALL_BYTES = 16 * MIB  # up to here, a blob has pieces of a page


def piece_bytes_of(blob_bytes: int) -> int:
    """Of a blob. Blocks of stripes begin at multiples of that of the largest blob, and so of all others."""
    return 4 * KIB if blob_bytes <= _SMALL_BYTES else 256 * KIB


class Pieces:
    """Of one blob."""

    def __init__(self, blob: memoryview) -> None:
        self._nbytes, self._piece_bytes = len(blob), piece_bytes_of(len(blob))
        starts = np.arange(0, self._nbytes, self._piece_bytes, dtype=np.int64)
        stops = np.minimum(starts + self._piece_bytes, self._nbytes)
        self._crcs: list[int] = crc32c_ranges(blob, starts, stops).tolist()

    @property
    def crc(self) -> int:
        """Of all of it."""
        return self.crc_of(0, self._nbytes) or 0

    def crc_of(self, start: int, stop: int) -> int | None:
        """Of bytes [start, stop); None where these are not whole pieces."""
        size = self._piece_bytes
        if start % size or (stop % size and stop != self._nbytes) or not 0 <= start <= stop <= self._nbytes:
            return None
        found = 0
        for number in range(start // size, -(-stop // size)):
            found = crc32c_combine(found, self._crcs[number], min(size, self._nbytes - number * size))
        return found
