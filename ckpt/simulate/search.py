"""The best policy for a cluster: intervals of both tiers, and the code.

In: a cluster, its tiers, a demand. Out: a policy. A first-order model ranks the codes and gives starting intervals; the
simulation, on the same failures for all, decides. Reproducible.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.errors import InvalidInputError
from ckpt.simulate import closed
from ckpt.simulate.cluster import DAY_S, Cluster, Costs, Groups, Policy, Tiers, costs_of
from ckpt.simulate.run import simulate

GROUP_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16)
PARITIES = (1, 2, 3, 4)
_SHORTLIST = 6  # codes that are simulated
_NEAR = 0.002  # of goodput: a code that is estimated this close to the best is worth a simulation
_EQUAL = 0.0005  # of goodput: nobody notices; the code that takes less memory wins
_FACTORS = (0.5, 0.71, 1.41, 2.0)  # tried around the model's intervals


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the policy must be like; None where it is free. An interval of `inf` means without that tier."""

    group_size: int | None = None
    parity: int | None = None
    memory_every_s: float | None = None
    store_every_s: float | None = None
    store_every_max_s: float = 6 * 3600.0  # somebody else may also want a step on the store
    memory_bytes_per_rank_max: float = math.inf  # of an agent


@dataclass(frozen=True, kw_only=True)
class Model:
    """First-order estimates for a policy."""

    goodput: float
    loss_at_node_loss: float  # the chance that the memory tier does not survive the loss of one node
    store_rate_per_s: float  # how often only the store helps
    memory_cost_s: float
    store_cost_s: float


def best_policy(
    cluster: Cluster,
    tiers: Tiers,
    demand: Demand,
    *,
    duration_s: float = 30 * DAY_S,
    num_runs: int = 10,
    seed: int = 0,
) -> Policy:
    """The policy with the best simulated goodput; of codes that come to the same, the one that takes the least memory.

    InvalidInputError (`no-policy`) when nothing meets the demand.
    """

    def goodput(policy: Policy) -> float:
        return simulate(cluster, tiers, policy, duration_s=duration_s, num_runs=num_runs, seed=seed).goodput.value

    started = [start_of(cluster, tiers, demand, size, parity) for size, parity in codes(cluster, demand)]
    fitting = [
        p for p in started if costs_of(cluster, tiers, p).memory_bytes_per_rank <= demand.memory_bytes_per_rank_max
    ]
    if not fitting:
        raise InvalidInputError(
            "no code fits: the demanded group size, parity and memory leave none",
            kind="no-policy",
            hints=("give the memory tier more memory, or fix fewer of its parameters",),
        )
    models = {policy: model_of(cluster, tiers, policy).goodput for policy in fitting}
    near = [policy for policy in fitting if models[policy] >= max(models.values()) - _NEAR]

    def thrift(policy: Policy) -> tuple[float, float]:
        costs = costs_of(cluster, tiers, policy)
        return costs.memory_bytes_per_rank, costs.protect_bytes_per_node

    near = sorted(near, key=lambda policy: (-models[policy], thrift(policy)))[:1] + sorted(near, key=thrift)
    measured = {policy: goodput(policy) for policy in dict.fromkeys(near[: _SHORTLIST + 1])}
    best = min((p for p in measured if measured[p] >= max(measured.values()) - _EQUAL), key=thrift)
    for name in ("memory_every_s", "store_every_s"):
        if getattr(demand, name) is None and not math.isinf(getattr(best, name)):
            tried = {policy: goodput(policy) for policy in _around(best, name, demand)}
            best = max({best: measured.get(best, -1.0), **tried}.items(), key=lambda item: item[1])[0]
            measured = {best: max([measured.get(best, -1.0), *tried.values()])}
    return best


def codes(cluster: Cluster, demand: Demand) -> Iterator[tuple[int, int]]:
    """The codes (group size, parity) that the demand allows; one that stands for none where there is no memory tier."""
    if demand.memory_every_s is not None and math.isinf(demand.memory_every_s):
        yield 1, 0
        return
    sizes = GROUP_SIZES if demand.group_size is None else (demand.group_size,)
    parities = PARITIES if demand.parity is None else (demand.parity,)
    if demand.group_size is None and not demand.parity:
        yield 1, 0
    for size in sizes:
        for parity in parities:
            asked = demand.group_size is not None and demand.parity is not None
            if asked or (parity < size <= cluster.num_nodes and (parity > 0 or demand.parity == 0)):
                yield size, parity


