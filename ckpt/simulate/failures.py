"""When what fails: one Poisson process for the whole cluster, each event of which then falls on a node, a domain or the site.

In: a cluster and a seed. Out: an endless, reproducible sequence of failures. Pure. Its cost does not depend on the number of
nodes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.simulate.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure."""

    at_s: float  # since the start of the run
    kind: str  # trainer, node, domain or site
    index: int  # of the node or the domain


def failures(cluster: Cluster, seed: int) -> Iterator[Failure]:
    """All failures of a run, in order of time. None where nothing fails."""
    rates = cluster.rates_per_s
    kinds = list(rates)
    counts = {"trainer": cluster.num_nodes, "node": cluster.num_nodes, "domain": cluster.num_domains, "site": 1}
    total = math.fsum(rates.values())
    if total == 0:
        return
    draw, now_s = random.Random(seed).random, 0.0
    while True:
        now_s -= math.log1p(-draw()) / total
        left, kind = draw() * total, kinds[-1]
        for name in kinds:
            left -= rates[name]
            if left < 0:
                kind = name
                break
        yield Failure(at_s=now_s, kind=kind, index=int(draw() * counts[kind]))
