"""Goal: the simulation does what its rules say, and agrees with the closed forms.

Method: cases by hand; random failures against a program that steps through every snapshot; and runs against Daly's complete
model and the loss of a group.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from typing import Any

import pytest

from ckpt import config
from ckpt.errors import InvalidInputError
from ckpt.simulate import closed
from ckpt.simulate.cluster import DAY_S, Cluster, Groups, Policy, Tiers, costs_of
from ckpt.simulate.failures import Failure
from ckpt.simulate.run import Run, run, simulate

# Whole numbers all: a snapshot stalls for 2 s, is copied 4 s and protected 4 + 4 m s after its start; a save stalls for 3 s and
# is durable after 3 + 16 s; recovery takes 1 + 4 + 5 s from the own agent; after a node loss 10 s more, 4 (n - m) s to decode.
CLUSTER = Cluster(num_nodes=12, ranks_per_node=1, nodes_per_domain=3, detect_s=1, replace_s=10, restart_s=5)
TIERS = Tiers(
    image_bytes=4, memory_bytes_per_s=1, network_bytes_per_s=1, code_bytes_per_s=1, store_node_bytes_per_s=0.25,
    store_bytes_per_s=1000, memory_stall_s=2, store_stall_s=3, slowdown=0,
)  # fmt: skip
POLICY = Policy(memory_every_s=20, store_every_s=100, group_size=4, parity=1)


def fail(at_s: float, kind: str, index: int = 0) -> Failure:
    return Failure(at_s=at_s, kind=kind, index=index)


def run_with(*events: Failure, policy: Policy = POLICY, duration_s: float = 1000) -> Run:
    return run(CLUSTER, TIERS, policy, duration_s=duration_s, events=events)


def test_without_failures_only_stalls_cost() -> None:
    """1,022 s of work in 1,154 s: snapshots at 20, 40, ..., 1,020 for 2 s each, saves at 100, ..., 1,000 for 3 s each."""
    done = run_with(duration_s=1154)

    assert (done.num_snapshots, done.num_saves) == (51, 10)
    assert (done.work_s, done.stalled_s, done.lost_s, done.down_s) == pytest.approx((1022, 132, 0, 0))


def test_a_crashed_trainer_comes_back_from_its_own_agent_at_the_newest_copied_step() -> None:
    done = run_with(fail(47, "trainer"), duration_s=100)  # work 20 at 20, 40 at 42; copied at 46; work 43 when it fails

    assert done.recoveries == {"own": 1, "peers": 0, "store": 0}
    assert (done.lost_s, done.down_s) == pytest.approx((3, 1 + 4 + 5))


def test_a_snapshot_that_was_not_copied_when_the_trainer_crashed_is_void() -> None:
    done = run_with(fail(45, "trainer"), duration_s=100)

    assert done.lost_s == pytest.approx(41 - 20)


def test_a_lost_node_is_decoded_from_its_group_at_the_newest_protected_step() -> None:
    done = run_with(fail(47, "node"), duration_s=100)  # work 40 is protected at 50, work 20 was at 28

    assert done.recoveries == {"own": 0, "peers": 1, "store": 0}
    assert (done.lost_s, done.down_s) == pytest.approx((43 - 20, 1 + 10 + 3 * 4 + 5))
    assert (done.num_nodes_rebuilt, done.node_losses_survived) == (1, 1)


def test_more_nodes_of_a_group_than_it_has_parities_send_the_job_to_the_store() -> None:
    group = Groups(cluster=CLUSTER, group_size=4, parity=1)
    mate = next(n for n in range(1, 12) if group.group_of(n) == group.group_of(0))
    done = run_with(fail(150, "node", 0), fail(155, "node", mate), duration_s=300)

    assert done.recoveries == {"own": 0, "peers": 0, "store": 1}
    assert done.down_s == pytest.approx(5 + 1 + 10 + 16 + 5)
    assert (done.lost_s, done.node_losses_survived) == (pytest.approx(150 - 6 * 2 - 3 - 100), 0)


def test_nodes_of_different_groups_may_go_together() -> None:
    group = Groups(cluster=CLUSTER, group_size=4, parity=1)
    other = next(n for n in range(1, 12) if group.group_of(n) != group.group_of(0))
    done = run_with(fail(150, "node", 0), fail(155, "node", other), duration_s=300)

    assert done.recoveries == {"own": 0, "peers": 1, "store": 0}
    assert (done.down_s, done.num_nodes_rebuilt) == (pytest.approx(5 + 1 + 10 + 12 + 5), 2)


@pytest.mark.parametrize(("second_s", "tier"), [(150 + 1 + 10 + 12 + 3.5, "store"), (150 + 1 + 10 + 12 + 4.5, "peers")])
def test_a_lost_share_is_missing_until_it_is_rebuilt(second_s: float, tier: str) -> None:
    """Decoding ends 23 s after the failure, the parity is rebuilt 4 s later, training goes on 5 s after decoding."""
    groups = Groups(cluster=CLUSTER, group_size=4, parity=1)
    mate = next(n for n in range(1, 12) if groups.group_of(n) == groups.group_of(0))
    done = run_with(fail(150, "node", 0), fail(second_s, "node", mate), duration_s=300)

    assert done.recoveries == {"own": 0, "peers": int(tier == "peers"), "store": int(tier == "store")}


def test_a_node_that_is_not_there_cannot_fail_again_and_trainers_that_are_down_cannot_crash() -> None:
    once = run_with(fail(150, "node", 0), duration_s=300)
    again = run_with(fail(150, "node", 0), fail(152, "node", 0), fail(153, "trainer"), duration_s=300)

    assert again == once


def test_a_domain_takes_one_node_of_each_group_and_the_site_takes_all() -> None:
    assert run_with(fail(150, "domain", 1), duration_s=300).recoveries == {"own": 0, "peers": 1, "store": 0}
    assert run_with(fail(150, "site"), duration_s=300).recoveries == {"own": 0, "peers": 0, "store": 1}


def test_an_agent_finishes_what_it_had_when_its_trainer_crashed() -> None:
    """Work 40 is copied at 46 and protected at 50, while the trainer is down from 47 to 57."""
    done = run_with(fail(47, "trainer"), fail(58, "node", 0), duration_s=200)

    assert done.recoveries == {"own": 1, "peers": 1, "store": 0}
    assert done.lost_s == pytest.approx(3 + 1)


def test_what_an_agent_had_in_hand_when_a_node_was_lost_is_void() -> None:
    done = run_with(fail(47, "trainer"), fail(49, "node", 0), duration_s=200)

    assert done.recoveries == {"own": 0, "peers": 1, "store": 0}
    assert done.lost_s == pytest.approx(43 - 20)


POLICIES = [
    POLICY,
    Policy(memory_every_s=20, store_every_s=100, group_size=4, parity=2),
    Policy(memory_every_s=31, store_every_s=47, group_size=3, parity=1),
    Policy(memory_every_s=50, store_every_s=25),
    Policy(memory_every_s=math.inf, store_every_s=40),
    Policy(memory_every_s=15, store_every_s=math.inf, group_size=6, parity=3),
    Policy(memory_every_s=7, store_every_s=11, group_size=2, parity=1),  # most are skipped
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_random_failures_come_to_the_same_as_stepping_through_every_snapshot(policy: Policy) -> None:
    for seed in range(150):
        events = random_failures(seed)
        found = run(CLUSTER, TIERS, policy, duration_s=3000, events=events)
        stepped = Stepper(policy).play(events, 3000)
        assert found.work_s + found.lost_s + found.stalled_s + found.down_s == pytest.approx(3000)
        assert {key: getattr(found, key) for key in stepped} == pytest.approx(stepped), (seed, events)
        assert found.recoveries == stepped_recoveries(policy, events)


def stepped_recoveries(policy: Policy, events: list[Failure]) -> dict[str, int]:
    stepper = Stepper(policy)
    stepper.play(events, 3000)
    return stepper.recoveries


def random_failures(seed: int) -> list[Failure]:
    """Failures at times of which no two ever differ by a whole number, so that nothing happens at the same time."""
    draw = random.Random(seed)
    times = sorted(draw.sample(range(5, 2990), draw.choice((3, 10, 40))))
    out = []
    for i, time in enumerate(times):
        kind = draw.choices(("trainer", "node", "domain", "site"), (6, 8, 2, 0.4))[0]
        out.append(fail(time + (i + 1) / 64, kind, draw.randrange({"domain": 4, "site": 1}.get(kind, 12))))
    return out


class Stepper:
    """The rules again, the slow way: every point and every phase is an event, every snapshot is kept in a list."""

    def __init__(self, policy: Policy) -> None:
        self.costs = costs_of(CLUSTER, TIERS, policy)
        self.groups = Groups(cluster=CLUSTER, group_size=policy.group_size, parity=policy.parity)
        self.recoveries = {"own": 0, "peers": 0, "store": 0}
        self.images: list[dict[str, Any]] = []  # work, copied, protected
        self.saves: list[tuple[float, float, float]] = [(0.0, -1.0, -1.0)]  # work, staged, durable
        self.gone: dict[int, tuple[float, float]] = {}  # node: when lost, when rebuilt
        self.absent: set[int] = set()

    def play(self, events: list[Failure], end_s: float) -> dict[str, float]:
        queue, now, work = list(events), 0.0, 0.0
        total = {"work_s": 0.0, "lost_s": 0.0, "stalled_s": 0.0, "down_s": 0.0}
        while now < end_s:
            now, work, hit = self.train(queue, now, work, end_s, total)
            if hit is None:
                break
            failed, lost_nodes = now, self.strike(hit, now, up=True)
            phases = ["detect", "restore", "restart"]
            tier, kept = "store", 0.0
            while phases:
                if phases[0] == "restore":
                    tier = self.tier(lost_nodes, now)
                    kept = self.newest(tier, now)
                seconds = {
                    "detect": 1 + (10 if self.absent else 0),
                    "restore": {"own": self.costs.own_s, "peers": self.costs.decode_s, "store": self.costs.load_s}[
                        tier
                    ],
                    "restart": 5,
                }[phases[0]]
                if queue and queue[0].at_s < min(now + seconds, end_s):
                    event = queue.pop(0)
                    fresh = {n for n in CLUSTER.nodes_of(event.kind, event.index) if n not in self.absent}
                    if not fresh:
                        left = now + seconds - event.at_s  # nothing happens: the phase goes on
                        now, seconds = event.at_s, left
                        while (
                            queue
                            and queue[0].at_s < min(now + left, end_s)
                            and not (set(CLUSTER.nodes_of(queue[0].kind, queue[0].index)) - self.absent)
                        ):
                            queue.pop(0)
                        if not (queue and queue[0].at_s < min(now + left, end_s)):
                            now += left
                            self.done(phases.pop(0), tier, now)
                            if now >= end_s:
                                break
                            continue
                        event = queue.pop(0)
                    now = event.at_s
                    self.strike(event, now, up=False)
                    lost_nodes = True
                    phases = ["detect", "restore", "restart"]
                    continue
                now += seconds
                if now >= end_s:
                    break
                self.done(phases.pop(0), tier, now)
            if phases:  # the run ends first: what it would come back to
                kept = self.newest(self.tier(lost_nodes, end_s), end_s)
            total["lost_s"] += work - kept
            total["down_s"] += min(now, end_s) - failed
            work = kept
            if not phases:
                self.recoveries[tier] += 1
                if tier == "store":
                    self.images.clear()
                else:
                    self.images = [i for i in self.images if i["work"] <= kept]
        total["work_s"] = work
        return total

    def train(
        self, queue: list[Failure], now: float, work: float, end_s: float, total: dict[str, float]
    ) -> tuple[float, float, Failure | None]:
        c = self.costs
        while True:
            until = queue[0].at_s if queue and queue[0].at_s < end_s else end_s
            points = [
                (math.floor(work / e + 1e-9) + 1) * e for e in (c.memory_every_s, c.store_every_s) if e < math.inf
            ]
            point = min(points)
            if now + point - work > until:
                return until, work + until - now, queue.pop(0) if until < end_s else None
            now, work = now + point - work, point
            stall = 0.0
            if work % c.memory_every_s == 0:
                self.images.append({"work": work, "copied": now + c.copied_s, "protected": now + c.protected_s})
                stall = c.memory_cost_s
            if work % c.store_every_s == 0:
                if now + stall <= until:
                    self.saves.append((work, now + stall + c.store_cost_s, now + stall + c.durable_s))
                stall += c.store_cost_s
            stalled = min(stall, until - now)
            now, total["stalled_s"] = now + stalled, total["stalled_s"] + stalled
            if now >= until and stalled < stall:
                return until, work, queue.pop(0) if until < end_s else None

    def strike(self, event: Failure, now: float, *, up: bool) -> bool:
        nodes = {n for n in CLUSTER.nodes_of(event.kind, event.index) if n not in self.absent}
        if up:
            self.images = [i for i in self.images if i["copied"] <= now]
            self.saves = [s for s in self.saves if s[1] <= now]
        whole = [i for i in self.images if i["protected"] <= now]
        if nodes:
            since = max((i["protected"] - self.costs.protected_s for i in whole), default=-1.0)
            self.images = whole
            self.saves = [s for s in self.saves if s[2] <= now]
            self.gone = {n: t for n, t in self.gone.items() if t[1] > now and t[0] > since}
            self.gone.update(dict.fromkeys(nodes, (now, math.inf)))
            self.absent |= nodes
            if not self.groups.survive(self.gone):
                self.images = []
        return bool(nodes)

    def done(self, phase: str, tier: str, now: float) -> None:
        if phase == "detect":
            self.absent.clear()
        elif phase == "restore" and tier == "peers":
            rebuilt = now + self.costs.rebuild_s
            self.gone = {n: (t[0], rebuilt if t[1] == math.inf else t[1]) for n, t in self.gone.items()}
            self.images = self.images[-1:]
        elif phase == "restore" and tier == "store":
            self.gone.clear()
            self.images.clear()

    def newest(self, tier: str, now: float) -> float:
        if tier == "store":
            return max(s[0] for s in self.saves if s[2] <= now)
        return max((i["work"] for i in self.images if tier == "own" or i["protected"] <= now), default=-1.0)

    def tier(self, lost_nodes: bool, now: float) -> str:
        near = "peers" if lost_nodes else "own"
        return near if self.newest(near, now) >= self.newest("store", now) else "store"


# The closed forms.

ONLY_NODES: dict[str, float] = {"trainer_mtbf_s": math.inf, "domain_mtbf_s": math.inf, "site_mtbf_s": math.inf}


def test_single_tier_with_a_store_at_once_is_dalys_model_within_its_confidence() -> None:
    cluster = Cluster(
        num_nodes=100, ranks_per_node=1, node_mtbf_s=1e6, detect_s=50, replace_s=100, restart_s=50, **ONLY_NODES
    )
    tiers = Tiers(image_bytes=1, store_node_bytes_per_s=1e9, store_bytes_per_s=1e9, store_stall_s=30, slowdown=0)
    for interval_s in (100.0, 300.0, 761.0, 2000.0, 6000.0):
        policy = Policy(memory_every_s=math.inf, store_every_s=interval_s)
        runs = simulate(cluster, tiers, policy, duration_s=150 * DAY_S, num_runs=12)
        known = 1 / closed.wall_per_work(interval_s, 30, 1e4, restart_s=200)
        half = (runs.goodput.high - runs.goodput.low) / 2

        assert half < 0.006
        assert abs(runs.goodput.value - known) < 2 * half  # 1 in 1,500 by chance; the seeds are fixed


@pytest.mark.parametrize(
    ("size", "parity", "chance"), [(2, 1, 0.02), (4, 1, 0.01), (10, 1, 0.003), (5, 2, 0.03), (10, 2, 0.01)]
)
def test_memory_tier_is_lost_as_often_as_the_closed_form_says(size: int, parity: int, chance: float) -> None:
    """One group; `chance`: that a given node is lost while a share is missing, 1,000 s and some."""
    cluster = Cluster(num_nodes=size, ranks_per_node=1, nodes_per_domain=1, replace_s=1000, **ONLY_NODES)
    tiers = Tiers(image_bytes=1, network_bytes_per_s=0.1, code_bytes_per_s=1, memory_bytes_per_s=1e9, slowdown=0)
    policy = Policy(memory_every_s=100, store_every_s=1e6, group_size=size, parity=parity)
    costs = costs_of(cluster, tiers, policy)
    window_s = cluster.detect_s + cluster.replace_s + costs.decode_s + costs.rebuild_s
    cluster = dataclasses.replace(cluster, node_mtbf_s=window_s / chance)
    found = simulate(cluster, tiers, policy, duration_s=1000 * cluster.node_mtbf_s / size, num_runs=10)
    known = closed.loss_after(1, window_s, cluster.node_mtbf_s, size=size, parity=parity)
    tries = sum(found.recoveries.values())
    spread = math.sqrt(known * (1 - known) / tries)

    assert tries > 5000
    assert 1 - found.node_loss_survival.value == pytest.approx(known, abs=3 * spread + 0.05 * known)


def test_survival_of_the_job_counts_runs_and_all_shares_add_up() -> None:
    cluster = Cluster(num_nodes=40, node_mtbf_s=5 * DAY_S, trainer_mtbf_s=5 * DAY_S, nodes_per_domain=4)
    found = simulate(
        cluster, Tiers(), Policy(memory_every_s=60, store_every_s=3600, group_size=8, parity=1), num_runs=20
    )

    assert found.goodput.value + found.lost + found.stalled + found.down == pytest.approx(1)
    assert found.job_survival.low <= found.job_survival.value <= found.job_survival.high
    assert 0 < found.job_survival.value < 1
    assert found.network_bytes_per_node_s > found.goodput.value * found.costs.protect_bytes_per_node / 60
    assert sum(found.recoveries.values()) <= found.num_failures


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others() -> None:
    policy = Policy(memory_every_s=60, store_every_s=3600, group_size=8, parity=2)
    first, again, other = (simulate(Cluster(), Tiers(), policy, num_runs=5, seed=seed) for seed in (7, 7, 8))

    assert first == again
    assert first.goodput != other.goodput


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_runs": 1}, "from 2 to 100,000, found 1"),
        ({"num_runs": config.SIMULATE_RUNS_MAX + 1}, "number of runs"),
        ({"duration_s": 0}, "duration must be above 0"),
        ({"duration_s": math.inf}, "duration must be above 0 and finite"),
        ({"num_runs": 100_000, "duration_s": 1e9}, "failures would have to be simulated"),
    ],
)
def test_simulations_out_of_range_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        simulate(Cluster(), Tiers(), POLICY, **asked)


def test_a_missing_simpy_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)

    with pytest.raises(InvalidInputError, match=r"pip install 'ckpt\[simulate\]'"):
        simulate(Cluster(), Tiers(), POLICY, num_runs=2)


def test_a_month_of_100000_ranks_is_affordable() -> None:
    """By the number of events, not by the clock: a failure costs the same whatever the size of the cluster."""
    cluster = dataclasses.replace(Cluster(), num_nodes=12_500)
    found = simulate(
        cluster, Tiers(), Policy(memory_every_s=30, store_every_s=7200, group_size=10, parity=2), num_runs=2
    )

    assert found.num_failures > 2000
    assert found.costs.protect_bytes_per_node > 0 and found.goodput.value > 0.8
