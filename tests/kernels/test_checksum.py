"""CRC-32C is the standard one, the same from every kernel that this processor has, and chains and combines.

Method: vectors of RFC 3720 B.4, and hypothesis draws of data, cuts and kernels, compared with a bit-by-bit oracle.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt import kernels
from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, crc32c, crc32c_combine, crc32c_join, crc32c_ranges

KERNELS = [choice.REFERENCE, *choice.available()]
VECTORS = [
    (b"", 0x00000000),
    (b"a", 0xC1D04330),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex("01c00000" + "00" * 12 + "14000000000004000000001400000018" + "28" + "00" * 7 + "02" + "00" * 7),
        0xD9963A56,
    ),
]
DATA = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each kernel."""
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


def oracle(data: bytes) -> int:
    """The definition, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_published_vectors_come_out(kernel: str) -> None:
    assert [crc32c(data) for data, _ in VECTORS] == [expected for _, expected in VECTORS]


def test_every_length_and_alignment_equals_the_definition(kernel: str) -> None:
    if kernel == choice.REFERENCE:
        lengths = [0, 1, 7, 63, 300]
    else:  # around the steps of 8 bytes, 3 x 256 and 3 x 8192 bytes
        lengths = [*range(20), 767, 768, 769, 1000, 24575, 24576, 24577, 26000]
    cases = [(start, length) for length in lengths for start in (0, 1, 3, 8)]
    data = DATA.tobytes()
    found = [crc32c(DATA[start : start + length]) for start, length in cases]
    assert found == [oracle(data[start : start + length]) for start, length in cases]


@given(st.integers(0, DATA.size), st.integers(0, DATA.size), st.integers(0, DATA.size))
def test_kernels_agree_and_chain_and_combine(a: int, b: int, c: int) -> None:
    start, cut, stop = sorted((a, b, c))
    with pytest.MonkeyPatch.context() as patch:
        found = set()
        for name in KERNELS:
            patch.setenv(choice.ENVIRONMENT_VARIABLE, name)
            head, tail = crc32c(DATA[start:cut]), crc32c(DATA[cut:stop])
            found |= {crc32c(DATA[start:stop]), crc32c(DATA[cut:stop], head), crc32c_combine(head, tail, stop - cut)}
    assert len(found) == 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_ranges_equal_single_checksums(kernel: str, threads: int) -> None:
    data = np.tile(DATA, 1 if kernel == choice.REFERENCE else 100)
    edges = np.linspace(0, data.size, 40 if kernel == choice.REFERENCE else 400).astype(np.int64)
    starts, stops = np.concatenate([edges[:-1], [0, 5]]), np.concatenate([edges[1:], [0, 5]])  # two empty ranges
    found = crc32c_ranges(memoryview(data).toreadonly(), starts, stops, threads)
    assert found.tolist() == [crc32c(data[a:b]) for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("bad", [(-1, 5), (5, 4), (0, 101), (101, 101), (2**62, 2**63 - 1)])
def test_range_outside_the_data_is_named(kernel: str, bad: tuple[int, int]) -> None:
    starts, stops = np.array([0, bad[0]], np.int64), np.array([100, bad[1]], np.int64)
    with pytest.raises(InvalidInputError, match="range 1, .* not inside data of 100 bytes"):
        crc32c_ranges(DATA[:100], starts, stops)


def test_no_ranges_give_no_checksums(kernel: str) -> None:
    assert crc32c_ranges(b"", np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize(
    "data",
    [b"123456789", bytearray(b"123456789"), memoryview(b"0123456789")[1:], np.frombuffer(b"123456789", np.uint8)],
    ids=["bytes", "bytearray", "memoryview", "read-only array"],
)
def test_any_contiguous_buffer_is_taken(data: object) -> None:
    assert crc32c(data) == 0xE3069283


def test_array_of_any_dtype_is_its_bytes() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    assert crc32c(array) == crc32c(memoryview(array)) == crc32c(array.tobytes())


@pytest.mark.parametrize("data", [memoryview(b"123456789")[::2], DATA[::2], "text", 7])
def test_what_is_not_a_contiguous_buffer_is_refused(data: object) -> None:
    with pytest.raises(InvalidInputError, match="`data` must be"):
        crc32c(data)


def test_value_that_is_no_checksum_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="must be a CRC-32C"):
        crc32c(b"", 1 << 32)
    with pytest.raises(InvalidInputError, match="must be a CRC-32C"):
        crc32c_combine(0, -1, 4)


def test_combine_takes_sizes_of_any_length(kernel: str) -> None:
    zeros = crc32c(bytes(1 << 16))
    assert crc32c_combine(zeros, crc32c(bytes(5)), 5) == crc32c(bytes((1 << 16) + 5))
    assert crc32c_combine(crc32c_combine(0, 0, 2**40), 0, 2**40) == crc32c_combine(0, 0, 2**41)


def test_runs_are_joined_to_groups(kernel: str) -> None:
    sizes = np.array([5, 0, 100, 1, 7, 64, 300])
    edges = np.concatenate([[0], np.cumsum(sizes)])
    runs = np.array([crc32c(DATA[a:b]) for a, b in zip(edges, edges[1:], strict=False)], np.uint32)
    firsts = np.array([0, 0, 3, 4, 7])
    expected = [crc32c(DATA[edges[a] : edges[b]]) for a, b in zip(firsts, firsts[1:], strict=False)]
    assert crc32c_join(runs, sizes, firsts).tolist() == expected
    assert crc32c_join(runs[:0], sizes[:0], np.array([0])).shape == (0,)


@pytest.mark.parametrize("firsts", [[0, 3], [1, 0], [-1, 1], []])
def test_groups_of_runs_that_are_not_there_are_refused(kernel: str, firsts: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="`firsts` must"):
        crc32c_join(np.zeros(2, np.uint32), np.ones(2, np.int64), np.array(firsts, np.int64))
    with pytest.raises(InvalidInputError, match="negative"):
        crc32c_join(np.zeros(1, np.uint32), np.array([-1]), np.array([0, 1]))


def test_kernel_info_names_what_runs(kernel: str) -> None:
    info = kernels.kernel_info()
    assert (info["demanded"], info["crc32c"]) == (kernel, kernel)
