"""Take nodes away from a training job, more and more at a time, and see that it goes on as if nothing had happened.

In: `--out FOLDER`, `--quick`, `--loopback`. Out: a timeline on stdout; logs, checkpoints and `report.json` in the folder.
Exit code 0: it came back each time, from the tier and the step that it should, with the losses of an undisturbed run in every
bit; 1: it did not, and the message says what. `make demo-recovery` runs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: the root of the repository

from examples.recovery.cluster import END_S, Cluster, Node, is_alive, wait_until
from examples.recovery.network import make_network
from examples.recovery.train import undisturbed

STORE_EVERY, MEMORY_EVERY, PARITY = 20, 2, 2
BACK_S = 300.0  # the longest that the job may be away
AHEAD = 10  # steps from the last one that was done to the end
PRODUCTS = ("logs", "run", "report.json", "last-step")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a fault must lead to."""

    tier: str  # memory, store, or nothing at the first start
    num_lost: int  # ranks whose memory is gone; for the store any number
    world: int  # ranks afterwards


@dataclass(kw_only=True)
class Row:
    """One line of the timeline."""

    at_s: float
    event: str
    reached: int  # last step before
    kept: int  # newest step that all ranks had reported safe, in memory or store
    stored: int  # the same, in the store
    restored: dict[str, Any] | None = None
    world: int = 0
    away_s: float = 0.0  # from the fault to the next step
    problems: list[str] = field(default_factory=list)


class DemoError(Exception):
    """The demo did not get to where it should."""


