"""What is sent of a blob has the checksum that it had when it was sealed: what has changed since is found by who gets it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ckpt.agent.local import Client
from ckpt.agent.pieces import Pieces
from ckpt.config import MIB, Options
from ckpt.format.checksum import piece_bytes_of
from ckpt.kernels import crc32c
from tests.agent.conftest import Make
from tests.agent.group import IMAGE_BYTES, Group, attempt, quick


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_001, 16 * MIB, 16 * MIB + 1, 17 * MIB + 4097])
def test_ranges_of_whole_pieces_have_their_checksum_and_others_none(nbytes: int) -> None:
    blob = memoryview(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8))
    pieces, size = Pieces.of(blob), piece_bytes_of(nbytes)
    assert pieces.crc == crc32c(blob)
    for start in range(0, nbytes, max(size, nbytes // 7 // size * size)):
        for stop in {min(start + size, nbytes), nbytes}:
            assert pieces.crc_of(start, stop) == crc32c(blob[start:stop])
    assert pieces.crc_of(1, nbytes) is None or nbytes == 0
    assert pieces.crc_of(0, nbytes + 1) is None
    assert pieces.crc_of(0, nbytes - 1) is None or (nbytes - 1) % size == 0


@pytest.mark.parametrize("rest", [0, 1, 9, 5000, 70_000])
@pytest.mark.parametrize("image_bytes", [0, 4096, 100_001, 16 * MIB - 7, 16 * MIB, 17 * MIB + 4097])
def test_checksums_of_an_image_go_on_over_what_follows_it(image_bytes: int, rest: int) -> None:
    blob = np.random.default_rng(rest).integers(0, 256, image_bytes + rest, np.uint8)
    size = piece_bytes_of(len(blob))
    image = [crc32c(blob[low : min(low + size, image_bytes)]) for low in range(0, image_bytes, size)]
    made = Pieces.after_image(np.array(image, np.uint32), image_bytes, blob[image_bytes:].tobytes())
    whole = Pieces.of(memoryview(blob))
    assert made.crc == whole.crc == crc32c(blob)
    for low in range(0, len(blob), size):
        assert made.crc_of(low, min(low + size, len(blob))) == whole.crc_of(low, min(low + size, len(blob)))


def test_told_checksums_count_only_when_they_are_whole_and_as_many_as_expected() -> None:
    blob = np.random.default_rng(1).integers(0, 256, 100_001, np.uint8)
    pieces, memory = Pieces.of(memoryview(blob)), bytearray(4 * 30)
    count = pieces.tell(memoryview(memory))
    assert count == 25
    told = Pieces.told(len(blob), memoryview(memory), count)
    assert told is not None and told.crc == pieces.crc
    assert pieces.tell(memoryview(bytearray(4 * 25))) is None
    assert Pieces.told(len(blob), memoryview(memory)[:100], count) is None
    for wrong in (24, 26, None, "25"):
        assert Pieces.told(len(blob), memoryview(memory), wrong) is None
    memory[11] ^= 4
    assert Pieces.told(len(blob), memoryview(memory), count) is None


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


def test_a_bit_that_flips_before_the_agent_hears_of_the_image_does_not_go_into_the_parity(folders: Options) -> None:
    """What the trainer says of its image counts, not what the agent finds there."""
    with Group(quick(folders), [(0, 1)]) as group:
        for one in group.ranks:
            one.keep(4)
        assert group.until_decided(4) == ["protected"] * 2
        group.ranks[0].keep(5, flips_at=IMAGE_BYTES // 2)
        group.ranks[1].keep(5)
        assert group.until_decided(5) == ["failed"] * 2
        error = group.ranks[1].client.call("progress", {"step": 5, "attempt": attempt(5)})[0]["error"]
        assert "is damaged: expected crc32c" in error


def test_a_trainer_tells_its_agent_the_checksums_of_its_image(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    call = Client.call
    monkeypatch.setattr(
        Client,
        "call",
        lambda self, name, params=None, **rest: (asked.append(params), call(self, name, params, **rest))[1],
    )
    checkpointer = make()
    state = {"w": torch.arange(300_000.0), "b": torch.arange(5), "text": "x" * 10_000}
    checkpointer.step(1, state).wait(60)  # type: ignore[union-attr]
    (kept,) = [params for params in asked if params and "blob_bytes" in params]
    assert kept["summed"] == -(-kept["blob_bytes"] // piece_bytes_of(kept["blob_bytes"]))
