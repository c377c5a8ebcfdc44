"""Goal: the closed forms are right. Method: against counting every case, numerical minimisation, and published values."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from ckpt.simulate import closed

H, D = 3600.0, 86400.0

# Scheme as (group size, parity), then the chance of losing the snapshot of 60 nodes when exactly 2, 3, 4 or 5 are lost, and when
# each is lost with 0.1 %, 1 % and 5 %; computed apart from this program, to two digits.
KNOWN = [
    ((2, 1), (0.017, 0.051, 0.10, 0.17), (3e-5, 3.0e-3, 0.072)),
    ((3, 2), (0, 0.00058, 0.0023, 0.0058), (2e-8, 2.0e-5, 0.0025)),
    ((5, 1), (0.068, 0.20, 0.37, 0.55), (1.2e-4, 0.012, 0.24)),
    ((10, 1), (0.15, 0.42, 0.69, 0.89), (2.7e-4, 0.025, 0.42)),
    ((6, 2), (0, 0.0058, 0.023, 0.054), (2e-7, 2.0e-4, 0.022)),
    ((10, 2), (0, 0.021, 0.076, 0.17), (7e-7, 6.8e-4, 0.067)),
    ((12, 4), (0, 0, 0, 0.00073), (4e-12, 3.7e-7, 0.00092)),
]


@pytest.mark.parametrize(("code", "of_exactly", "of_chance"), KNOWN)
def test_losses_of_60_nodes_are_the_known_ones(
    code: tuple[int, int], of_exactly: tuple[float, ...], of_chance: tuple[float, ...]
) -> None:
    size, parity = code
    groups = 60 // size
    exactly = [closed.loss_of_exactly(f, num_groups=groups, size=size, parity=parity) for f in (2, 3, 4, 5)]
    chance = [closed.loss(p, num_groups=groups, size=size, parity=parity) for p in (0.001, 0.01, 0.05)]

    assert exactly == pytest.approx(of_exactly, rel=0.07)
    assert chance == pytest.approx(of_chance, rel=0.26)  # 2e-8 and the like are given to one digit


@pytest.mark.parametrize(
    ("code", "num_lost", "known"),
    [((2, 1), 3, 0.0029), ((2, 1), 10, 0.044), ((6, 2), 3, 1.9e-5), ((6, 2), 10, 0.0023), ((10, 2), 3, 6.9e-5)]
    + [((10, 2), 10, 0.0080), ((12, 4), 3, 0), ((12, 4), 10, 1.8e-6)],
)
def test_losses_of_1020_nodes_are_the_known_ones(code: tuple[int, int], num_lost: int, known: float) -> None:
    size, parity = code
    found = closed.loss_of_exactly(num_lost, num_groups=1020 // size, size=size, parity=parity)

    assert found == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize(("num_groups", "size"), [(1, 5), (2, 4), (3, 3), (4, 3), (5, 2), (6, 1)])
def test_loss_of_exactly_f_is_what_counting_every_choice_gives(num_groups: int, size: int) -> None:
    nodes = range(num_groups * size)
    for parity in range(size):
        for num_lost in range(len(nodes) + 1):
            choices = list(combinations(nodes, num_lost))
            bad = sum(any(sum(n // size == g for n in lost) > parity for g in range(num_groups)) for lost in choices)
            found = closed.loss_of_exactly(num_lost, num_groups=num_groups, size=size, parity=parity)
            assert found == bad / len(choices)


def test_loss_is_the_mean_over_the_number_of_lost_nodes() -> None:
    p, groups, size, parity = 0.13, 4, 5, 2
    nodes = groups * size
    mean = math.fsum(
        math.comb(nodes, f)
        * p**f
        * (1 - p) ** (nodes - f)
        * closed.loss_of_exactly(f, num_groups=groups, size=size, parity=parity)
        for f in range(nodes + 1)
    )

    assert closed.loss(p, num_groups=groups, size=size, parity=parity) == pytest.approx(mean, rel=1e-12)


def test_tiny_losses_are_not_rounded_to_none() -> None:
    assert closed.loss(1e-6, num_groups=100, size=12, parity=4) == pytest.approx(
        100 * math.comb(12, 5) * 1e-30, rel=1e-4
    )
    assert closed.loss(1.0, num_groups=2, size=3, parity=1) == 1.0


def test_known_intervals_for_an_mtbf_of_three_hours() -> None:
    costs = (300, 30, 1, 0.05)

    assert [round(closed.young_s(c, 3 * H)) for c in costs] == [2546, 805, 147, 33]
    assert closed.daly_s(30, 3 * H) == pytest.approx(closed.young_s(30, 3 * H) - 30 + 10, abs=0.5)
    assert closed.daly_s(30 * H, 3 * H) == 3 * H


@pytest.mark.parametrize("cost_s", [0.01, 1.0, 30.0, 300.0, 3000.0])
@pytest.mark.parametrize("mtbf_s", [600.0, 3 * H, 10 * D])
def test_best_interval_is_where_the_complete_model_is_least(cost_s: float, mtbf_s: float) -> None:
    def wall(interval_s: float) -> float:
        return closed.wall_per_work(interval_s, cost_s, mtbf_s, restart_s=60)

    best_s = closed.best_interval_s(cost_s, mtbf_s)

    assert all(wall(best_s) <= wall(best_s * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    if cost_s < mtbf_s / 30:
        assert closed.daly_s(cost_s, mtbf_s) == pytest.approx(best_s, rel=0.002)
        assert closed.young_s(cost_s, mtbf_s) == pytest.approx(best_s, rel=2 * math.sqrt(cost_s / mtbf_s))


def test_free_checkpoints_and_clusters_that_never_fail() -> None:
    assert (closed.best_interval_s(0, H), closed.best_interval_s(1, math.inf)) == (0, math.inf)
    assert closed.best_interval_s(H, 0.001) == pytest.approx(0.001)  # hopeless: as seldom as it fails


def test_a_group_goes_on_to_lose_too_many_when_each_loss_follows_in_time() -> None:
    def after(num_lost: int, parity: int) -> float:
        return closed.loss_after(num_lost, 600.0, 5 * D, size=4, parity=parity)

    follows = {others: 1 - math.exp(-others * 600.0 / (5 * D)) for others in (1, 2, 3)}

    assert [after(1, 0), after(2, 1), after(4, 3)] == [1, 1, 1]
    assert [after(1, 1), after(1, 2)] == pytest.approx([follows[3], follows[3] * follows[2]])
    assert [after(1, 3), after(2, 3)] == pytest.approx([follows[3] * follows[2] * follows[1], follows[2] * follows[1]])


def test_that_chance_gives_the_usual_mean_time_to_data_loss() -> None:
    size, parity, window_s, mtbf_s = 10, 2, 100.0, 300 * D
    mttdl_s = 1 / (size / mtbf_s * closed.loss_after(1, window_s, mtbf_s, size=size, parity=parity))

    assert mttdl_s == pytest.approx((mtbf_s / window_s) ** parity * mtbf_s / (10 * 9 * 8), rel=1e-3)


@pytest.mark.parametrize(
    ("degrees", "known"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (99, 1.984)],
)
def test_students_quantile_is_the_tabled_one(degrees: int, known: float) -> None:
    assert closed.student(0.95, degrees) == pytest.approx(known, rel=0.005)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_shares_lie_in_wilsons_interval_as_often_as_it_says(p: float) -> None:
    draw, inside = random.Random(1), 0
    for _ in range(2000):
        found = closed.share_of(sum(draw.random() < p for _ in range(200)), 200)
        inside += found.low <= p <= found.high

    assert 0.925 < inside / 2000 < 0.98


def test_shares_without_a_hit_a_miss_or_a_try() -> None:
    none, all_of_them, untried = closed.share_of(0, 100), closed.share_of(100, 100), closed.share_of(0, 0)

    assert (none.low, round(none.high, 3)) == (0, 0.037)
    assert (round(all_of_them.low, 3), all_of_them.high) == (0.963, 1)
    assert (untried.low, untried.high, math.isnan(untried.value)) == (0, 1, True)


def test_a_mean_has_students_interval_within_0_and_1() -> None:
    found = closed.mean_of([0.5, 0.6, 0.7])

    assert (found.low, found.value, found.high) == pytest.approx(
        (0.6 - 4.303 * 0.1 / 3**0.5, 0.6, 0.6 + 4.303 * 0.1 / 3**0.5), abs=1e-4
    )
    assert closed.mean_of([1.0, 0.9]).high == 1.0
