"""Goal: records refuse nonsense, costs add up, groups lie across domains. Method: by hand, and over all small clusters."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations, islice
from typing import Any

import pytest

from ckpt.errors import InvalidInputError
from ckpt.simulate import closed
from ckpt.simulate.cluster import Cluster, Groups, Policy, Tiers, costs_of
from ckpt.simulate.failures import failures


def test_costs_of_a_policy_by_hand() -> None:
    cluster = Cluster(num_nodes=12, ranks_per_node=2)
    tiers = Tiers(
        image_bytes=40, memory_bytes_per_s=10, network_bytes_per_s=8, code_bytes_per_s=20, store_node_bytes_per_s=4,
        store_bytes_per_s=24, memory_stall_s=1, store_stall_s=3, slowdown=0.1,
    )  # fmt: skip
    c = costs_of(cluster, tiers, Policy(memory_every_s=100, store_every_s=60, group_size=6, parity=2))

    assert (c.copied_s, c.protected_s) == (4, 4 + 2 * 80 / 8)
    assert (c.durable_s, c.load_s) == (3 + 80 * 12 / 24, 40)  # the store is slower than its clients
    assert (c.memory_cost_s, c.store_cost_s) == pytest.approx((1 + 0.1 * 24, 3 + 0.1 * 40))
    assert (c.own_s, c.decode_s, c.rebuild_s) == (4, 4 * 80 / 8, 2 * 80 / 8)
    assert c.memory_bytes_per_rank == 2 * (40 + 40 * 2 / 4)
    assert (c.protect_bytes_per_node, c.recover_bytes_per_node, c.store_bytes) == (2 * 80, 6 * 80, 80 * 12)
    assert (c.memory_every_s, c.store_every_s) == (100, 60)


def test_snapshots_and_saves_that_are_due_while_one_is_on_its_way_are_skipped() -> None:
    cluster = Cluster(num_nodes=4, ranks_per_node=1)
    tiers = Tiers(
        image_bytes=10, memory_bytes_per_s=1, store_node_bytes_per_s=0.1, memory_stall_s=0, store_stall_s=0, slowdown=0
    )
    c = costs_of(cluster, tiers, Policy(memory_every_s=4, store_every_s=100))

    assert (c.memory_every_s, c.store_every_s) == (12, 100)


@pytest.mark.parametrize("nodes_per_domain", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("num_nodes", range(1, 25))
def test_groups_differ_by_one_and_lie_across_domains(num_nodes: int, nodes_per_domain: int) -> None:
    cluster = Cluster(num_nodes=num_nodes, nodes_per_domain=nodes_per_domain)
    for size in range(1, num_nodes + 1):
        groups = Groups(cluster=cluster, group_size=size, parity=0)
        members = Counter(groups.group_of(node) for node in range(num_nodes))
        assert set(members) == set(range(num_nodes // size))
        assert max(members.values()) - min(members.values()) <= 1 and min(members.values()) >= size
        fewest = max(-(-count // cluster.num_domains) for count in members.values())
        if num_nodes % nodes_per_domain == 0:  # else the last domain has too few to share evenly
            assert groups.most_in_one_domain <= fewest + (1 if fewest > 1 or num_nodes % size else 0)
            if num_nodes % size == 0 and size <= cluster.num_domains:
                assert groups.most_in_one_domain == 1


@pytest.mark.parametrize(("num_nodes", "size"), [(12, 3), (12, 4), (12, 6), (10, 5), (9, 3)])
def test_survival_over_every_choice_of_lost_nodes_is_the_closed_form(num_nodes: int, size: int) -> None:
    cluster = Cluster(num_nodes=num_nodes, nodes_per_domain=2)
    for parity in range(size):
        groups = Groups(cluster=cluster, group_size=size, parity=parity)
        for num_lost in range(num_nodes + 1):
            choices = list(combinations(range(num_nodes), num_lost))
            dead = sum(not groups.survive(lost) for lost in choices)
            known = closed.loss_of_exactly(num_lost, num_groups=num_nodes // size, size=size, parity=parity)
            assert dead / len(choices) == known


@pytest.mark.parametrize(("code", "num_lost"), [((2, 1), 10), ((10, 2), 20), ((6, 2), 30)])
def test_survival_over_random_choices_of_1020_nodes_is_the_closed_form(code: tuple[int, int], num_lost: int) -> None:
    size, parity = code
    groups = Groups(cluster=Cluster(num_nodes=1020), group_size=size, parity=parity)
    draw = random.Random(5)
    dead = sum(not groups.survive(draw.sample(range(1020), num_lost)) for _ in range(4000))
    known = closed.loss_of_exactly(num_lost, num_groups=1020 // size, size=size, parity=parity)
    found = closed.share_of(dead, 4000, confidence=0.999)

    assert found.low <= known <= found.high


def test_failures_come_at_their_rates_and_fall_everywhere() -> None:
    cluster = Cluster(
        num_nodes=10, node_mtbf_s=100, trainer_mtbf_s=50, nodes_per_domain=4, domain_mtbf_s=300, site_mtbf_s=100
    )
    found = list(islice(failures(cluster, 3), 20_000))
    kinds = Counter(f.kind for f in found)
    rates = {"trainer": 0.2, "node": 0.1, "domain": 0.01, "site": 0.01}

    assert cluster.rates_per_s == pytest.approx(rates)
    assert found[-1].at_s / len(found) == pytest.approx(1 / 0.32, rel=0.03)
    assert {k: kinds[k] / len(found) for k in rates} == pytest.approx({k: r / 0.32 for k, r in rates.items()}, rel=0.1)
    assert {f.index for f in found if f.kind == "node"} == set(range(10))
    assert {f.index for f in found if f.kind == "domain"} == {0, 1, 2}
    assert [f.at_s for f in found] == sorted(f.at_s for f in found)
    assert [f.at_s for f in islice(failures(cluster, 3), 9)] == [f.at_s for f in found[:9]]


def test_nothing_fails_where_nothing_can() -> None:
    safe = dict.fromkeys(("node_mtbf_s", "trainer_mtbf_s", "domain_mtbf_s", "site_mtbf_s"), math.inf)

    assert list(failures(Cluster(**safe), 0)) == []
    assert Cluster(**safe).mtbf_s == math.inf


@pytest.mark.parametrize(
    ("record", "fields", "words"),
    [
        (Cluster, {"num_nodes": 0}, "`num_nodes` must be from 1 to 1,000,000, found 0"),
        (Cluster, {"num_nodes": 1_000_001}, "`num_nodes` must be from 1 to 1,000,000"),
        (Cluster, {"node_mtbf_s": 0}, "`node_mtbf_s` must be above 0, found 0"),
        (Cluster, {"site_mtbf_s": math.nan}, "`site_mtbf_s` must be above 0"),
        (Cluster, {"replace_s": -1}, "`replace_s` must be 0 or more and finite"),
        (Cluster, {"restart_s": math.inf}, "`restart_s` must be 0 or more and finite"),
        (Tiers, {"image_bytes": 0}, "`image_bytes` must be above 0 and finite"),
        (Tiers, {"store_bytes_per_s": math.inf}, "`store_bytes_per_s` must be above 0 and finite"),
        (Tiers, {"slowdown": 1}, "`slowdown` is a share below 1"),
        (Policy, {"memory_every_s": 0, "store_every_s": 1}, "`memory_every_s` must be above 0"),
        (
            Policy,
            {"memory_every_s": 1, "store_every_s": 1, "group_size": 4, "parity": 4},
            "one less than the group size 4",
        ),
        (Policy, {"memory_every_s": 1, "store_every_s": 1, "group_size": 256, "parity": 4}, "from 1 to 255"),
        (Policy, {"memory_every_s": 1, "store_every_s": 1, "parity": -1}, "found -1"),
        (Groups, {"cluster": Cluster(num_nodes=4), "group_size": 5, "parity": 1}, "needs as many; the cluster has 4"),
    ],
)
def test_nonsense_is_refused_in_words(record: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        record(**fields)
