"""What is coded comes back, whatever it was; what is damaged is an error, never other elements.

Method: random and extreme chunks there and back; every byte of coded chunks cut off or changed.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt.delta import codecs
from ckpt.errors import DamagedError

SIZES = (0, 1, 7, 64, 1000, 4097)


def random_signs(num: int, density: float, seed: int = 0) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < density, rng.choice([-1, 1], num), 0).astype(np.int8)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num", SIZES)
def test_planes_come_back_with_and_without_a_base(num: int, itemsize: int) -> None:
    rng = np.random.default_rng(num)
    data, base = rng.integers(0, 256, (2, num * itemsize), np.uint8)
    for against in (None, base, data):
        coded = codecs.pack_planes(data, against, itemsize)
        assert codecs.unpack_planes(coded, against, itemsize, len(data)).tobytes() == data.tobytes()


def test_a_small_change_of_floats_takes_a_part_of_their_bytes() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(1 << 16).astype(np.float32)
    tuned = (base * (1 + 1e-3 * rng.standard_normal(1 << 16))).astype(np.float32)
    coded = codecs.pack_planes(tuned.view(np.uint8), base.view(np.uint8), 4)
    alone = codecs.pack_planes(tuned.view(np.uint8), None, 4)
    assert len(coded) < 0.8 * len(alone) < 0.8 * tuned.nbytes


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("num", SIZES)
def test_signs_come_back_and_take_about_their_entropy(num: int, density: float) -> None:
    signs = random_signs(num, density)
    coded = codecs.pack_signs(signs)
    assert codecs.unpack_signs(coded, num).tolist() == signs.tolist()
    share = np.count_nonzero(signs) / max(num, 1)
    entropy = 0.0 if share in (0.0, 1.0) else -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert len(coded) <= (1.06 * entropy + share + (share > 0.5)) * num / 8 + 16


def test_signs_at_the_ends_and_far_apart_come_back() -> None:
    for places in ([0], [999_999], [0, 999_999], [5, 6, 900_000]):
        signs = np.zeros(1_000_000, np.int8)
        signs[places] = [(-1) ** i for i in range(len(places))]
        coded = codecs.pack_signs(signs)
        assert len(coded) < 64 and (codecs.unpack_signs(coded, len(signs)) == signs).all()


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_damaged_signs_are_an_error_or_signs_of_the_same_number(density: float) -> None:
    coded = codecs.pack_signs(random_signs(300, density))
    for stop in range(len(coded)):
        with pytest.raises(DamagedError):
            codecs.unpack_signs(coded[:stop], 300)
    for at in range(len(coded)):
        changed = bytearray(coded)
        changed[at] ^= 0x5A
        try:
            assert len(codecs.unpack_signs(bytes(changed), 300)) == 300
        except DamagedError:
            continue


def test_damaged_planes_are_an_error_or_elements_of_the_same_number() -> None:
    data = np.arange(200, dtype=np.uint8)
    base = np.zeros(200, np.uint8)
    coded = codecs.pack_planes(data, base, 2)
    for stop in range(len(coded)):
        with pytest.raises(DamagedError):
            codecs.unpack_planes(coded[:stop], base, 2, 200)
    for at in range(len(coded)):
        changed = bytearray(coded)
        changed[at] ^= 0x5A
        try:
            assert len(codecs.unpack_planes(bytes(changed), base, 2, 200)) == 200
        except DamagedError:
            continue