class Story:
    """The faults, one after the other, and what came of them."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        self._cluster, self._out = cluster, out
        self._start_s = time.time()
        self._events: list[dict[str, Any]] = []
        self._read: dict[Path, int] = {}  # bytes of a log that are in `_events`
        self.rows: list[Row] = []

    def events(self) -> list[dict[str, Any]]:
        """What all ranks told, by time."""
        for path in sorted((self._out / "logs").glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                fresh = file.read().splitlines(keepends=True)
            for text in fresh:
                if text.endswith(b"\n"):
                    self._read[path] = self._read.get(path, 0) + len(text)
                    self._events.append(json.loads(text))
        self._events.sort(key=lambda one: float(one["time"]))
        return list(self._events)

    def begin(self, num_nodes: int, *, failpoints: dict[int, str]) -> list[Node]:
        """The first start."""
        nodes: list[Node] = []

        def act() -> None:
            nodes.extend(self._cluster.add(failpoint=failpoints.get(number, "")) for number in range(num_nodes))

        self.fault(f"start on {num_nodes} nodes", act, Expected(tier="nothing", num_lost=0, world=num_nodes))
        return nodes

    def fault(self, text: str, act: Callable[[], object], expected: Expected) -> None:
        """Do it, and wait until the job trains again with as many ranks as it should."""
        before = self.events()
        row = Row(at_s=time.time() - self._start_s, event=text, reached=_reached(before), **_safe(before))
        self.rows.append(row)
        since = time.time()
        act()
        acted = time.time()

        def back() -> bool:
            for node in self._cluster.nodes.values():
                if node.torchrun.poll() is not None:
                    raise DemoError(f"torchrun of {node.name} ended with {node.torchrun.returncode}")
            now = [one for one in self.events() if one["time"] > acted]
            restored = [one for one in now if one["event"] == "restored" and one["rank"] == 0]
            row.world = int(restored[-1]["world"]) if restored else 0
            return row.world == expected.world and any(
                one["event"] == "step" and one["time"] > restored[-1]["time"] for one in now
            )

        try:
            wait_until(back, BACK_S, f"after `{text}` the job is not back")
        except TimeoutError as error:
            row.problems.append(str(error))
            raise DemoError(str(error)) from error
        now = [one for one in self.events() if one["time"] > acted]
        first = next(one for one in now if one["event"] == "restored" and one["rank"] == 0)
        row.restored = first["restored"]
        row.away_s = next(one["time"] for one in now if one["event"] == "step" and one["time"] > first["time"]) - since
        row.problems += judge(row, expected)
        print(line(row), flush=True)

    def reach(self, steps: int) -> None:
        """Let so many more steps pass, the last of them begun just now."""
        target = _reached(self.events()) + steps
        wait_until(lambda: _reached(self.events()) >= target, BACK_S, f"step {target}")

    def until_agent_dies(self, node: Node) -> None:
        """By its failpoint, in the middle of what it does."""
        wait_until(lambda: bool(node.agents()), BACK_S, f"{node.name} has no agent")
        agents = node.agents()
        wait_until(lambda: not any(map(is_alive, agents)), BACK_S, f"the agent of {node.name} lives on")

    def end(self) -> int:
        """Let the job come to its end by itself; its last step."""
        nodes = list(self._cluster.nodes.values())
        last = max(self.losses(), default=0) + AHEAD  # also past what was done before the job fell back
        new = self._out / "last-step.new"
        new.write_text(str(last))
        new.rename(self._out / "last-step")
        wait_until(lambda: all(node.torchrun.poll() is not None for node in nodes), BACK_S, "the job does not end")
        codes = [node.torchrun.returncode for node in nodes]
        if any(codes):
            raise DemoError(f"torchrun ended with {codes}")
        # An agent that was told that the job is over lets the others hear of the last votes first.
        wait_until(
            lambda: not any(path for node in nodes for path in node.memory.rglob("*.seg")),
            END_S,
            "shared memory is left",
        )
        return last

    def losses(self) -> dict[int, list[float]]:
        """By step, as often as it was done."""
        found: dict[int, list[float]] = {}
        for one in self.events():
            if one["event"] == "step" and one["rank"] == 0:
                found.setdefault(one["step"], []).append(one["loss"])
        return found


def _reached(events: list[dict[str, Any]]) -> int:
    """The step that rank 0 did last."""
    steps = [one["step"] for one in events if one["event"] == "step" and one["rank"] == 0]
    return int(steps[-1]) if steps else 0


def _safe(events: list[dict[str, Any]]) -> dict[str, int]:
    """The newest steps that rank 0 reported as kept, by it and so by all: since the last start, or restored then."""
    last = max((n for n, one in enumerate(events) if one["event"] == "restored" and one["rank"] == 0), default=0)
    kept = [one for one in events[last:] if one["event"] == "kept" and one["rank"] == 0]
    restored = (events[last].get("restored") or {}).get("step", 0) if events else 0
    stored = [one["step"] for one in events if one["event"] == "kept" and one["tier"] == "store"]
    return {"kept": max([restored, *(one["step"] for one in kept)]), "stored": max(stored, default=0)}


def judge(row: Row, expected: Expected) -> list[str]:
    """What is not as it should be."""
    restored, problems = row.restored, []
    tier = "nothing" if restored is None else str(restored["tier"])
    if restored is not None and (tier, expected.tier) == ("store", "memory") and restored["step"] > row.kept:
        return problems  # a save that ended between the agent's death and that of its node: newer than what memory had
    if tier != expected.tier:
        problems.append(f"expected to come back from {expected.tier}, found {tier}")
    if restored is not None and tier == expected.tier == "memory":
        if len(restored["lost_ranks"]) != expected.num_lost:
            problems.append(f"expected {expected.num_lost} lost ranks, found {restored['lost_ranks']}")
        if restored["step"] < row.kept:
            problems.append(f"step {row.kept} was safe, came back from step {restored['step']}")
    if restored is not None and tier == expected.tier == "store" and restored["step"] < row.stored:
        problems.append(f"step {row.stored} was stored, came back from step {restored['step']}")
    return problems


HEAD = f"{'time':>7}  {'event':<62} {'at step':>7}  {'back from':<16} {'lost':<10} {'load':>7} {'away':>7}  ranks"


def line(row: Row) -> str:
    """One line of the timeline."""
    if row.restored is None:
        source, lost, load = "-", "-", "-"
    else:
        source = f"step {row.restored['step']}, {row.restored['tier']}"
        lost = ",".join(map(str, row.restored["lost_ranks"])) or (
            "-" if row.restored["tier"] == "memory" else "too many"
        )
        load = f"{row.restored['seconds']:.2f} s"
    wrong = "".join(f"  WRONG: {problem}" for problem in row.problems)
    return (
        f"{row.at_s:5.1f} s  {row.event:<62} {row.reached:>7}  {source:<16} {lost:<10} {load:>7} {row.away_s:5.1f} s  "
        f"{row.world}{wrong}"
    )


def tell(story: Story, *, quick: bool) -> None:
    """All faults. Nodes that will be lost in the middle of something carry a failpoint that ends their agent there."""
    cluster = story._cluster  # noqa: SLF001
    first = story.begin(4, failpoints={})
    story.reach(7)
    story.fault(
        "a trainer is killed in a step",
        lambda: cluster.kill_trainer(first[1]),
        Expected(tier="memory", num_lost=0, world=4),
    )
    story.reach(5)
    story.fault(
        "a node is lost: link, trainer, agent and memory; not replaced",
        lambda: cluster.lose([first[2]]),
        Expected(tier="memory", num_lost=1, world=3),
    )
    if quick:
        return
    story.reach(5)
    encoding: list[Node] = []
    story.fault(
        "a fresh node joins",
        lambda: encoding.append(cluster.add(failpoint="agent.in-parity:kill@8")),
        Expected(tier="memory", num_lost=0, world=4),
    )
    story.until_agent_dies(encoding[0])
    flushing: list[Node] = []

    def lose_two() -> None:
        cluster.lose([encoding[0], first[1]])
        flushing.append(cluster.add(failpoint="agent.in-flush:kill@2"))
        cluster.add()

    story.fault(
        "two nodes at once, in the middle of an encode; replaced",
        lose_two,
        Expected(tier="memory", num_lost=2, world=4),
    )
    story.until_agent_dies(flushing[0])

    def lose_three() -> None:
        others = [node for node in cluster.nodes.values() if node not in (flushing[0], first[0])]
        cluster.lose([flushing[0], *others[:2]])
        cluster.add()
        cluster.add()

    story.fault(
        "three at once, one more than parity, in the middle of a flush",
        lose_three,
        Expected(tier="store", num_lost=3, world=3),
    )


def main() -> int:
    """Run it all; the exit code."""
    given = _parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # so that its nodes end with it
    out: Path = given.out.resolve()
    _clear(out)
    start_s = time.monotonic()
    network, what = make_network(loopback=given.loopback)
    print(f"nodes: {what}\n{HEAD}", flush=True)
    arguments = {
        "--checkpoints": out / "run", "--last": out / "last-step", "--every": STORE_EVERY, "--memory-every": MEMORY_EVERY,
        "--parity": PARITY, "--pause": 0.05,
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    cluster: Cluster | None = None
    try:
        cluster = Cluster(network, out, words)
        story = Story(cluster, out)
        tell(story, quick=given.quick)
        steps = story.end()
        problems = [f"{row.event}: {problem}" for row in story.rows for problem in row.problems]
        problems += compare(story.losses(), undisturbed(steps))
        _write(story, out / "report.json", what, problems)
    except (DemoError, TimeoutError) as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left", file=sys.stderr)
        return 130
    finally:
        if cluster is not None:
            cluster.close()
        network.close()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"logs: {out / 'logs'}", file=sys.stderr)
        return 1
    done = sum(map(len, story.losses().values()))
    print(
        f"{steps} steps, {done - steps} of them done again: all losses equal those of an undisturbed run in every bit;"
        f" {time.monotonic() - start_s:.0f} s in all"
    )
    return 0


def compare(found: dict[int, list[float]], expected: dict[int, float]) -> list[str]:
    """Where losses differ from those of the undisturbed run, or are missing."""
    missing = sorted(set(expected) - set(found))
    problems = [f"steps {missing} were never done"] if missing else []
    for step, losses in sorted(found.items()):
        problems += [
            f"loss of step {step}: expected {expected.get(step)}, found {x}" for x in losses if x != expected.get(step)
        ]
    return problems


def _write(story: Story, path: Path, nodes: str, problems: list[str]) -> None:
    rows = [
        {
            "at_s": row.at_s, "event": row.event, "reached": row.reached, "safe": row.kept, "stored": row.stored,
            "restored": row.restored, "ranks": row.world, "away_s": row.away_s,
        }
        for row in story.rows
    ]  # fmt: skip
    path.write_text(json.dumps({"nodes": nodes, "problems": problems, "timeline": rows}, indent=1) + "\n")


def _clear(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in PRODUCTS:
        entry = out / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out/recovery"), help="folder for everything it makes")
    parser.add_argument("--quick", action="store_true", help="the first faults only, for the tests")
    parser.add_argument("--loopback", action="store_true", help="no network namespaces")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