def start_of(cluster: Cluster, tiers: Tiers, demand: Demand, size: int, parity: int) -> Policy:
    """A policy with this code and the intervals of the model, where the demand leaves them free."""
    policy = Policy(
        memory_every_s=demand.memory_every_s if demand.memory_every_s is not None else 60.0,
        store_every_s=demand.store_every_s if demand.store_every_s is not None else 3600.0,
        group_size=size,
        parity=parity,
    )
    model, costs = model_of(cluster, tiers, policy), costs_of(cluster, tiers, policy)
    if demand.memory_every_s is None:
        every_s = max(closed.best_interval_s(model.memory_cost_s, cluster.mtbf_s), costs.protected_s, 1.0)
        policy = dataclasses.replace(policy, memory_every_s=min(every_s, demand.store_every_max_s))
    if demand.store_every_s is None:
        rate = model.store_rate_per_s if policy.has_memory else 1 / cluster.mtbf_s
        every_s = closed.best_interval_s(model.store_cost_s, 1 / rate if rate > 0 else math.inf)
        policy = dataclasses.replace(policy, store_every_s=_store_every_s(every_s, costs, demand))
    return policy


def model_of(cluster: Cluster, tiers: Tiers, policy: Policy) -> Model:
    """First-order estimates: at most one recovery at a time, half an interval lost per failure.

    A lost share is missing until the node is replaced, its images are decoded and its parity is rebuilt; another loss in that
    time is one more of its group. A domain counts as the nodes of a group that it holds.
    """
    c, rates = costs_of(cluster, tiers, policy), cluster.rates_per_s
    groups = Groups(cluster=cluster, group_size=policy.group_size, parity=policy.parity)
    window_s = cluster.detect_s + cluster.replace_s + c.decode_s + c.rebuild_s
    node = {"size": policy.group_size, "parity": policy.parity}
    at_node = closed.loss_after(1, window_s, cluster.node_mtbf_s, **node)
    at_domain = 1.0
    if policy.has_memory:
        of_one = closed.loss_after(groups.most_in_one_domain, window_s, cluster.node_mtbf_s, **node)
        hit = min(groups.num_groups, cluster.nodes_per_domain)
        at_domain = -math.expm1(hit * math.log1p(-of_one)) if of_one < 1 else 1.0
    if not policy.has_memory:
        at_node = 1.0
    store = rates["node"] * at_node + rates["domain"] * at_domain + rates["site"]
    peers = rates["node"] + rates["domain"] + rates["site"] - store
    own = rates["trainer"]
    if not policy.has_memory:
        store, own = store + own, 0.0
    again_s = cluster.detect_s + cluster.restart_s
    paths = (  # rate, work lost, time down
        (own, c.memory_every_s / 2 + c.copied_s, again_s + c.own_s),
        (peers, c.memory_every_s / 2 + c.protected_s, again_s + cluster.replace_s + c.decode_s),
        (store, c.store_every_s / 2 + c.durable_s, again_s + cluster.replace_s + c.load_s),
    )
    lost = math.fsum(rate * lost_s for rate, lost_s, _ in paths if rate > 0)
    down = math.fsum(rate * down_s for rate, _, down_s in paths if rate > 0)
    overhead = c.memory_cost_s / c.memory_every_s + c.store_cost_s / c.store_every_s
    return Model(
        goodput=max(0.0, 1 - lost) / (1 + overhead) / (1 + down),
        loss_at_node_loss=at_node,
        store_rate_per_s=store,
        memory_cost_s=c.memory_cost_s,
        store_cost_s=c.store_cost_s,
    )


def _store_every_s(every_s: float, costs: Costs, demand: Demand) -> float:
    """No more often than saves finish, no more seldom than demanded."""
    return min(max(every_s, costs.durable_s, 1.0), max(demand.store_every_max_s, costs.durable_s))


def _around(policy: Policy, name: str, demand: Demand) -> Iterator[Policy]:
    for factor in _FACTORS:
        every_s = getattr(policy, name) * factor
        if name != "store_every_s" or every_s <= demand.store_every_max_s:
            yield dataclasses.replace(policy, **{name: every_s})
