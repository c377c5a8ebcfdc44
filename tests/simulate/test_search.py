"""Goal: the search finds the best policy that meets a demand. Method: against closed forms, and against trying every code."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ckpt.errors import InvalidInputError
from ckpt.simulate import closed
from ckpt.simulate.cluster import DAY_S, Cluster, Policy, Tiers, costs_of
from ckpt.simulate.run import simulate
from ckpt.simulate.search import Demand, best_policy, codes, model_of, start_of

HOSTILE = Cluster(
    num_nodes=48, node_mtbf_s=20 * DAY_S, trainer_mtbf_s=40 * DAY_S, nodes_per_domain=4, domain_mtbf_s=90 * DAY_S
)
ALONE = Demand(memory_every_s=math.inf)


def test_best_interval_of_a_single_tier_is_dalys() -> None:
    cluster = Cluster(
        num_nodes=100,
        ranks_per_node=1,
        node_mtbf_s=1e6,
        trainer_mtbf_s=math.inf,
        domain_mtbf_s=math.inf,
        site_mtbf_s=math.inf,
    )
    tiers = Tiers(image_bytes=1, store_node_bytes_per_s=1e9, store_bytes_per_s=1e9, store_stall_s=30, slowdown=0)
    found = best_policy(cluster, tiers, ALONE, duration_s=100 * DAY_S, num_runs=10).store_every_s
    daly_s = closed.daly_s(30, 1e4)

    def wall(interval_s: float) -> float:
        return closed.wall_per_work(interval_s, 30, 1e4, restart_s=190)

    assert start_of(cluster, tiers, ALONE, 1, 0).store_every_s == pytest.approx(daly_s, rel=0.002)
    assert found == pytest.approx(daly_s, rel=0.42)  # the optimum is flat: a step aside costs next to nothing
    assert wall(found) < wall(daly_s) * 1.01


def test_search_finds_the_interval_when_it_starts_from_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With starting intervals twice too long, the simulation pulls them back."""
    right = best_policy(HOSTILE, Tiers(), ALONE, duration_s=30 * DAY_S).store_every_s
    real = closed.best_interval_s
    monkeypatch.setattr(closed, "best_interval_s", lambda cost_s, mtbf_s: 2 * real(cost_s, mtbf_s))

    assert best_policy(HOSTILE, Tiers(), ALONE, duration_s=30 * DAY_S).store_every_s < 1.5 * right


def test_no_other_code_is_better_by_more_than_one_notices() -> None:
    demand = Demand()
    best = best_policy(HOSTILE, Tiers(), demand, duration_s=20 * DAY_S)

    def goodput(policy: Policy) -> float:
        return simulate(HOSTILE, Tiers(), policy, duration_s=20 * DAY_S, num_runs=10).goodput.value

    others = [start_of(HOSTILE, Tiers(), demand, size, parity) for size, parity in codes(HOSTILE, demand)]

    assert len(others) > 25
    assert goodput(best) > max(map(goodput, others)) - 0.003
    assert goodput(best) > goodput(best_policy(HOSTILE, Tiers(), ALONE, duration_s=20 * DAY_S)) + 0.002


def test_model_is_near_the_simulation() -> None:
    for policy in (
        Policy(memory_every_s=60, store_every_s=7200, group_size=8, parity=2),
        Policy(memory_every_s=300, store_every_s=3600, group_size=4, parity=1),
        Policy(memory_every_s=math.inf, store_every_s=1200),
    ):
        found = simulate(HOSTILE, Tiers(), policy, num_runs=20).goodput
        assert model_of(HOSTILE, Tiers(), policy).goodput == pytest.approx(found.value, abs=0.01)


def test_fixed_parts_stay_as_demanded() -> None:
    demand = Demand(group_size=6, parity=2, memory_every_s=45, store_every_s=4000)

    assert best_policy(HOSTILE, Tiers(), demand, duration_s=DAY_S) == Policy(
        memory_every_s=45, store_every_s=4000, group_size=6, parity=2
    )


def test_memory_and_the_longest_interval_are_limits() -> None:
    tiers = Tiers()
    demand = Demand(memory_bytes_per_rank_max=2.3 * tiers.image_bytes, store_every_max_s=1800)
    policy = best_policy(HOSTILE, tiers, demand, duration_s=5 * DAY_S)

    assert costs_of(HOSTILE, tiers, policy).memory_bytes_per_rank <= 2.3 * tiers.image_bytes
    assert policy.store_every_s <= 1800
    with pytest.raises(InvalidInputError, match="no code fits") as error:
        best_policy(HOSTILE, tiers, dataclasses.replace(demand, memory_bytes_per_rank_max=tiers.image_bytes))
    assert error.value.kind == "no-policy"


def test_domains_beyond_parity_are_seen_by_the_model() -> None:
    """Three domains: a group of 8 has three nodes in one, so parity 2 does not outlive the domain, and parity 3 does."""
    cluster = Cluster(
        num_nodes=24, nodes_per_domain=8, node_mtbf_s=math.inf, trainer_mtbf_s=math.inf, site_mtbf_s=math.inf
    )
    for parity, survives in ((2, False), (3, True)):
        policy = Policy(memory_every_s=60, store_every_s=3600, group_size=8, parity=parity)
        rate = cluster.rates_per_s["domain"]
        assert model_of(cluster, Tiers(), policy).store_rate_per_s == pytest.approx(0 if survives else rate)
        found = simulate(dataclasses.replace(cluster, domain_mtbf_s=10 * DAY_S), Tiers(), policy, num_runs=5)
        assert (found.recoveries["peers"] > 0, found.recoveries["store"] == 0) == (survives, survives)


def test_codes_that_do_not_fit_the_cluster_are_not_tried() -> None:
    small = Cluster(num_nodes=3)

    assert set(codes(small, Demand())) == {(1, 0), (2, 1), (3, 1), (3, 2)}
    assert list(codes(small, ALONE)) == [(1, 0)]
    assert list(codes(small, Demand(parity=2))) == [(3, 2)]
    assert list(codes(small, Demand(parity=0)))[0] == (1, 0)
    with pytest.raises(InvalidInputError, match="needs as many"):
        best_policy(small, Tiers(), Demand(group_size=4, parity=1))
    with pytest.raises(InvalidInputError, match="from 0 to one less"):
        best_policy(small, Tiers(), Demand(group_size=3, parity=3))
