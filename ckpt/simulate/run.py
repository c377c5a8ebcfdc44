"""The simulation: a job that trains, fails and recovers, as processes of simpy.

In: a cluster, its tiers, a policy, a seed. Out: what a run came to, and estimates with intervals of confidence over many runs.
Reproducible: the same arguments give the same numbers. Failures do not depend on the policy, so that two policies can be
compared on the same ones.

Who recovers from what: a crashed trainer from its own agent, at the newest step copied on all nodes; after the loss of nodes, the
newest protected step, decoded from the group; when more nodes of one group are gone than it has parities, the newest step on the
store. A lost node counts as gone until its share of parity is rebuilt, or until a later snapshot is protected.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from ckpt import config
from ckpt.errors import InvalidInputError
from ckpt.simulate import closed
from ckpt.simulate.closed import Estimate
from ckpt.simulate.cluster import DAY_S, Cluster, Costs, Groups, Policy, Tiers, costs_of
from ckpt.simulate.failures import Failure, failures
from ckpt.simulate.timetable import Stretch

_Process = Generator[Any, Any, None]


@dataclass(kw_only=True)
class Run:
    """What one run came to; its seconds add up: `duration_s = work_s + lost_s + stalled_s + down_s`."""

    duration_s: float
    work_s: float = 0.0  # that counts: done, and not lost
    lost_s: float = 0.0  # done, then lost
    stalled_s: float = 0.0  # for snapshots and saves
    down_s: float = 0.0  # from failures until training went on
    num_failures: int = 0  # while up, or of nodes that were there
    num_snapshots: int = 0
    num_saves: int = 0
    num_nodes_rebuilt: int = 0
    recoveries: dict[str, int] = field(default_factory=lambda: {"own": 0, "peers": 0, "store": 0})
    outages: dict[str, int] = field(default_factory=lambda: {"trainer": 0, "nodes": 0})
    node_losses_survived: int = 0  # outages with nodes lost from which the memory tier recovered


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a policy came to over all runs. Shares are of the time on the clock."""

    policy: Policy
    costs: Costs
    num_runs: int
    seed: int
    duration_s: float
    num_failures: int
    goodput: Estimate  # work that counts
    lost: float
    stalled: float
    down: float
    node_loss_survival: Estimate  # of the outages in which nodes were lost, the share that the memory tier survived
    job_survival: Estimate  # of the runs, the share in which the memory tier survived everything
    recoveries: dict[str, int]  # of all runs together, by tier
    network_bytes_per_node_s: float  # received, on average: protection and recovery
    store_bytes_per_s: float  # written, all nodes


def simulate(
    cluster: Cluster,
    tiers: Tiers,
    policy: Policy,
    *,
    duration_s: float = 30 * DAY_S,
    num_runs: int = 100,
    seed: int = 0,
) -> Result:
    """Simulate `num_runs` (two at least) jobs of `duration_s` each, with seeds `seed`, `seed + 1`, ...

    InvalidInputError (`bad-simulation`) for numbers out of range or more failures than `config.SIMULATE_FAILURES_MAX`.
    """
    if not 2 <= num_runs <= config.SIMULATE_RUNS_MAX:
        raise InvalidInputError(
            f"the number of runs must be from 2 to {config.SIMULATE_RUNS_MAX:,}, found {num_runs:,}",
            kind="bad-simulation",
        )
    if not 0 < duration_s < math.inf:
        raise InvalidInputError(f"the duration must be above 0 and finite, found {duration_s}", kind="bad-simulation")
    expected = num_runs * duration_s / cluster.mtbf_s
    if expected > config.SIMULATE_FAILURES_MAX:
        raise InvalidInputError(
            f"about {expected:,.0f} failures would have to be simulated, more than {config.SIMULATE_FAILURES_MAX:,}",
            kind="bad-simulation",
            hints=("simulate fewer runs, or shorter ones",),
        )
    runs = [
        run(cluster, tiers, policy, duration_s=duration_s, events=failures(cluster, seed + i)) for i in range(num_runs)
    ]
    return _result(cluster, tiers, policy, runs, seed=seed)


def run(cluster: Cluster, tiers: Tiers, policy: Policy, *, duration_s: float, events: Iterable[Failure]) -> Run:
    """Simulate one job that is struck by `events`, which are in order of time."""
    simpy = _simpy()
    job = _Job(simpy, cluster, costs_of(cluster, tiers, policy), policy, duration_s)
    job.environment.run(until=job.start(events))
    return job.run


