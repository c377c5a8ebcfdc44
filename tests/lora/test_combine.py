"""Factors of one module are merged as the definitions say. Method: products made in full with NumPy, small enough to look at."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.lora import combine
from ckpt.lora.combine import Low, Part

ROWS, COLUMNS = 24, 18


def part(seed: int, rank: int, *, scaling: float = 2.0, weight: float = 0.5) -> Part:
    rng = np.random.default_rng(seed)
    return Part(
        a=rng.standard_normal((rank, COLUMNS)), b=rng.standard_normal((ROWS, rank)), scaling=scaling, weight=weight
    )


def product(parts: list[Part]) -> NDArray[np.float64]:
    total = np.zeros((ROWS, COLUMNS))
    for one in parts:
        total += one.weight * one.scaling * (one.b @ one.a)
    return total


def of(low: Low) -> NDArray[np.float64]:
    return low.scaling * (low.b @ low.a)


PARTS = {
    "equal shares": [part(1, 4), part(2, 4)],
    "other ranks, scalings and signs": [part(1, 3, weight=0.7), part(2, 5, scaling=0.5, weight=-1.0), part(3, 1)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_concat_is_the_sum_of_the_products(parts: list[Part]) -> None:
    low = combine.concat(parts)
    np.testing.assert_allclose(of(low), product(parts), rtol=1e-12, atol=1e-12)
    assert low.rank == sum(one.rank for one in parts) and combine.relative_error(parts, low) < 1e-14


def test_concat_of_equal_shares_keeps_the_factors_to_the_bit() -> None:
    parts = PARTS["equal shares"]
    low = combine.concat(parts)
    assert low.scaling == 1.0 and (low.a[4:] == parts[1].a).all() and (low.b[:, :4] == parts[0].b).all()


@pytest.mark.parametrize("rank", [1, 3, 8, 100])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_svd_is_the_best_of_its_rank_and_says_how_far_off(parts: list[Part], rank: int) -> None:
    whole = product(parts)
    u, s, vt = np.linalg.svd(whole)
    kept = min(rank, ROWS, COLUMNS)
    best = (u[:, :kept] * s[:kept]) @ vt[:kept]
    low = combine.svd(parts, rank)
    np.testing.assert_allclose(of(low), best, atol=1e-10)
    off = math.sqrt((s[kept:] ** 2).sum()) / np.linalg.norm(s)
    np.testing.assert_allclose(combine.relative_error(parts, low), off, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(low.a, axis=1), np.linalg.norm(low.b, axis=0), atol=1e-10)


def test_factors_that_are_shared_may_be_averaged() -> None:
    one, two = part(1, 4, weight=0.25), part(2, 4, weight=0.75)
    same_a = [one, Part(a=one.a, b=two.b, scaling=2.0, weight=0.75)]
    same_b = [one, Part(a=two.a, b=one.b, scaling=0.5, weight=0.75)]
    for parts, side in ((same_a, "A"), (same_b, "B")):
        assert combine.shared_side(parts) == side
        np.testing.assert_allclose(of(combine.factors(parts)), product(parts), rtol=1e-12, atol=1e-12)
    assert combine.shared_side([one, two]) is None
    assert combine.relative_error([one, two], combine.means_of_both([one, two])) > 0.1


def lego_reference(parts: list[Part], members: NDArray[np.int64], num: int) -> NDArray[np.float64]:
    """The result for given clusters, unit by unit."""
    units = [
        (math.sqrt(p.scaling) * np.concatenate([p.a[j], p.b[:, j]]), p.weight) for p in parts for j in range(p.rank)
    ]
    out = np.zeros((ROWS, COLUMNS))
    for cluster in range(num):
        mine = [(unit, weight) for (unit, weight), of_it in zip(units, members, strict=True) if of_it == cluster]
        weight = sum(w for _, w in mine)
        centroid = sum(w * unit for unit, w in mine) / weight
        norm = sum(w * np.linalg.norm(unit) for unit, w in mine) / weight
        centroid = centroid / np.linalg.norm(centroid) * norm
        out += np.outer(centroid[COLUMNS:], centroid[:COLUMNS])
    mean_rank = sum(p.weight * p.rank for p in parts) / sum(p.weight for p in parts)
    return sum(p.weight for p in parts) * math.sqrt(mean_rank / num) * out


def test_lego_finds_the_clusters_that_are_there() -> None:
    base = part(1, 6, scaling=1.0)
    rng = np.random.default_rng(5)
    parts = []
    for weight in (0.25, 0.75):
        order = rng.permutation(6)
        noise = 0.01 * rng.standard_normal((6, COLUMNS))
        parts.append(Part(a=base.a[order] + noise, b=base.b[:, order], scaling=1.0, weight=weight))
    orders = [np.array([int(np.abs(base.a - row).sum(1).argmin()) for row in p.a]) for p in parts]
    low = combine.lego(parts, 6, seed=0, name="m")
    np.testing.assert_allclose(of(low), lego_reference(parts, np.concatenate(orders), 6), rtol=1e-9, atol=1e-9)
    assert combine.relative_error(parts, low) < 0.01


def test_lego_with_a_cluster_for_each_unit_keeps_them_all() -> None:
    parts = [part(1, 3, weight=1.0), part(2, 3, weight=1.0)]
    low = combine.lego(parts, 6, seed=3, name="m")
    expected = lego_reference(parts, np.arange(6), 6)
    np.testing.assert_allclose(of(low), expected, rtol=1e-9, atol=1e-9)


def test_lego_is_the_same_for_a_seed_and_takes_no_negative_weights() -> None:
    parts = PARTS["equal shares"]
    first, again = (combine.lego(parts, 3, seed=1, name="m") for _ in range(2))
    assert (first.a == again.a).all() and (first.b == again.b).all()
    with pytest.raises(InvalidInputError, match="negative"):
        combine.lego(PARTS["other ranks, scalings and signs"], 3, seed=1, name="m")


def test_lego_of_equal_units_is_not_lost() -> None:
    one = part(1, 2, scaling=1.0)
    low = combine.lego([one, one], 4, seed=0, name="m")  # four units, two of them different
    assert np.isfinite(low.a).all() and np.linalg.norm(of(low)) > 0
