"""A schedule of faults, by a seed, and what must hold after each recovery.

In: a job, a seed, seconds. Out: a count of what was done, or AssertionError with what happened. Two things are known at each
recovery: which steps the trainers were told are durable, and what the faults have destroyed since. What comes back must be, bit
for bit, what follows from the step that the report names; and that step is not older than the newest durable one that is left.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.drill.job import Job, flip, wait_for

RECOVER_S = 120.0  # from the start of the trainers until all have restored; then until a snapshot is protected
HUGE = str(1 << 50)


@dataclass(kw_only=True)
class Kept:
    """A step that was reported durable in memory."""

    step: int
    hurt: set[int] = field(default_factory=set)  # ranks whose part is gone since, or damaged


class Ledger:
    """What is known to be durable."""

    def __init__(self, parity: int) -> None:
        self._parity = parity
        self.kept: list[Kept] = []
        self.stored = -1
        self._hurt: set[int] = set()  # in this life

    def hear(self, news: list[dict[str, Any]]) -> None:
        """What trainers told in this life of theirs."""
        for one in news:
            if one["event"] == "durable" and one["tier"] == "store":
                self.stored = max(self.stored, one["step"])
            elif one["event"] == "durable" and all(kept.step != one["step"] for kept in self.kept):
                self.kept.append(Kept(step=one["step"], hurt=set(self._hurt)))

    def hurt(self, rank: int) -> None:
        """What this rank has is gone, of all snapshots that there are: those of which we hear later, too."""
        self._hurt.add(rank)
        for kept in self.kept:
            kept.hurt.add(rank)

    def floor(self, *, store: bool) -> int:
        """The newest durable step that is left, -1 for none."""
        whole = [kept.step for kept in self.kept if len(kept.hurt) <= self._parity]
        return max([-1, *whole, *([self.stored] if store else [])])

    def restored(self, step: int | None, tier: str | None) -> None:
        """The job goes on from here. What it gave up does not count any more."""
        hurt = set(self._hurt).union(*(kept.hurt for kept in self.kept))
        self.kept = [Kept(step=step, hurt=hurt)] if step is not None and tier == "memory" else []
        self._hurt = set()


class Drill:
    """One job under faults."""

    def __init__(self, job: Job, seed: int, tell: Callable[[str], None] = lambda _: None) -> None:
        self.job, self.rng, self.tell = job, Random(seed), tell
        self.ledger = Ledger(job.parity)
        self.done: Counter[str] = Counter()
        self._history: list[str] = []
        self._life: list[dict[str, Any]] = []  # what the trainers told in this life

    def run(self, seconds: float) -> None:
        """Faults and recoveries for so long; then the job ends as it should, and leaves nothing."""
        ends_at = time.monotonic() + seconds
        try:
            self._recover()
            while time.monotonic() < ends_at:
                self._disturb()
                self._strike()
                self._recover()
            self._end()
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self._history[-30:], self.job.texts()])) from error

    def note(self, text: str) -> None:
        self._history.append(f"{time.time():.3f} {text}")
        self.tell(text)

    # while it trains

    def _disturb(self) -> None:
        """Nothing, or something that the job must live with."""
        self._train(self.rng.uniform(0.1, 0.6))
        kinds = [
            self._nothing,
            self._lose_agent,
            self._stop_agent,
            self._cut_links,
            self._slow_links,
            self._spoil_links,
        ]
        act = self.rng.choice([*kinds, self._hide_store])
        self.done[act.__name__.strip("_")] += 1
        self.note(f"life {self.job.lives}: {act.__name__.strip('_').replace('_', ' ')}")
        act()
        self._train(self.rng.uniform(0.0, 0.5))

    def _nothing(self) -> None:
        pass

    def _lose_agent(self) -> None:
        """The trainer goes on; another agent takes over what lies in memory, and protects again."""
        self._pick().kill_agent()
        if self.rng.random() < 0.6:
            before = max((one["step"] for one in self._life if one["event"] == "began"), default=-1)
            self._await_protected(before)

    def _stop_agent(self) -> None:
        node = self._pick()
        node.kill_agent(signal.SIGSTOP)
        self._train(self.rng.uniform(0.1, 2.0))
        node.kill_agent(signal.SIGCONT)

    def _cut_links(self) -> None:
        for node in self.rng.sample(self.job.nodes, self.rng.randint(1, len(self.job.nodes))):
            node.link.arm(cut_at=self.rng.randrange(1, 100_000))
        self._train(self.rng.uniform(0.1, 1.5))
        self._mend_links()

    def _slow_links(self) -> None:
        node = self._pick()
        if self.rng.random() < 0.5:
            node.link.arm(stop_at=self.rng.randrange(1, 100_000))
        else:
            node.link.arm(bytes_per_s=self.rng.randrange(20_000, 500_000))
        self._train(self.rng.uniform(0.1, 1.5))
        self._mend_links()

    def _spoil_links(self) -> None:
        self._pick().link.arm(flip_at=self.rng.randrange(1, 200_000))
        self._train(self.rng.uniform(0.1, 0.5))
        self._mend_links()

    def _hide_store(self) -> None:
        with self.job.store_away():
            self._train(self.rng.uniform(0.1, 1.5))

    def _mend_links(self) -> None:
        for node in self.job.nodes:
            node.link.arm()
            node.link.hang_up()

    # what ends its life

    def _strike(self) -> None:
        """Kill something, the rest of the trainers with it, as torchrun would, and perhaps damage what is left."""
        nodes, rng = self.job.nodes, self.rng
        lost = rng.sample(nodes, rng.choices([0, 1, 2, len(nodes)], [6, 6, 2, 1])[0])
        agents = rng.sample(nodes, rng.choices([0, 1, 2], [6, 3, 1])[0])
        first = self._pick()
        first.kill_trainer()
        time.sleep(rng.choice([0.0, 0.0, 0.02, 0.3]))
        for node in lost:
            node.lose()
        for node in agents:
            node.kill_agent()
        self.job.kill_trainers()
        self._hear()
        for node in lost:
            self.ledger.hurt(node.rank)
        flipped = self._flip_bits() if rng.random() < 0.3 else []
        names = [[node.rank for node in some] for some in ([first], lost, agents)]
        self.note(
            f"killed trainer {names[0]}, lost nodes {names[1]}, killed agents {names[2]}, flipped bits of {flipped}"
        )
        self.done["lost nodes"] += len(lost)
        self.done["flipped"] += len(flipped)

    def _flip_bits(self) -> list[int]:
        out = []
        for node in self.rng.sample(self.job.nodes, self.rng.choice([1, 1, 2])):
            held = node.held()
            for path, header in self.rng.sample(held, min(len(held), self.rng.randint(1, 2))):
                flip(path, header, self.rng.randrange(1 << 30), self.rng.randrange(8))
                self.ledger.hurt(node.rank)
                out.append(node.rank)
        return sorted(out)

    # what must hold

    def _recover(self) -> None:
        rng, limits = self.rng, {}
        if rng.random() < 0.15:
            self.note("the store is slow")
            self.done["slow store"] += 1
            limits["write_bytes_per_s_max"] = {node.rank: "50000" for node in self.job.nodes}
            limits["chunk_bytes"] = {node.rank: "4096" for node in self.job.nodes}
        if self.job.lives and rng.random() < 0.1:
            self._start_without_memory()
        if self.job.lives and rng.random() < 0.1 and self.ledger.floor(store=False) >= 0:
            self.note("the store is away during the recovery")
            self.done["recovered without store"] += 1
            with self.job.store_away():
                self._start(store=False, limits=limits)
        else:
            self._start(store=True, limits=limits)

    def _start(self, *, store: bool, limits: dict[str, dict[int, str]]) -> None:
        floor = self.ledger.floor(store=store)
        self._life = []
        self.job.start(step_s=self.rng.choice([0.001, 0.004, 0.01]), **limits)
        self._await(lambda: self._all("restored"), "not all ranks have restored")
        told = [one for one in self._life if one["event"] == "restored"]
        found = {(one["step"], one["tier"]) for one in told}
        assert len(found) == 1, f"ranks restored different steps: {found}"
        assert [one["wrong"] for one in told if one["wrong"]] == [], f"step {told[0]['step']} came back wrong: {told}"
        step, tier = found.pop()
        self.note(f"life {self.job.lives}: restored step {step} from {tier}, expected at least {floor}")
        assert (-1 if step is None else step) >= floor, (
            f"restored step {step}, {floor} was durable: {told[0]['passed_over']}"
        )
        self.done[f"from {tier}"] += 1
        self.ledger.restored(step, tier)
        self._hear()
        if store:
            self._await_protected(-1 if step is None else step)

    def _start_without_memory(self) -> None:
        """A node comes back with too little memory: every rank ends with an error that says so, and nothing is lost."""
        node = self._pick()
        node.lose()
        self.ledger.hurt(node.rank)
        self.note(f"node {node.rank} comes back without memory")
        self.done["without memory"] += 1
        self._life = []
        self.job.start(step_s=0.001, agent_reserve_bytes={node.rank: HUGE})
        self._await(lambda: self._all("ended"), "not all ranks have ended for want of memory", may_end=True)
        ended = {one["rank"]: one for one in self._life if one["event"] == "ended"}
        assert ended[node.rank]["error"].startswith("BudgetError"), ended
        others = [one["error"] for rank, one in ended.items() if rank != node.rank]
        assert all(error.startswith("RankFailedError") and "memory" in error for error in others), ended
        self.job.kill_trainers()
        restored = [one for one in self._life if one["event"] == "restored"]
        assert restored == [], restored
        node.kill_agent()  # its options were those of a node with no memory

    def _await_protected(self, after: int) -> None:
        """The job protects new snapshots: in time, on every rank."""

        def protected() -> bool:
            steps = {one["rank"] for one in self._life if one["event"] == "durable" and one["step"] > after}
            return len(steps) == len(self.job.nodes)

        self._await(protected, f"no snapshot after step {after} is protected on every rank")

    def _end(self) -> None:
        self.job.stop()
        self._await(lambda: self._all("closed"), "the job does not end")
        for node in self.job.nodes:
            wait_for(lambda node=node: not node.agent_pids(), 60.0, lambda node=node: f"the agent of {node.name} stays")
            left = [path.name for path in node.memory.rglob("*.seg")]
            assert left == [], f"{node.name} leaves {left}"

    # waiting

    def _train(self, seconds: float) -> None:
        time.sleep(seconds)
        self._hear()

    def _hear(self) -> None:
        news = self.job.news()
        self._life += news
        self.ledger.hear(news)

    def _all(self, event: str) -> bool:
        return len({one["rank"] for one in self._life if one["event"] == event}) == len(self.job.nodes)

    def _await(self, condition: Callable[[], bool], why: str, *, may_end: bool = False) -> None:
        deadline = time.monotonic() + RECOVER_S
        while True:
            self._hear()
            if condition():
                return
            ended = [one for one in self._life if one["event"] == "ended"]
            assert may_end or not ended, f"a trainer ended: {ended}"
            assert time.monotonic() < deadline, f"{why} within {RECOVER_S:.0f} s"
            time.sleep(0.01)

    def _pick(self) -> Any:
        return self.rng.choice(self.job.nodes)