def _simpy() -> Any:
    try:
        import simpy
    except ImportError as error:
        raise InvalidInputError(
            "the simulation needs a package that is not installed: simpy",
            kind="missing-package",
            hints=("pip install 'ckpt[simulate]'",),
        ) from error
    return simpy


class _Job:
    """One run. Its processes: failures arrive; training is interrupted by them, recovers, and goes on."""

    def __init__(self, simpy: Any, cluster: Cluster, costs: Costs, policy: Policy, duration_s: float) -> None:
        self.environment = simpy.Environment()
        self.run = Run(duration_s=duration_s)
        self._interrupt: Any = simpy.Interrupt
        self._cluster, self._costs, self._policy = cluster, costs, policy
        self._groups = Groups(cluster=cluster, group_size=policy.group_size, parity=policy.parity)
        self._training: Any = None  # the process
        self._up = True
        self._failed_s = 0.0  # when the present outage began
        self._nodes_lost = False  # in it
        self._survived = False  # the memory tier had a step, but the store a newer one
        self._work_s = 0.0  # done when training last stopped
        self._stretch = Stretch(costs=costs, start_s=0.0, work_s=0.0)
        self._copied: float | None = None  # work of the newest step that every own agent has
        self._protected: float | None = None  # and of the newest one that every group has
        self._durable = 0.0  # and of the newest one on the store; the start needs none
        self._protecting: tuple[float, float] | None = None  # (work, when protected), while training is down
        self._saving: tuple[float, float] | None = None
        self._absent: set[int] = set()  # lost nodes for which none stands in yet
        self._gone: dict[int, float] = {}  # nodes whose share is not there, and until when

    def start(self, events: Iterable[Failure]) -> Any:
        """Start the processes; returns the event at which the run is over."""
        self._training = self.environment.process(self._train())
        self.environment.process(self._fail(iter(events)))
        return self.environment.process(self._end())

    # Processes

    def _fail(self, events: Iterable[Failure]) -> _Process:
        for failure in events:
            yield self.environment.timeout(max(0.0, failure.at_s - self.environment.now))
            self._strike(failure)

    def _train(self) -> _Process:
        never = self.environment.event()
        while True:
            try:
                yield never
            except self._interrupt:
                yield from self._recover()

    def _recover(self) -> _Process:
        """From the failure until training goes on. The loss of another node on the way begins it anew."""
        while True:
            try:
                yield self.environment.timeout(
                    self._cluster.detect_s + (self._cluster.replace_s if self._absent else 0)
                )
                self._absent.clear()
                tier = self._tier()
                yield self.environment.timeout(self._restore_s(tier))
                self._restored(tier)
                yield self.environment.timeout(self._cluster.restart_s)
                break
            except self._interrupt:
                continue
        self._resume(tier)

    def _end(self) -> _Process:
        yield self.environment.timeout(self.run.duration_s)
        if self._up:
            self._stop()
            self.run.work_s = self._work_s
        else:
            self._lose_down_to(self._tier())
            self.run.work_s = self._work_s

    # Failures

    def _strike(self, failure: Failure) -> None:
        """A failure happens. Nothing happens to trainers that are down and to nodes that are not there."""
        nodes = [n for n in self._cluster.nodes_of(failure.kind, failure.index) if n not in self._absent]
        if failure.kind == "trainer" and not self._up or failure.kind != "trainer" and not nodes:
            return
        self.run.num_failures += 1
        if self._up:
            self._stop()
            self._up, self._nodes_lost, self._failed_s = False, False, self.environment.now
        if nodes:
            self._lose(nodes)
        self._training.interrupt()

    def _stop(self) -> None:
        """Training stops now: what it did and what of it is saved."""
        now_s, stretch, c = self.environment.now, self._stretch, self._costs
        progress = stretch.at(now_s)
        self._work_s = progress.work_s
        self.run.stalled_s += now_s - stretch.start_s - (progress.work_s - stretch.work_s)
        self.run.num_snapshots += progress.num_snapshots
        self.run.num_saves += progress.num_saves
        self._settle()
        copied = stretch.newest_snapshot(now_s, progress, after_s=c.copied_s)
        protected = stretch.newest_snapshot(now_s, progress, after_s=c.protected_s)
        if protected is not None:
            self._protected = protected[0]
            self._gone.clear()  # all nodes were there when it began
        if copied is not None:
            self._copied = copied[0]
            if copied != protected:
                self._protecting = (copied[0], copied[1] + c.protected_s)
        staged = stretch.newest_save(now_s, progress, after_s=c.store_cost_s)
        durable = stretch.newest_save(now_s, progress, after_s=c.durable_s)
        if durable is not None:
            self._durable = max(self._durable, durable[0])
        if staged is not None and staged != durable:
            self._saving = (staged[0], staged[1] + c.durable_s)

    def _settle(self) -> None:
        """What the agents had in hand when a trainer crashed, and have finished since."""
        now_s = self.environment.now
        if self._protecting is not None and self._protecting[1] <= now_s:
            self._protected, self._protecting = self._protecting[0], None
            self._gone.clear()
        if self._saving is not None and self._saving[1] <= now_s:
            self._durable, self._saving = max(self._durable, self._saving[0]), None

    def _lose(self, nodes: list[int]) -> None:
        """Nodes are gone, and with them their images and their shares of parity."""
        now_s = self.environment.now
        self._settle()
        self._protecting = self._saving = None
        self._nodes_lost = True
        self._absent.update(nodes)
        self._gone = {node: until_s for node, until_s in self._gone.items() if until_s > now_s}
        self._gone.update(dict.fromkeys(nodes, math.inf))
        if not self._groups.survive(self._gone):
            self._copied = self._protected = None

    # Recovery

    def _tier(self) -> str:
        """The tier that has the newest step now; the nearer one of two."""
        self._settle()
        near, step = ("peers", self._protected) if self._nodes_lost else ("own", self._copied)
        return near if step is not None and step >= self._durable else "store"

    def _restore_s(self, tier: str) -> float:
        c = self._costs
        return {"own": c.own_s, "peers": c.decode_s, "store": c.load_s}[tier]

    def _restored(self, tier: str) -> None:
        """The state is back on every rank."""
        if tier == "peers":
            self._copied = self._protected
            lost = [node for node, until_s in self._gone.items() if until_s == math.inf]
            self.run.num_nodes_rebuilt += len(lost)
            self._gone.update(dict.fromkeys(lost, self.environment.now + self._costs.rebuild_s))
        elif tier == "store":
            self._gone.clear()  # there is nothing left that could be lost
            self._survived, self._copied, self._protected = self._protected is not None, None, None

    def _resume(self, tier: str) -> None:
        self.run.recoveries[tier] += 1
        self.run.outages["nodes" if self._nodes_lost else "trainer"] += 1
        self.run.node_losses_survived += self._nodes_lost and (tier == "peers" or self._survived)
        self._lose_down_to(tier)
        self._stretch = Stretch(costs=self._costs, start_s=self.environment.now, work_s=self._work_s)
        self._up, self._survived = True, False

    def _lose_down_to(self, tier: str) -> None:
        step = {"own": self._copied, "peers": self._protected, "store": self._durable}[tier]
        assert step is not None
        self.run.down_s += self.environment.now - self._failed_s
        self.run.lost_s += self._work_s - step
        self._work_s = step


