"""Copies that nothing sums go past the caches: the same bytes, whatever the size and wherever both sides begin."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt.kernels import pack

GUARD = 64  # bytes around the target that must stay as they are


@pytest.mark.parametrize("nbytes", [65535, 65536, 65537, 81920, 262143, 262144, 300_001, 1_048_576 + 33, 3_000_017])
@pytest.mark.parametrize("shift", [0, 1, 31, 32, 33, 63])
def test_any_size_and_alignment_gives_the_same_bytes(nbytes: int, shift: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes + 64, dtype=np.uint8)
    for source_shift in (0, 5):
        target = np.full(nbytes + shift + 2 * GUARD, 7, np.uint8)
        wanted = target.copy()
        wanted[GUARD + shift : GUARD + shift + nbytes] = source[source_shift : source_shift + nbytes]
        begin = source.ctypes.data + source_shift
        none = np.empty(0, np.int64)
        pack(
            target,
            start=0,
            source=np.array([begin], np.uint64),
            source_limit=np.array([begin + nbytes], np.uint64),
            position=np.array([GUARD + shift], np.int64),
            lengths=np.array([[nbytes]], np.int64),
            source_strides=np.array([[1]], np.int64),
            itemsize=np.array([1], np.int64),
            segment_starts=none,
            segment_stops=none,
            threads=2,
        )
        np.testing.assert_array_equal(target, wanted)
