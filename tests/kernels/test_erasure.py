"""Any k of n blocks give back all, byte for byte, from every coder, and the sums of one pass are those of the bytes.

Method: a field of the test's own (polynomials over GF(2), bit by bit), the published rows of RS(4, 2), all erasure patterns for
small codes, hypothesis draws of sizes, and blocks that end at a page which cannot be read.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckpt import kernels
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.kernels import choice, erasure, erasure_reference
from ckpt.kernels.erasure import Code, CodeId, code_blocks, code_for, code_from_record

CODERS = [choice.REFERENCE, *choice.coders_available()]
Blocks = list[NDArray[np.uint8]]


@pytest.fixture(params=CODERS)
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each coder."""
    monkeypatch.setenv(choice.CODER_VARIABLE, request.param)
    return str(request.param)


def times(a: int, b: int) -> int:
    """The definition of the product in GF(2^8) with 0x11D."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(15, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


TIMES = np.array([[times(a, b) for b in range(256)] for a in range(256)], np.uint8)


def combined(sources: Sequence[NDArray[np.uint8]], rows: NDArray[np.uint8], nbytes: int) -> list[bytes]:
    """The oracle: each row times the sources, what is missing at their ends as zeros."""
    padded = np.zeros((len(sources), nbytes), np.uint8)
    for i, source in enumerate(sources):
        padded[i, : source.size] = source
    return [np.bitwise_xor.reduce(TIMES[row[:, None], padded], axis=0).tobytes() for row in rows]


def random_blocks(count: int, nbytes: int, seed: int = 0) -> Blocks:
    return list(np.random.default_rng(seed).integers(0, 256, (count, nbytes), np.uint8))


def coded(sources: Sequence[Any], rows: NDArray[np.uint8], nbytes: int, **options: Any) -> list[bytes]:
    targets = [np.full(nbytes, 7, np.uint8) for _ in range(len(rows))]
    code_blocks(sources, targets, rows, **options)
    return [target.tobytes() for target in targets]


def test_products_and_parity_rows_are_those_published(coder: str) -> None:
    assert np.array_equal(erasure_reference.PRODUCTS, TIMES)
    assert code_for(4, 2).parity_rows().tolist() == [[71, 167, 122, 186], [167, 71, 186, 122]]
    assert code_for(4, 1).parity_rows().tolist() == [[1, 1, 1, 1]]
    assert [(code_for(k, m).code, code_for(k, m).n) for k, m in ((5, 1), (5, 2))] == [
        (CodeId.xor, 6),
        (CodeId.cauchy_rs, 7),
    ]


def test_parity_rows_are_inverses_of_exclusive_ors() -> None:
    for k, m in itertools.product(range(1, 21), range(2, 13)):
        rows = code_for(k, m).parity_rows()
        assert (TIMES[rows, np.arange(k, k + m)[:, None] ^ np.arange(k)[None, :]] == 1).all()


def test_every_choice_of_pieces_is_decodable_in_every_code_of_up_to_20_pieces() -> None:
    pairs = [(k, n - k) for n in range(2, 21) for k in range(1, n)]
    matrices = [(np.concatenate([np.eye(k, dtype=np.uint8), code_for(k, m).parity_rows()]), k, m) for k, m in pairs]
    assert [pair for pair, made in zip(pairs, matrices, strict=True) if erasure.count_singular(*made)] == []


@pytest.mark.parametrize("name", [choice.REFERENCE, "portable"])
def test_count_finds_what_is_singular(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the choices of rows whose matrix the oracle's elimination cannot invert."""
    monkeypatch.setenv(choice.CODER_VARIABLE, name)
    random = np.random.default_rng(3)
    for k, m in ((3, 3), (4, 2), (2, 5)):
        matrix = np.concatenate([np.eye(k, dtype=np.uint8), random.integers(0, 3, (m, k), np.uint8)])
        expected = sum(
            erasure_reference.inverse(matrix[list(kept)]) is None for kept in itertools.combinations(range(k + m), k)
        )
        assert expected > 0
        assert erasure.count_singular(matrix, k, m) == expected
    with pytest.raises(InvalidInputError, match="not a systematic matrix"):
        erasure.count_singular(np.ones((5, 3), np.uint8), 3, 2)


