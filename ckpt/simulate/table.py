"""One cluster or several of growing size, each without and with the memory tier: what both come to, side by side.

In: records. Out: rows, and rows as documents. Runs simulations, prints nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt import config
from ckpt.errors import InvalidInputError
from ckpt.simulate.closed import Estimate
from ckpt.simulate.cluster import Cluster, Tiers
from ckpt.simulate.run import Result, simulate
from ckpt.simulate.search import Demand, Model, best_policy, model_of

_SEARCH_RUNS_MAX = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cluster under one policy."""

    cluster: Cluster
    tiers: Tiers
    result: Result
    model: Model

    @property
    def scheme(self) -> str:
        """The policy in a few words."""
        policy = self.result.policy
        if not policy.has_memory:
            return "store only"
        if policy.parity == 0:
            return "own agent only"
        return f"any {policy.parity} of {policy.group_size}"


def sized(cluster: Cluster, num_ranks: int) -> Cluster:
    """The cluster with as many nodes as so many ranks need."""
    if num_ranks < 1 or num_ranks % cluster.ranks_per_node:
        raise InvalidInputError(
            f"ranks come in whole nodes of {cluster.ranks_per_node}, found {num_ranks:,}", kind="bad-cluster"
        )
    return dataclasses.replace(cluster, num_nodes=num_ranks // cluster.ranks_per_node)


def rows_of(
    clusters: Sequence[Cluster],
    tiers: Tiers,
    demand: Demand,
    *,
    duration_s: float,
    num_runs: int,
    seed: int,
    told: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """For each cluster a row with the store alone at its best interval, and a row with the policy that the demand gives."""
    if not 1 <= len(clusters) <= config.SIMULATE_SIZES_MAX:
        raise InvalidInputError(
            f"one table has 1 to {config.SIMULATE_SIZES_MAX} clusters, found {len(clusters)}", kind="bad-simulation"
        )
    alone = Demand(
        memory_every_s=math.inf, store_every_s=demand.store_every_s, store_every_max_s=demand.store_every_max_s
    )
    asked = [alone] if demand.memory_every_s == math.inf else [alone, demand]
    rows = []
    for cluster in clusters:
        for wanted in asked:
            told(f"{cluster.num_ranks:,} ranks, {'store only' if wanted is alone else 'with memory'}")
            search_runs = max(2, min(num_runs, _SEARCH_RUNS_MAX))
            policy = best_policy(cluster, tiers, wanted, duration_s=duration_s, num_runs=search_runs, seed=seed)
            result = simulate(cluster, tiers, policy, duration_s=duration_s, num_runs=num_runs, seed=seed)
            rows.append(Row(cluster=cluster, tiers=tiers, result=result, model=model_of(cluster, tiers, policy)))
    return rows


def document_of(row: Row) -> dict[str, Any]:
    """A row as numbers, for `--json`. An interval of `inf` is null: never."""
    result, costs = row.result, row.result.costs
    return {
        "num_nodes": row.cluster.num_nodes,
        "num_ranks": row.cluster.num_ranks,
        "mtbf_s": _finite(row.cluster.mtbf_s),
        "scheme": row.scheme,
        "group_size": result.policy.group_size,
        "parity": result.policy.parity,
        "memory_every_s": _finite(costs.memory_every_s),
        "store_every_s": _finite(costs.store_every_s),
        "goodput": _estimate(result.goodput),
        "goodput_model": row.model.goodput,
        "lost": result.lost,
        "stalled": result.stalled,
        "down": result.down,
        "num_failures": result.num_failures,
        "recoveries": result.recoveries,
        "node_loss_survival": _estimate(result.node_loss_survival),
        "loss_at_node_loss_model": row.model.loss_at_node_loss,
        "job_survival": _estimate(result.job_survival),
        "memory_bytes_per_rank": costs.memory_bytes_per_rank,
        "network_bytes_per_node_s": result.network_bytes_per_node_s,
        "store_bytes_per_s": result.store_bytes_per_s,
        "protected_s": costs.protected_s if result.policy.has_memory else None,
        "durable_s": costs.durable_s,
        "decode_s": costs.decode_s if result.policy.has_memory else None,
        "load_s": costs.load_s,
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in dataclasses.asdict(estimate).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
