"""The arithmetic of merging gives the bits that its contract says, with every set of loops and on any number of threads.

Method: the NumPy reference against all native loops, byte by byte, on drawn dtypes, weights and lengths; every code of the small
dtypes, torch's own conversions, exact rational arithmetic for sums of 64-bit sources, and the published answers of Philox.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, merge, merge_reference
from ckpt.kernels.merge import Elements, FloatDtype, MixParts, TiesMode, TiesRule, Tile

DTYPES = list(FloatDtype.__members__)
SMALL = [name for name in DTYPES if FloatDtype[name].itemsize <= 2]
LENGTHS = [0, 1, 7, 255, 256, 257, 2048, 2049, 5000]
LOOPS = choice.loops_available()


@pytest.fixture(params=LOOPS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(choice.LOOPS_VARIABLE, request.param)
    return str(request.param)


def every_code(dtype: str) -> NDArray[np.uint8]:
    kind = FloatDtype[dtype]
    if kind.itemsize > 2:
        return np.random.default_rng(0).integers(0, 256, 4096 * kind.itemsize, np.uint8)
    return np.arange(1 << (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(np.uint8)


def values_near_rounding(dtype: str) -> NDArray[np.float64]:
    """All finite numbers of a dtype, what lies between two of them and just beside that, and numbers beyond its range."""
    finite = merge_reference.widen(every_code(dtype), FloatDtype[dtype])
    ends = np.unique(finite[np.isfinite(finite)])
    middle = ends[:-1] / 2 + ends[1:] / 2
    rng = np.random.default_rng(1)
    wide = rng.standard_normal(4000) * 10.0 ** rng.integers(-45, 39, 4000)
    edges = [
        np.inf,
        -np.inf,
        np.nan,
        0.0,
        -0.0,
        1e300,
        -1e300,
        5e-324,
        ends[-1] * 1.01,
        ends[-1] * 1.04,
        ends[-1] * 1.2,
    ]
    with np.errstate(over="ignore"):
        near = [np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    return np.concatenate([finite, middle, *near, wide, edges])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_exact_for_every_code(dtype: str, loops: str) -> None:
    data = every_code(dtype)
    found = merge.widen(Elements(data=data, dtype=dtype))
    expected = merge_reference.widen(data, FloatDtype[dtype])
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected)) or np.isnan(expected).any()


@pytest.mark.parametrize("dtype", SMALL)
def test_widening_agrees_with_torch(dtype: str) -> None:
    data = every_code(dtype)
    torches = torch.from_numpy(data.copy()).view(getattr(torch, dtype)).double().numpy()
    assert np.array_equal(merge.widen(Elements(data=data, dtype=dtype)), torches, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrowing_rounds_once_to_nearest_even(dtype: str, loops: str) -> None:
    values = values_near_rounding(dtype)
    found = np.zeros(len(values) * FloatDtype[dtype].itemsize, np.uint8)
    finite = merge.narrow(values, dtype, found)
    expected = merge_reference.narrow(values, FloatDtype[dtype])
    rows = ~np.isnan(values)
    width = FloatDtype[dtype].itemsize
    assert found.reshape(-1, width)[rows].tobytes() == expected.reshape(-1, width)[rows].tobytes()
    assert np.isnan(merge_reference.widen(found, FloatDtype[dtype])[~rows]).all()
    assert not finite


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrowing_of_a_float32_agrees_with_torch(dtype: str) -> None:
    values = np.random.default_rng(3).standard_normal(20000).astype(np.float32)
    found = np.zeros(len(values) * FloatDtype[dtype].itemsize, np.uint8)
    merge.narrow(values.astype(np.float64), dtype, found)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.uint8).numpy()
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_survive_the_way_to_fp64_and_back(dtype: str, loops: str) -> None:
    data = every_code(dtype)
    width = FloatDtype[dtype].itemsize
    found = np.zeros(len(data), np.uint8)
    merge.narrow(merge.widen(Elements(data=data, dtype=dtype)), dtype, found)
    numbers = ~np.isnan(merge_reference.widen(data, FloatDtype[dtype]))
    assert found.reshape(-1, width)[numbers].tobytes() == data.reshape(-1, width)[numbers].tobytes()


def test_narrowing_to_bfloat16_does_not_round_twice() -> None:
    """1 + 2**-8 + 2**-40 lies above the middle of two bfloat16; as a float32 it would be that middle, and go to the even one."""
    found = np.zeros(2, np.uint8)
    merge.narrow(np.array([1 + 2.0**-8 + 2.0**-40]), "bfloat16", found)
    assert merge.widen(Elements(data=found, dtype="bfloat16"))[0] == 1 + 2.0**-7


@st.composite
def mixes(draw: st.DrawFn) -> tuple[MixParts, list[NDArray[np.uint8]], bool]:
    """Parts of drawn dtypes, shares and lengths, and the memory that they are in; targets are behind the sources."""
    num_sources, num_parts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    columns: dict[str, list[object]] = {name: [] for name in ("source", "dtype", "weight", "divisor", "sum", "target")}
    lengths, kinds, exact, kept, targets = [], [], [], [], []
    for _ in range(num_parts):
        n = draw(st.sampled_from(LENGTHS))
        dtypes = [FloatDtype[draw(st.sampled_from(DTYPES))] for _ in range(num_sources)]
        has = [draw(st.booleans()) for _ in range(num_sources)]
        has[draw(st.integers(0, num_sources - 1))] = True
        data = [np.zeros(n * dtype.itemsize + 1, np.uint8) for dtype in dtypes]
        for one, dtype in zip(data, dtypes, strict=True):
            one[: n * dtype.itemsize] = merge_reference.narrow(rng.standard_normal(n), dtype)
        kept += data
        target = FloatDtype[draw(st.sampled_from(DTYPES))]
        targets.append(np.full(n * target.itemsize + 1, 0xAA, np.uint8))
        columns["source"].append([one.ctypes.data if h else 0 for one, h in zip(data, has, strict=True)])
        columns["dtype"].append(dtypes)
        columns["weight"].append(
            draw(st.lists(st.sampled_from([1.0, 0.25, -0.5, 1 / 3]), min_size=num_sources, max_size=num_sources))
        )
        columns["divisor"].append(draw(st.sampled_from([[1.0, 0.0], [3.0, 0.0], [0.7, 1e-18]])))
        lengths.append(n)
        kinds.append(target)
        exact.append(draw(st.booleans()))
    parts = MixParts(
        source=np.array(columns["source"], np.uint64).reshape(num_parts, num_sources),
        dtype=np.array(columns["dtype"], np.int32).reshape(num_parts, num_sources),
        weight=np.array(columns["weight"], np.float64).reshape(num_parts, num_sources),
        length=np.array(lengths, np.int64),
        divisor=np.array(columns["divisor"], np.float64),
        sum=np.zeros(num_parts, np.uint64),
        target=np.array([one.ctypes.data for one in targets], np.uint64),
        target_dtype=np.array(kinds, np.int32),
        exact=np.array(exact, np.uint8),
    )
    return parts, [*targets, *kept], draw(st.booleans())


def outcome(
    parts: MixParts, memory: list[NDArray[np.uint8]], loops: str, threads: int
) -> tuple[list[bytes], list[bool]]:
    targets = memory[: len(parts.length)]
    for one in targets:
        one[:] = 0xAA
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.LOOPS_VARIABLE, loops)
        bad = merge.mix(parts, threads=threads)
    return [one.tobytes() for one in targets], bad.tolist()


@given(mixes(), st.integers(1, 3))
def test_mix_equals_the_reference_byte_by_byte(
    drawn: tuple[MixParts, list[NDArray[np.uint8]], bool], threads: int
) -> None:
    parts, memory, _ = drawn
    expected = outcome(parts, memory, "reference", 1)
    assert [outcome(parts, memory, loops, threads) for loops in LOOPS] == [expected] * len(LOOPS)


@given(mixes())
def test_sums_in_rounds_equal_a_sum_at_once(drawn: tuple[MixParts, list[NDArray[np.uint8]], bool]) -> None:
    """Sources that come one after the other, with the sums kept in between, give the bits of all sources at once."""
    parts, memory, _ = drawn
    expected = outcome(parts, memory, LOOPS[-1], 1)
    sums = [np.zeros(2 * n, np.float64) for n in parts.length.tolist()]
    kept = np.array([one.ctypes.data for one in sums], np.uint64)
    everything = {**vars(parts), "sum": kept}
    for s in range(parts.num_sources):
        for k in range(len(parts.length)):  # parts begin with different sources
            if not parts.source[k, s]:
                continue
            one = {name: column[k : k + 1] for name, column in everything.items()}
            one |= {name: one[name][:, s : s + 1] for name in ("source", "dtype", "weight")}
            last = not parts.source[k, s + 1 :].any()
            one["target"] = one["target"] if last else np.zeros(1, np.uint64)
            merge.mix(MixParts(**one), go_on=bool(parts.source[k, :s].any()))
    assert [memory[k].tobytes() for k in range(len(parts.length))] == expected[0]


def test_part_without_a_share_is_refused() -> None:
    target = np.zeros(4, np.uint8)
    parts = MixParts(
        source=np.zeros((1, 2), np.uint64),
        dtype=np.zeros((1, 2), np.int32),
        weight=np.ones((1, 2)),
        length=np.ones(1, np.int64),
        divisor=np.array([[1.0, 0.0]]),
        sum=np.zeros(1, np.uint64),
        target=np.array([target.ctypes.data], np.uint64),
        target_dtype=np.array([FloatDtype.float32], np.int32),
        exact=np.zeros(1, np.uint8),
    )
    with pytest.raises(InvalidInputError, match="part 0"):
        merge.mix(parts)


def test_minus_zero_stays_and_infinity_is_told(loops: str) -> None:
    minus = np.array([-0.0, -0.0, np.inf], np.float32)
    data = Elements(data=minus.view(np.uint8), dtype="float32")
    out = np.zeros(12, np.uint8)
    assert not merge.combine([data, data], [0.5, 0.5], out, "float32")
    assert out.tobytes() == minus.tobytes()
    assert merge.all_finite(Elements(data=minus[:2].view(np.uint8), dtype="float32")) and not merge.all_finite(data)


def test_overflow_of_a_narrower_dtype_is_told(loops: str) -> None:
    big = Elements(data=np.array([70000.0], np.float32).view(np.uint8), dtype="float32")
    out = np.zeros(2, np.uint8)
    assert not merge.combine([big], [1.0], out, "float16")
    assert merge.combine([big], [1.0], out, "bfloat16")


def test_denormal_numbers_count_even_where_the_program_flushes_them(loops: str) -> None:
    tiny = np.full(100_000, 1e-45, np.float32)
    out = np.zeros(tiny.nbytes, np.uint8)
    torch.set_flush_denormal(True)
    try:
        merge.combine([Elements(data=tiny.view(np.uint8), dtype="float32")], [1.0], out, "float32", threads=2)
    finally:
        torch.set_flush_denormal(False)
    assert out.tobytes() == tiny.tobytes()


@given(
    st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=1, max_size=12),
    st.sampled_from([1.0, 3.0, 7.0]),
    st.sampled_from(LOOPS),
)
def test_sums_of_64_bit_sources_are_rounded_as_if_exact(values: list[float], divisor: float, loops: str) -> None:
    sources = [np.array([value]) for value in values]
    out = np.zeros(1)
    parts = MixParts(
        source=np.array([[one.ctypes.data for one in sources]], np.uint64),
        dtype=np.full((1, len(values)), FloatDtype.float64, np.int32),
        weight=np.ones((1, len(values))),
        length=np.ones(1, np.int64),
        divisor=np.array([[divisor, 0.0]]),
        sum=np.zeros(1, np.uint64),
        target=np.array([out.ctypes.data], np.uint64),
        target_dtype=np.array([FloatDtype.float64], np.int32),
        exact=np.ones(1, np.uint8),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.LOOPS_VARIABLE, loops)
        merge.mix(parts)
    exact = sum(map(Fraction, values)) / Fraction(divisor)
    # What the compensation term itself loses is of the order of the sum of magnitudes times the square of the precision.
    slack = Fraction(sum(map(abs, values))) * Fraction(2) ** -98
    assert abs(Fraction(float(out[0])) - exact) <= abs(exact) * Fraction(2) ** -53 + slack


@st.composite
def tiles(draw: st.DrawFn, with_base: bool | None = None) -> Tile:
    n = draw(st.sampled_from(LENGTHS))
    rng = np.random.default_rng(draw(st.integers(0, 999)))

    def elements(dtype: FloatDtype) -> Elements:
        data = np.ascontiguousarray(merge_reference.narrow(np.round(rng.standard_normal(n), 1), dtype))
        return Elements(data=data, dtype=dtype.name)

    sources = [elements(FloatDtype[draw(st.sampled_from(DTYPES))]) for _ in range(draw(st.integers(1, 4)))]
    base = draw(st.booleans()) if with_base is None else with_base
    return Tile(sources=sources, base=elements(FloatDtype[draw(st.sampled_from(DTYPES))]) if base else None)


def with_loops(loops: str, call: object) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.LOOPS_VARIABLE, loops)
        return call()  # type: ignore[operator]


@given(tiles(), st.sampled_from([(15, 16), (0, 15), (20, 8)]), st.sampled_from([-1, 0x7E00, 0x7F]), st.integers(1, 3))
def test_histograms_equal_the_reference(tile: Tile, bits: tuple[int, int], prefix: int, threads: int) -> None:
    def counted() -> list[int]:
        bins = np.ones((len(tile.sources), 1 << bits[1]), np.uint64)
        merge.histogram(tile, bins, shift=bits[0], bits=bits[1], prefix=[prefix] * len(tile.sources), threads=threads)
        return bins.reshape(-1).tolist()

    expected = with_loops("reference", counted)
    assert [with_loops(loops, counted) for loops in LOOPS] == [expected] * len(LOOPS)


@given(tiles(), st.integers(1, 3))
def test_sums_equal_the_reference_bit_by_bit(tile: Tile, threads: int) -> None:
    def sums() -> bytes:
        return merge.gram(tile, threads=threads).tobytes() + merge.moments(tile, threads=threads).tobytes()

    expected = with_loops("reference", sums)
    assert [with_loops(loops, sums) for loops in LOOPS] == [expected] * len(LOOPS)


def test_total_is_near_the_exact_sum() -> None:
    values = np.random.default_rng(5).standard_normal(100_003)
    assert merge.total(values) == pytest.approx(math.fsum(values.tolist()), abs=1e-9)


@given(
    tiles(with_base=True),
    st.sampled_from(list(TiesMode)),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_ties_equals_the_reference_byte_by_byte(tile: Tile, mode: TiesMode, zero: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = len(tile.sources)
    rule = TiesRule(
        threshold=rng.choice([0, 0x3E000000, 0x3F800000], num).astype(np.uint32),
        weight=rng.choice([1.0, 0.3, 2.0], num),
        scale=float(rng.choice([1.0, 0.7])),
        mode=mode,
        zero_sign=zero,
    )

    def merged() -> tuple[bytes, bool, int]:
        out = np.zeros(len(tile) * FloatDtype[dtype].itemsize, np.uint8)
        good = merge.ties(tile, rule, out, dtype)
        return out.tobytes(), good, merge.ties_signs(tile, rule)

    expected = with_loops("reference", merged)
    assert [with_loops(loops, merged) for loops in LOOPS] == [expected] * len(LOOPS)


def test_philox_gives_its_published_answers() -> None:
    """Random123's known answers for Philox 4x32-10 with counter and key of zeros."""
    words = [int(value * 2**32) for value in merge.uniform(0, 0, 4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_random_numbers_belong_to_elements_not_to_calls(key: int, first: int, one: int, other: int) -> None:
    whole = merge.uniform(key, first, one + other)
    parts = np.concatenate([merge.uniform(key, first, one), merge.uniform(key, first + one, other)])
    expected = with_loops("reference", lambda: merge.uniform(key, first, one + other).tobytes())
    assert whole.tobytes() == parts.tobytes() == expected
    assert ((whole >= 0) & (whole < 1)).all()


def test_demanded_loops_that_are_not_here_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.LOOPS_VARIABLE, "avx9")
    with pytest.raises(InvalidInputError, match="reference, portable, avx2, avx512"):
        merge.uniform(0, 0, 1)
