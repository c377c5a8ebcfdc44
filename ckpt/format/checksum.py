"""Checksums of a checkpoint: CRC-32C per block of a fragment, SHA-256 for whole records.

In: byte ranges. Out: block tables and digests. Pure. A block is at most `block_bytes` long and counted from the first byte
of its fragment, so that a partial read can verify every block that it touches.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ckpt.config import KIB, MIB
from ckpt.layout.box import Int64Array

BLOCK_BYTES_MIN = 64 * KIB
BLOCK_BYTES_MAX = 1024 * KIB
DIGEST_BYTES = 32  # of a fragment: SHA-256
_SMALL_BYTES = 16 * MIB  # up to here, an image has pieces of a page
BLOCKS_MAX = 1 << 20  # of one checkpoint: larger ones get larger blocks


def sha256(data: bytes | memoryview) -> str:
    """`sha256:<hex>` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def choose_block_bytes(total_bytes: int) -> int:
    """The block size of a checkpoint of this many bytes: 64 KiB, doubled up to 1 MiB while there would be over 2^20 blocks.

    Small blocks keep partial reads small; four bytes per block keep the index small.
    """
    size = BLOCK_BYTES_MIN
    while size < BLOCK_BYTES_MAX and total_bytes // size > BLOCKS_MAX:
        size *= 2
    return size


def num_blocks(nbytes: Int64Array, block_bytes: int) -> Int64Array:
    """[N] blocks of each fragment."""
    return -(-nbytes // block_bytes)


def block_ranges(offsets: Int64Array, nbytes: Int64Array, block_bytes: int) -> tuple[Int64Array, Int64Array]:
    """[B] start and stop of every block of fragments at `offsets`, fragment after fragment."""
    counts = num_blocks(nbytes, block_bytes)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(offsets, counts) + number * block_bytes
    return starts, np.minimum(starts + block_bytes, np.repeat(offsets + nbytes, counts))


def piece_bytes_of(nbytes: int) -> int:
    """Of the pieces of an image, or of what agents protect of it, whose checksums go with it: a multiple of all smaller ones."""
    return 4 * KIB if nbytes <= _SMALL_BYTES else 256 * KIB
