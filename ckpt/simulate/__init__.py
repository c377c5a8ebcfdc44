"""What failures cost a training job: a discrete-event simulation of nodes, failures and checkpoint tiers, and the best policy.

In: records of a cluster, its speeds and a policy. Out: goodput, lost work, survival of the memory tier, memory and network cost.
Touches no store, no device and no other part of ckpt but its errors and limits; everything is seeded.
"""

from ckpt.simulate.cluster import Cluster, Policy, Tiers
from ckpt.simulate.run import Result, simulate
from ckpt.simulate.search import Demand, best_policy

__all__ = ["Cluster", "Demand", "Policy", "Result", "Tiers", "best_policy", "simulate"]