SMALL = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (3, 3), (5, 3), (8, 2)]


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_every_loss_of_any_pieces_is_rebuilt_byte_for_byte(k: int, m: int, coder: str) -> None:
    code, nbytes = code_for(k, m), 67
    data = random_blocks(k, nbytes)
    data[-1] = data[-1][:29]  # the last is short
    parity = coded(data, code.parity_rows(), nbytes)
    assert parity == combined(data, code.parity_rows(), nbytes)
    pieces = [*data, *(np.frombuffer(block, np.uint8) for block in parity)]
    whole = [block.tobytes().ljust(nbytes, b"\0") for block in pieces]
    for have in itertools.combinations(range(k + m), k):
        wanted = [piece for piece in range(k + m) if piece not in have]
        rows = code.rows(have=have, wanted=wanted)
        assert coded([pieces[i] for i in have], rows, nbytes) == [whole[i] for i in wanted]


LENGTHS = [0, 1, 15, 16, 31, 32, 63, 64, 65, 127, 129, 4095, 4096, 4097, 12_289, 100_003]


@pytest.mark.parametrize("lengths", ["even", "uneven"])
def test_odd_lengths_and_uneven_blocks_equal_the_definition(lengths: str, coder: str) -> None:
    for nbytes in LENGTHS:
        for k, m in ((1, 1), (3, 1), (4, 2), (5, 3)):
            data = random_blocks(k, nbytes, seed=nbytes)
            if lengths == "uneven":
                data = [block[: nbytes * i // k] for i, block in enumerate(data)]  # the first is empty, none is whole
            rows = code_for(k, m).parity_rows()
            assert coded(data, rows, nbytes, tile_bytes=16_384) == combined(data, rows, nbytes)


@given(st.data())
def test_native_coders_equal_the_reference_in_bytes_and_sums(drawn: Any) -> None:
    nbytes = drawn.draw(st.integers(0, 20_000))
    sizes = drawn.draw(st.lists(st.integers(0, nbytes), min_size=1, max_size=9))
    num_targets, add = drawn.draw(st.integers(0, 5)), drawn.draw(st.booleans())
    random = np.random.default_rng(drawn.draw(st.integers(0, 99)))
    rows = random.integers(0, drawn.draw(st.sampled_from([2, 256])), (num_targets, len(sizes)), np.uint8)
    offset = drawn.draw(st.integers(0, 33))  # sources are at any address
    sources = [random.integers(0, 256, size + offset, np.uint8)[offset:] for size in sizes]
    begin = random.integers(0, 256, (num_targets, nbytes), np.uint8)
    tile_bytes = drawn.draw(st.sampled_from([1, 10_000, 30_000, 1 << 20]))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CODERS:
            patch.setenv(choice.CODER_VARIABLE, name)
            targets = [block.copy() for block in begin]
            sums = code_blocks(
                sources, targets, rows, add=add, sum_sources=True, sum_targets=True, tile_bytes=tile_bytes
            )
            found.append(([t.tobytes() for t in targets], sums.sources.tolist(), sums.targets.tolist()))
    assert found == [found[0]] * len(CODERS)
    assert found[0][1:] == ([kernels.crc32c(s) for s in sources], [kernels.crc32c(t) for t in found[0][0]])


@pytest.mark.parametrize(("k", "m"), [(5, 1), (4, 2), (6, 3)])
def test_sources_folded_in_one_at_a_time_in_any_order_give_the_same_parity(k: int, m: int, coder: str) -> None:
    nbytes = 70_001
    data, rows = random_blocks(k, nbytes), code_for(k, m).parity_rows()
    data[1] = data[1][:12_345]
    targets = [np.zeros(nbytes, np.uint8) for _ in range(m)]
    for i in reversed(range(k)):
        for start in range(0, nbytes, 30_000):  # and each in chunks
            part = data[i][start : start + 30_000]
            if part.size:
                code_blocks(
                    [part], [target[start : start + 30_000] for target in targets], rows[:, i : i + 1], add=True
                )
    assert [target.tobytes() for target in targets] == combined(data, rows, nbytes)


class Page:
    """Bytes that end where memory that cannot be touched begins."""

    def __init__(self, data: bytes) -> None:
        self._map = mmap.mmap(-1, 3 * mmap.PAGESIZE)
        whole = np.frombuffer(self._map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.mprotect(whole.ctypes.data + 2 * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
        self.view = whole[2 * mmap.PAGESIZE - len(data) : 2 * mmap.PAGESIZE]
        self.view[:] = np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_no_byte_beyond_a_block_is_touched(m: int, coder: str) -> None:
    for size in [0, 1, 31, 32, 33, 63, 64, 65, 255, 256, 1000, 4095, 4096, 8191]:
        nbytes = 8191
        data = [Page(bytes(block[: size if i == 1 else nbytes])) for i, block in enumerate(random_blocks(4, nbytes))]
        targets, rows = [Page(bytes(nbytes)) for _ in range(m)], code_for(4, m).parity_rows()
        for add in (False, True):
            code_blocks([s.view for s in data], [t.view for t in targets], rows, add=add, sum_sources=True)
            expected = [bytes(nbytes)] * m if add else combined([s.view for s in data], rows, nbytes)
            assert [t.view.tobytes() for t in targets] == expected  # added twice is zero


def test_other_python_threads_run_meanwhile() -> None:
    data, targets = random_blocks(4, 32 << 20), [np.zeros(32 << 20, np.uint8) for _ in range(2)]
    started, over, stamps = threading.Event(), threading.Event(), []

    def tick() -> None:
        while not over.is_set():
            stamps.append(time.monotonic())
            started.set()
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    begin = time.monotonic()
    for _ in range(4):
        code_blocks(data, targets, code_for(4, 2).parity_rows())
    end = time.monotonic()
    over.set()
    thread.join()
    assert sum(begin < stamp < end for stamp in stamps) >= 2


def test_a_code_comes_back_from_its_record_and_only_from_its_own(coder: str) -> None:
    for k, m in SMALL:
        code = code_for(k, m)
        assert code_from_record(code.record()) == code
    matrix = bytes([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 71, 167, 122, 186, 167, 71, 186, 122])
    record = code_for(4, 2).record()
    assert record == {"code": "cauchy_rs", "k": 4, "m": 2, "matrix_sha256": hashlib.sha256(matrix).hexdigest()}
    wrong = [
        {"code": "vandermonde"},
        {"k": 5},
        {"k": 0},
        {"k": 65},
        {"k": 4.0},
        {"m": True},
        {"m": 33},
        {"code": "xor"},
        {"code": 2},
    ]
    wrong += [{"matrix_sha256": "00" * 32}, {"matrix_sha256": None}]
    for change in wrong:
        with pytest.raises(DamagedError, match="erasure code") as caught:
            code_from_record({**record, **change})
        assert caught.value.kind == "unknown-code"
    with pytest.raises(DamagedError):
        code_from_record({})


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (65, 1), (1, 33), (-1, 2)])
def test_codes_out_of_bounds_are_refused(k: int, m: int) -> None:
    with pytest.raises(InvalidInputError, match=f"k = {k}, m = {m}"):
        code_for(k, m)


def test_the_largest_code_rebuilds(coder: str) -> None:
    code = code_for(erasure.SOURCES_MAX, erasure.TARGETS_MAX)
    data = random_blocks(code.k, 500)
    parity = [np.frombuffer(block, np.uint8) for block in coded(data, code.parity_rows(), 500)]
    lost = list(range(0, 2 * code.m, 2))
    have = [piece for piece in range(code.n) if piece not in lost]
    back = coded([[*data, *parity][i] for i in have], code.rows(have=have, wanted=lost), 500)
    assert back == [data[i].tobytes() for i in lost]


@pytest.mark.parametrize(
    ("have", "wanted", "expected"),
    [
        ([0, 1, 2], [3], "4 different pieces of 6 are needed"),
        ([0, 1, 2, 2], [3], "4 different pieces"),
        ([0, 1, 2, 3, 4], [5], "4 different pieces"),
        ([0, 1, 2, 6], [3], "`have` must name pieces 0 to 5"),
        ([0, 1, 2, 3], [-1], "`wanted` must name pieces 0 to 5"),
    ],
)
def test_pieces_that_cannot_rebuild_are_refused(have: list[int], wanted: list[int], expected: str, coder: str) -> None:
    with pytest.raises(InvalidInputError, match=expected):
        code_for(4, 2).rows(have=have, wanted=wanted)


ROWS = np.ones((2, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s, t: (s[:2], t, ROWS), r"`coefficients` must have shape \(2, 2\)"),
        (lambda s, t: (s, t[:1], ROWS), r"`coefficients` must have shape \(1, 3\)"),
        (lambda s, t: (s, t, ROWS.astype(float)), "`coefficients` must hold integers"),
        (lambda s, t: (s, t, ROWS.astype(int) * 256), "`coefficients` has values outside uint8"),
        (lambda s, t: ([], t, np.ones((2, 0), np.uint8)), "1 to 64 sources"),
        (lambda s, t: ([*s[:2], s[2][:50]], [t[0], t[1][:50]], ROWS), "`targets` must be of one size"),
        (lambda s, t: ([*s[:2], bytes(101)], t, ROWS), r"sources\[2\] has 101 bytes"),
        (lambda s, t: (s, [t[0], bytes(100)], ROWS), r"targets\[1\] must be writable"),
        (lambda s, t: (s, [t[0], t[0]], ROWS), r"targets\[1\] overlaps"),
        (lambda s, t: (s, [t[0], s[1]], ROWS), r"targets\[1\] overlaps"),
        (lambda s, t: ([s[0][::2], *s[1:]], t, ROWS), r"`sources\[0\]` must be contiguous"),
    ],
)
def test_blocks_that_cannot_be_coded_are_named_and_nothing_is_written(
    change: Callable[[Blocks, Blocks], Any], expected: str, coder: str
) -> None:
    sources, targets = random_blocks(3, 100), [np.full(100, 7, np.uint8) for _ in range(2)]
    before = [block.tobytes() for block in [*sources, *targets]]
    with pytest.raises(InvalidInputError, match=expected):
        code_blocks(*change(sources, targets))
    assert [block.tobytes() for block in [*sources, *targets]] == before


def test_tile_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="`tile_bytes` must be positive"):
        code_blocks([b"a"], [], np.zeros((0, 1), np.uint8), tile_bytes=0)


