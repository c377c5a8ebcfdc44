"""What is simulated: a cluster and its failures, the speeds of its tiers, a policy, and what a save and a recovery then cost.

In: numbers. Out: frozen records, checked when made. Pure.

The layout is that of the memory tier: every node keeps its own images whole; a group of n nodes, in as many failure domains as
there are, codes each image in n - m blocks and spreads m parities over the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ckpt import config
from ckpt.errors import InvalidInputError

DAY_S = 86400.0
GIB = 1024.0 * config.MIB


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes, and how often what fails. Means of exponential times; `inf` where something never fails.

    The first three defaults: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3), 78 % of them hardware. The
    rates of domains and of the site are assumptions.
    """

    num_nodes: int = 128
    ranks_per_node: int = 8
    node_mtbf_s: float = 340 * DAY_S  # of one node, until its memory is gone
    trainer_mtbf_s: float = 1200 * DAY_S  # of the trainers of one node, until they crash and its agents live on
    nodes_per_domain: int = 16  # nodes that share a switch or a power supply
    domain_mtbf_s: float = 5 * 365 * DAY_S  # of one domain, until all its nodes are lost at once
    site_mtbf_s: float = 180 * DAY_S  # until all nodes are lost at once
    detect_s: float = 10.0  # from a failure until it is known
    replace_s: float = 120.0  # until a node stands in for a lost one
    restart_s: float = 60.0  # to start the trainers again, after the state is there

    def __post_init__(self) -> None:
        _check_count("num_nodes", self.num_nodes, config.SIMULATE_NODES_MAX)
        _check_count("ranks_per_node", self.ranks_per_node, config.WORLD_MAX)
        _check_count("nodes_per_domain", self.nodes_per_domain, config.SIMULATE_NODES_MAX)
        for name in ("node_mtbf_s", "trainer_mtbf_s", "domain_mtbf_s", "site_mtbf_s"):
            _check(name, getattr(self, name), above=True, may_be_endless=True)
        for name in ("detect_s", "replace_s", "restart_s"):
            _check(name, getattr(self, name))

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_domains(self) -> int:
        return -(-self.num_nodes // self.nodes_per_domain)

    @property
    def rates_per_s(self) -> dict[str, float]:
        """How often what fails, in the whole cluster while all of it is up."""
        return {
            "trainer": self.num_nodes / self.trainer_mtbf_s,
            "node": self.num_nodes / self.node_mtbf_s,
            "domain": self.num_domains / self.domain_mtbf_s,
            "site": 1 / self.site_mtbf_s,
        }

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of any kind."""
        rate = sum(self.rates_per_s.values())
        return 1 / rate if rate else math.inf

    def nodes_of(self, kind: str, index: int) -> range:
        """The nodes that a failure takes; none for a trainer."""
        if kind == "domain":
            start = index * self.nodes_per_domain
            return range(start, min(start + self.nodes_per_domain, self.num_nodes))
        return {"trainer": range(0), "node": range(index, index + 1), "site": range(self.num_nodes)}[kind]


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Sizes, speeds and stalls of the tiers: measured (`ckpt report`, `bench/`) or assumed."""

    image_bytes: float = 2 * GIB  # of the state of one rank
    memory_bytes_per_s: float = 8 * GIB  # one rank, between its state and its own agent
    network_bytes_per_s: float = 10 * GIB  # one node, in each direction, as far as agents may use it
    code_bytes_per_s: float = 10 * GIB  # one node, bytes read by the coder
    store_node_bytes_per_s: float = 1 * GIB  # one node to or from the store
    store_bytes_per_s: float = 200 * GIB  # all nodes together
    memory_stall_s: float = 0.1  # training stands still for a snapshot in memory
    store_stall_s: float = 0.1  # and for a save to the store
    slowdown: float = 0.02  # share of its speed that training loses while snapshots are on their way

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size_or_speed = "bytes" in field.name
            _check(field.name, getattr(self, field.name), above=size_or_speed)
        if self.slowdown >= 1:
            raise InvalidInputError(f"`slowdown` is a share below 1, found {self.slowdown}", kind="bad-cluster")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How often what is saved where. Intervals are of work: a snapshot is due at every multiple of its interval."""

    memory_every_s: float  # `inf`: no memory tier
    store_every_s: float  # `inf`: never
    group_size: int = 1  # nodes, n; 1 with parity 0: the own agent only
    parity: int = 0  # nodes of a group that may be lost, m

    def __post_init__(self) -> None:
        _check("memory_every_s", self.memory_every_s, above=True, may_be_endless=True)
        _check("store_every_s", self.store_every_s, above=True, may_be_endless=True)
        _check_count("group_size", self.group_size, config.SIMULATE_GROUP_MAX)
        if not 0 <= self.parity < self.group_size:
            raise InvalidInputError(
                f"`parity` must be from 0 to one less than the group size {self.group_size}, found {self.parity}",
                kind="bad-policy",
                hints=("a group of n nodes with m parities survives the loss of any m",),
            )

    @property
    def has_memory(self) -> bool:
        return not math.isinf(self.memory_every_s)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a policy costs on a cluster, each part by itself."""

    memory_every_s: float  # work between two snapshots that are not skipped
    store_every_s: float
    memory_cost_s: float  # what one snapshot takes from training: its stall, and the slowdown while it is on its way
    store_cost_s: float
    copied_s: float  # from the start of a snapshot until the own agent has it whole
    protected_s: float  # until the group has it
    durable_s: float  # from the start of a save until the store has it
    own_s: float  # back from the own agent
    decode_s: float  # a lost node's images, out of its group
    rebuild_s: float  # after that, its share of parity; then the group can lose m again
    load_s: float  # all images, out of the store
    memory_bytes_per_rank: float  # of an agent: two generations, each an image and its share of parity
    protect_bytes_per_node: float  # received (and sent) per snapshot
    recover_bytes_per_node: float  # received by a new node, until it holds its images and its share of parity
    store_bytes: float  # of one save


def costs_of(cluster: Cluster, tiers: Tiers, policy: Policy) -> Costs:
    """What a policy costs on a cluster.

    Each holder of a parity pulls the n - m blocks that it codes: m images per image in all. A new node pulls n - m blocks for
    each of its own blocks. A snapshot that is due while one is on its way is skipped, as is a save.
    """
    blocks, parity = policy.group_size - policy.parity, policy.parity
    node_bytes = tiers.image_bytes * cluster.ranks_per_node
    pulled_s = node_bytes / min(tiers.network_bytes_per_s, tiers.code_bytes_per_s)  # a node's images, pulled and coded
    own_s = tiers.image_bytes / tiers.memory_bytes_per_s
    moved_s = max(node_bytes / tiers.store_node_bytes_per_s, node_bytes * cluster.num_nodes / tiers.store_bytes_per_s)
    copied_s = max(tiers.memory_stall_s, own_s)
    protected_s = copied_s + parity * pulled_s
    durable_s = tiers.store_stall_s + moved_s
    memory_cost_s = tiers.memory_stall_s + tiers.slowdown * protected_s
    store_cost_s = tiers.store_stall_s + tiers.slowdown * moved_s
    generation = tiers.image_bytes * (1 + parity / blocks)
    return Costs(
        memory_every_s=_not_skipped(policy.memory_every_s, memory_cost_s, protected_s),
        store_every_s=_not_skipped(policy.store_every_s, store_cost_s, durable_s),
        memory_cost_s=memory_cost_s,
        store_cost_s=store_cost_s,
        copied_s=copied_s,
        protected_s=protected_s,
        durable_s=durable_s,
        own_s=own_s,
        decode_s=max(own_s, blocks * pulled_s),
        rebuild_s=parity * pulled_s,
        load_s=moved_s,
        memory_bytes_per_rank=2 * generation if policy.has_memory else 0.0,
        protect_bytes_per_node=parity * node_bytes,
        recover_bytes_per_node=(blocks + parity) * node_bytes,
        store_bytes=node_bytes * cluster.num_nodes,
    )


def _not_skipped(every_s: float, cost_s: float, busy_s: float) -> float:
    return every_s * max(1, math.ceil(busy_s / (every_s + cost_s) - 1e-9)) if not math.isinf(every_s) else every_s


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which node is in which group: nodes are dealt out domain by domain, then cut into groups; what is left over makes some
    groups one larger."""

    cluster: Cluster
    group_size: int
    parity: int

    def __post_init__(self) -> None:
        if self.group_size > self.cluster.num_nodes:
            raise InvalidInputError(
                f"a group of {self.group_size} nodes needs as many; the cluster has {self.cluster.num_nodes}",
                kind="bad-policy",
                hints=("choose a smaller group, or leave it out to have the best found",),
            )

    @property
    def num_groups(self) -> int:
        return self.cluster.num_nodes // self.group_size

    def group_of(self, node: int) -> int:
        """The group of a node."""
        domains, domain, place = self.cluster.num_domains, *divmod(node, self.cluster.nodes_per_domain)
        in_last = self.cluster.num_nodes - (domains - 1) * self.cluster.nodes_per_domain
        before = place * domains - max(0, place - in_last)  # the last domain may have fewer nodes
        return (before + domain) * self.num_groups // self.cluster.num_nodes

    def survive(self, lost: Iterable[int]) -> bool:
        """Whether no group has lost more nodes than it can."""
        counts = Counter(map(self.group_of, lost))
        return max(counts.values(), default=0) <= self.parity

    @cached_property
    def most_in_one_domain(self) -> int:
        """How many nodes of one group, at most, a failure of one domain takes."""
        pairs = Counter((self.group_of(n), n // self.cluster.nodes_per_domain) for n in range(self.cluster.num_nodes))
        return max(pairs.values())


def _check(name: str, value: float, *, above: bool = False, may_be_endless: bool = False) -> None:
    fits = value > 0 if above else value >= 0
    if not fits or (math.isinf(value) and not may_be_endless):
        wanted = "above 0" if above else "0 or more"
        raise InvalidInputError(
            f"`{name}` must be {wanted}{'' if may_be_endless else ' and finite'}, found {value}", kind="bad-cluster"
        )


def _check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InvalidInputError(f"`{name}` must be from 1 to {most:,}, found {value:,}", kind="bad-cluster")
