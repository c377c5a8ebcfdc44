"""A token bucket holds the long-run rate for chunks of any size, and lets a burst pass after a pause.

Method: a simulated clock that the caller's waits move on.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import InvalidInputError
from ckpt.store.rate import TokenBucket


def write_all(bucket: TokenBucket, chunks: list[tuple[float, int]], now_s: float) -> list[float]:
    """When each (pause before it, chunk) is written."""
    times = []
    for pause_s, nbytes in chunks:
        now_s += pause_s
        now_s += bucket.take(nbytes, now_s=now_s)
        times.append(now_s)
    return times


def test_chunks_larger_than_the_bucket_pass_at_the_rate() -> None:
    bucket = TokenBucket(bytes_per_s=100, burst_bytes=50, now_s=1000.0)
    assert write_all(bucket, [(0, 200)] * 4, 1000.0) == pytest.approx([1001.5, 1003.5, 1005.5, 1007.5])


def test_a_pause_fills_the_bucket_but_never_above_the_burst() -> None:
    bucket = TokenBucket(bytes_per_s=100, burst_bytes=50, now_s=0.0)
    times = write_all(bucket, [(0, 50), (60, 50), (0, 100)], 0.0)
    assert times == pytest.approx([0.0, 60.0, 61.0])


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 3.0]), st.integers(0, 500)), min_size=1, max_size=30),
    st.integers(1, 1000),
    st.integers(0, 300),
)
def test_no_stretch_of_time_sees_more_than_rate_and_burst(
    chunks: list[tuple[float, int]], rate: int, burst: int
) -> None:
    times = write_all(TokenBucket(bytes_per_s=rate, burst_bytes=burst, now_s=0.0), chunks, 0.0)
    for i in range(len(chunks)):
        for j in range(i, len(chunks)):
            passed = sum(nbytes for _, nbytes in chunks[i + 1 : j + 1])
            assert passed <= rate * (times[j] - times[i]) + burst + 1e-6


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(bytes_per_s=0, burst_bytes=0, now_s=0.0)
    assert write_all(bucket, [(0, 1 << 40)] * 3, 0.0) == [0.0, 0.0, 0.0]


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    bucket = TokenBucket(bytes_per_s=10, burst_bytes=0, now_s=100.0)
    assert bucket.take(10, now_s=50.0) == pytest.approx(1.0)
    assert bucket.take(0, now_s=101.0) == pytest.approx(0.0)


@pytest.mark.parametrize(("rate", "burst"), [(-1, 0), (0, -1)])
def test_negative_limits_are_refused(rate: int, burst: int) -> None:
    with pytest.raises(InvalidInputError, match="must not be negative"):
        TokenBucket(bytes_per_s=rate, burst_bytes=burst, now_s=0.0)
