"""Checksums of the pieces of a blob as it was when it was sealed, so that what is sent of it later is compared with that.

In: a blob, or what its trainer summed up of it. Out: CRC-32Cs of it, and of ranges of whole pieces. Without them a bit that flips
before the parity is made would be sent with a fresh checksum, and go into the parity as if it had been saved. Pure but for the
memory it is given.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckpt.format.checksum import piece_bytes_of
from ckpt.kernels import crc32c, crc32c_combine, crc32c_join, crc32c_ranges


class Pieces:
    """Of one blob.

    Args:
        crcs: [P] of its pieces.
    """

    def __init__(self, nbytes: int, crcs: NDArray[np.uint32]) -> None:
        self._nbytes, self._piece_bytes, self._crcs = nbytes, piece_bytes_of(nbytes), crcs

    @classmethod
    def of(cls, blob: memoryview) -> Pieces:
        """Read all of a blob."""
        starts, stops = _edges(0, len(blob), piece_bytes_of(len(blob)))
        return cls(len(blob), crc32c_ranges(blob, starts, stops))

    @classmethod
    def after_image(cls, image: NDArray[np.uint32], image_bytes: int, rest: bytes) -> Pieces:
        """Of an image and what follows it.

        Args:
            image: [P] of the pieces of the image, of the size of those of the blob.
        """
        nbytes = image_bytes + len(rest)
        starts, stops = _edges(image_bytes, nbytes, piece_bytes_of(nbytes))
        crcs = crc32c_ranges(rest, starts - image_bytes, stops - image_bytes).tolist()
        if image_bytes % piece_bytes_of(nbytes) and crcs:  # both have a part of one piece
            crcs[0] = crc32c_combine(int(image[-1]), crcs[0], int(stops[0] - starts[0]))
            image = image[:-1]
        return cls(nbytes, np.concatenate([image, np.array(crcs, np.uint32)]))

    def tell(self, memory: memoryview) -> int | None:
        """Write the checksums to the front of `memory`, and a checksum of them last: how many; None where they do not fit."""
        said = self._crcs.tobytes()
        said += np.uint32(crc32c(said)).tobytes()
        if len(said) > len(memory):
            return None
        memory[: len(said)] = said
        return len(self._crcs)

    @classmethod
    def told(cls, nbytes: int, memory: memoryview, count: object) -> Pieces | None:
        """What `tell` wrote for a blob of so many bytes, copied; None when it is not that."""
        num_pieces = -(-nbytes // piece_bytes_of(nbytes))
        if count != num_pieces or 4 * (num_pieces + 1) > len(memory):
            return None
        said = np.frombuffer(bytes(memory[: 4 * (num_pieces + 1)]), np.uint32)
        return cls(nbytes, said[:-1]) if crc32c(said[:-1]) == int(said[-1]) else None

    @property
    def crc(self) -> int:
        """Of all of it."""
        return self.crc_of(0, self._nbytes) or 0

    def crc_of(self, start: int, stop: int) -> int | None:
        """Of bytes [start, stop); None where these are not whole pieces."""
        size = self._piece_bytes
        if start % size or (stop % size and stop != self._nbytes) or not 0 <= start <= stop <= self._nbytes:
            return None
        chosen = slice(start // size, -(-stop // size))
        nbytes = np.full(chosen.stop - chosen.start, size, np.int64)
        nbytes[-1:] -= chosen.stop * size - stop if stop > start else 0
        return int(crc32c_join(self._crcs[chosen], nbytes, np.array([0, len(nbytes)]))[0])


def _edges(start: int, stop: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and stops of the parts of [start, stop) between multiples of `size`."""
    inner = np.arange(start // size + 1, -(-stop // size), dtype=np.int64) * size
    edges = np.concatenate([[start], inner, [stop]]) if stop > start else np.empty(0, np.int64)
    return edges[:-1], edges[1:]
