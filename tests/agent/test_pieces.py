"""What is sent of a blob has the checksum that it had when it was sealed: what has changed since is found by who gets it."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt.agent.pieces import Pieces, piece_bytes_of
from ckpt.config import MIB, Options
from ckpt.kernels import crc32c
from tests.agent.group import IMAGE_BYTES, Group, attempt, quick


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_001, 16 * MIB, 16 * MIB + 1, 17 * MIB + 4097])
def test_ranges_of_whole_pieces_have_their_checksum_and_others_none(nbytes: int) -> None:
    blob = memoryview(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8))
    pieces, size = Pieces(blob), piece_bytes_of(nbytes)
    assert pieces.crc == crc32c(blob)
    for start in range(0, nbytes, max(size, nbytes // 7 // size * size)):
        for stop in {min(start + size, nbytes), nbytes}:
            assert pieces.crc_of(start, stop) == crc32c(blob[start:stop])
    assert pieces.crc_of(1, nbytes) is None or nbytes == 0
    assert pieces.crc_of(0, nbytes + 1) is None
    assert pieces.crc_of(0, nbytes - 1) is None or (nbytes - 1) % size == 0


@pytest.mark.parametrize("size", [MIB, 40 * MIB])
def test_small_and_large_blobs_of_one_group_are_cut_at_pieces_of_both(size: int) -> None:
    assert piece_bytes_of(size) % piece_bytes_of(1) == 0


def test_a_bit_that_flips_before_the_parity_is_made_does_not_go_into_it(folders: Options) -> None:
    """The snapshot is not protected, rather than protected by parity of what nobody saved; the one before stands."""
    with Group(quick(folders), [(0, 1)]) as group:
        for one in group.ranks:
            one.keep(4)
        assert group.until_decided(4) == ["protected"] * 2
        group.ranks[0].keep(5)  # rank 1 has not sealed it yet: nobody pulls
        began = next(one for one in group.ranks[0].client.segments() if one.step == 5)
        memory = np.frombuffer(group.ranks[0].mapped[began.name].memory, np.uint8)
        memory[IMAGE_BYTES // 2] ^= 1
        group.ranks[1].keep(5)
        assert group.until_decided(5) == ["failed"] * 2
        error = group.ranks[1].client.call("progress", {"step": 5, "attempt": attempt(5)})[0]["error"]
        assert "is damaged: expected crc32c" in error
        del memory