def _result(cluster: Cluster, tiers: Tiers, policy: Policy, runs: list[Run], *, seed: int) -> Result:
    costs, duration_s = costs_of(cluster, tiers, policy), runs[0].duration_s
    total_s = duration_s * len(runs)
    recoveries = {tier: sum(r.recoveries[tier] for r in runs) for tier in ("own", "peers", "store")}
    losses = sum(r.outages["nodes"] for r in runs)
    unscathed = sum(r.node_losses_survived == r.outages["nodes"] for r in runs) if policy.has_memory else 0
    protect = sum(r.num_snapshots for r in runs) * costs.protect_bytes_per_node
    recover = sum(r.num_nodes_rebuilt for r in runs) * costs.recover_bytes_per_node / cluster.num_nodes
    return Result(
        policy=policy,
        costs=costs,
        num_runs=len(runs),
        seed=seed,
        duration_s=duration_s,
        num_failures=sum(r.num_failures for r in runs),
        goodput=closed.mean_of([r.work_s / duration_s for r in runs]),
        lost=sum(r.lost_s for r in runs) / total_s,
        stalled=sum(r.stalled_s for r in runs) / total_s,
        down=sum(r.down_s for r in runs) / total_s,
        node_loss_survival=closed.share_of(sum(r.node_losses_survived for r in runs), losses),
        job_survival=closed.share_of(unscathed, len(runs)),
        recoveries=recoveries,
        network_bytes_per_node_s=(protect + recover) / total_s,
        store_bytes_per_s=sum(r.num_saves for r in runs) * costs.store_bytes / total_s,
    )