def test_coder_is_a_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.CODER_VARIABLE, "jerasure")
    with pytest.raises(InvalidInputError, match="found 'jerasure'(.|\n)*reference, portable, isal"):
        code_blocks([b"a"], [], np.zeros((0, 1), np.uint8))
    monkeypatch.setenv(choice.CODER_VARIABLE, "portable")
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, choice.REFERENCE)
    with pytest.raises(InvalidInputError, match="CKPT_CODER=portable contradicts CKPT_KERNEL=reference"):
        code_blocks([b"a"], [], np.zeros((0, 1), np.uint8))
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "")
    monkeypatch.setenv(choice.CODER_VARIABLE, "isal")
    monkeypatch.setattr(choice, "native", lambda: Bare())
    with pytest.raises(InvalidInputError, match="CKPT_CODER=isal: not here(.|\n)*libisal2"):
        code_blocks([b"a"], [], np.zeros((0, 1), np.uint8))


class Bare:
    """A native core that finds no ISA-L."""

    def coder_available(self, coder: int) -> bool:
        return False


def test_kernel_info_names_the_coder(coder: str) -> None:
    info = kernels.kernel_info()
    assert info["coder"] == coder
    assert ("isal" in info["coders_available"]) == (info["isal_library"] is not None)


def test_numbers_equal_those_of_the_native_core() -> None:
    native = choice.native()
    assert (native.CODE_SOURCES_MAX, native.CODE_TARGETS_MAX) == (erasure.SOURCES_MAX, erasure.TARGETS_MAX)
    assert math.comb(12, 4) <= erasure._TRIED_MAX  # the codes that are recommended are tried
    assert isinstance(code_for(8, 4), Code)
