"""Closed forms: the best interval between checkpoints, the chance that an erasure-coded group outlives its losses, intervals of
confidence.

In: numbers. Out: numbers. Pure. What the simulation is checked against, and where its search starts.

- Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
- Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
- Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
- Hill, "Algorithm 396: Student's t-quantiles", CACM 13(10), 1970 (its expansion, which Fisher gave first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean or a share, with the ends of its interval of confidence."""

    value: float
    low: float
    high: float


# The interval between checkpoints. Cost: what one takes from training. MTBF: mean time between failures of the whole job.


def young_s(cost_s: float, mtbf_s: float) -> float:
    """Young's interval of work between checkpoints, good while the cost is far below the MTBF."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's higher-order interval."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def wall_per_work(interval_s: float, cost_s: float, mtbf_s: float, *, restart_s: float) -> float:
    """Seconds on the wall per second of work: Daly's complete model, exact for Poisson failures that also hit restarts."""
    return mtbf_s / interval_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + cost_s) / mtbf_s)


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """The interval that makes `wall_per_work` smallest. Zero for a free checkpoint, endless where nothing fails."""
    if cost_s <= 0 or math.isinf(mtbf_s):
        return 0.0 if cost_s <= 0 else math.inf
    low, high = 0.0, 1.0  # in MTBFs: the root of (1 - x) exp(x + cost / MTBF) = 1, where the derivative vanishes
    for _ in range(100):
        middle = (low + high) / 2
        if middle < 1 and math.log1p(-middle) + middle + cost_s / mtbf_s > 0:
            low = middle
        else:
            high = middle
    return low * mtbf_s


# The memory tier. Groups of `size` nodes, of which any `parity` may be lost.


def tail(p: float, size: int, above: int) -> float:
    """The chance that more than `above` of `size` independent events of chance `p` happen."""
    terms = [math.comb(size, i) * p**i * (1 - p) ** (size - i) for i in range(above + 1, size + 1)]
    return min(1.0, math.fsum(terms))


def loss(p: float, *, num_groups: int, size: int, parity: int) -> float:
    """The chance that some group loses more than `parity` nodes when each node is lost with chance `p`, independently."""
    of_one = tail(p, size, parity)
    return 1.0 if of_one >= 1 else -math.expm1(num_groups * math.log1p(-of_one))


def loss_of_exactly(num_lost: int, *, num_groups: int, size: int, parity: int) -> float:
    """The chance that some group loses more than `parity` nodes when `num_lost` of all nodes are, every choice alike.

    1 - [x^f] (sum of C(n, i) x^i for i up to m)^G / C(N, f), in whole numbers until the last division.
    """
    power = [math.comb(size, i) for i in range(min(parity, size) + 1)]
    product, exponent = [1], num_groups
    while exponent:
        if exponent & 1:
            product = _multiplied(product, power, num_lost)
        power = _multiplied(power, power, num_lost)
        exponent >>= 1
    all_choices = math.comb(num_groups * size, num_lost)
    good = product[num_lost] if num_lost < len(product) else 0
    return (all_choices - good) / all_choices


def _multiplied(a: Sequence[int], b: Sequence[int], degree_max: int) -> list[int]:
    out = [0] * min(len(a) + len(b) - 1, degree_max + 1)
    for i, x in enumerate(a[: len(out)]):
        for j, y in enumerate(b[: len(out) - i]):
            out[i + j] += x * y
    return out


def loss_after(num_lost: int, window_s: float, node_mtbf_s: float, *, size: int, parity: int) -> float:
    """The chance that a group which has just lost `num_lost` nodes at once goes on to lose more than `parity`.

    It does when each further loss falls within the window after the one before, in which lost shares are not yet rebuilt: a
    loss during a recovery begins it anew. For short windows this gives the usual mean time to data
    loss, (MTBF / W)^m MTBF / (n (n - 1) ... (n - m)).
    """
    chance = 1.0
    for i in range(num_lost, parity + 1):
        chance *= -math.expm1(-(size - i) * window_s / node_mtbf_s)
    return chance


# Intervals of confidence.


def mean_of(samples: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """The mean of independent shares (two at least) with Student's interval, as far as it lies between 0 and 1."""
    mean = fmean(samples)
    half = student(confidence, len(samples) - 1) * stdev(samples) / math.sqrt(len(samples))
    return Estimate(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))


def share_of(num_hits: int, num_tries: int, *, confidence: float = 0.95) -> Estimate:
    """A share with Wilson's interval; without a try, nothing is known: 0 to 1."""
    if num_tries == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0)
    z, p, n = NormalDist().inv_cdf((1 + confidence) / 2), num_hits / num_tries, num_tries
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(value=p, low=max(0.0, middle - half) if num_hits else 0.0, high=min(1.0, middle + half))


def student(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t; exact for 1 and 2 degrees, within 0.5 % from 3 on."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if degrees == 1:
        return math.tan(math.pi * confidence / 2)
    if degrees == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**i for i, term in enumerate(terms))
