"""Keep the bytes written per second below a limit: a token bucket.

In: byte counts and the time, passed in. Out: how long to wait. Pure: never sleeps and never reads a clock.
"""

from __future__ import annotations

from ckpt.errors import InvalidInputError


class TokenBucket:
    """Tokens, one a byte, that come at a steady rate up to a limit. One thread at a time.

    A chunk is taken whole, on credit when there are too few tokens, and the caller then waits until the debt is paid: so
    a chunk may be larger than the bucket, and the long-run rate is exact whatever the sizes. In any stretch of t seconds at
    most `rate * t + burst` bytes pass, plus the one chunk that was taken on credit.
    """

    def __init__(self, *, bytes_per_s: int, burst_bytes: int, now_s: float) -> None:
        """A full bucket.

        Args:
            bytes_per_s: rate; 0 is no limit.
            burst_bytes: what may pass at once after a pause.
            now_s: any steady clock, the same one as for `take`.
        """
        if bytes_per_s < 0 or burst_bytes < 0:
            raise InvalidInputError(
                f"a rate and a burst must not be negative, found {bytes_per_s} bytes/s and {burst_bytes} bytes"
            )
        self._rate = bytes_per_s
        self._burst = burst_bytes
        self._tokens = float(burst_bytes)
        self._seen_s = now_s

    def take(self, nbytes: int, *, now_s: float) -> float:
        """Take `nbytes` tokens; returns the seconds to wait before these bytes are written, 0 when there are enough."""
        if not self._rate:
            return 0.0
        elapsed_s = max(0.0, now_s - self._seen_s)  # a clock that steps back brings no tokens and takes none
        self._tokens = min(float(self._burst), self._tokens + elapsed_s * self._rate) - nbytes
        self._seen_s = max(self._seen_s, now_s)
        return max(0.0, -self._tokens / self._rate)
