"""Goal: whatever is lost, a job goes on from the newest step that is left somewhere, with exactly the state of that step.

Method: ranks of real processes, each a node of its own; they train to a step and stay there; trainers, agents and shared memory
are taken away; a new job restores. Its state is compared, bit for bit, with what the first one had at the step that it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ckpt.agent.header import HEADER_BYTES
from ckpt.agent.segments import peek
from ckpt.commit import find
from ckpt.config import Options
from ckpt.store.open import open_store
from tests.agent.conftest import until
from tests.agent.nodes import Cluster, Node, cluster
from tests.workers.rank_group import RankGroup
from tests.workers.recovering import Job, undisturbed

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(240)]

REACHED_S = 90.0  # the ranks start their agents first
OPTIONS = Options(
    agent_reserve_bytes=0,
    agent_begin_timeout_s=30.0,  # a busy machine must not cost a snapshot that a test counts on
    agent_lease_s=60.0,
    agent_heartbeat_s=0.5,
    agent_stop_grace_s=3.0,
    commit_timeout_s=60.0,
    outcome_grace_s=5.0,
    peer_connect_s=3.0,
)


class Scene:
    """One run, start after start. Keeps the digests and losses of each step as first seen."""

    def __init__(self, nodes: Cluster, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self.url = str(folder / "run")

    def job(self, nodes: Sequence[Node], stop: int, **changes: Any) -> Job:
        told = tuple(node.environment for node in nodes)
        values = {"url": self.url, "folder": str(self.folder), "nodes": told, "stop": stop, "options": OPTIONS}
        return Job(**{**values, **changes})

    def train_and_kill(self, nodes: Sequence[Node], stop: int, **changes: Any) -> None:
        """To step `stop`; then SIGKILL to all trainers."""
        self._train_until(lambda: self.at(len(nodes)) >= stop, nodes, stop, **changes)

    def train_until_agent_dies(self, nodes: Sequence[Node], victim: Node, *, stop: int, **changes: Any) -> None:
        """By its failpoint; then SIGKILL to all trainers.

        Args:
            stop: no snapshot after the one it dies at, or its trainer starts another agent, which protects more.
        """
        alive = set[int]()

        def is_dead() -> bool:
            now = set(victim.agents)
            alive.update(now)
            return bool(alive) and not now

        self._train_until(is_dead, nodes, stop, **changes)

    def _train_until(self, condition: Callable[[], bool], nodes: Sequence[Node], stop: int, **changes: Any) -> None:
        with RankGroup(len(nodes)) as ranks:
            ranks.start("tests.workers.recovering:train", self.job(nodes, stop, hang=True, **changes))
            until(condition, timeout_s=REACHED_S)
            kill(ranks)

    def at(self, world: int) -> int:
        """The step that all ranks have reached."""
        paths = [self.folder / f"rank-{rank}-of-{world}.json" for rank in range(world)]
        return min((json.loads(path.read_text())["step"] if path.exists() else 0) for path in paths)

    def restore(self, nodes: Sequence[Node], stop: int, **changes: Any) -> dict[str, Any]:
        """Another start: what its rank 0 restored, once all ranks are found to have the very state of that step."""
        expected = self.told("digest")
        with RankGroup(len(nodes)) as ranks:
            found = ranks.call("tests.workers.recovering:train", self.job(nodes, stop, **changes), timeout_s=REACHED_S)
        restored: dict[str, Any] = found[0]["restored"]
        wanted = expected[restored["step"]]
        assert [one["digest"] for one in found] == [wanted] * len(nodes)
        assert [one["restored"]["step"] for one in found] == [restored["step"]] * len(nodes)
        self.losses = found[0]["losses"]
        return restored

    def told(self, name: str) -> dict[int, Any]:
        """By step, what rank 0 said of it last."""
        found = {int(path.stem.removeprefix("state-")): path for path in self.folder.glob("state-*.json")}
        return {step: json.loads(path.read_text())[name] for step, path in found.items()}


def kill(ranks: RankGroup) -> None:
    for process in ranks.processes:
        process.kill()
    for process in ranks.processes:
        process.join()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with cluster() as nodes:
        yield Scene(nodes, tmp_path)


def what(restored: dict[str, Any]) -> tuple[str, int, tuple[int, ...]]:
    return restored["tier"], restored["step"], tuple(restored["lost_ranks"])


def test_killed_trainers_come_back_from_their_own_agents(scene: Scene) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 7)
    restored = scene.restore(nodes, 12)
    assert what(restored) == ("memory", 6, ())
    assert restored["decoded_nbytes"] == 0
    assert scene.losses == {step: loss for step, loss in undisturbed(12).items() if step > 6}


@pytest.mark.parametrize("lost", [(0,), (1,), (2,)])
def test_lost_node_is_decoded_when_it_is_replaced(scene: Scene, lost: tuple[int, ...]) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 5)
    for place in lost:
        nodes[place].lose()
        nodes[place] = scene.nodes.add()
    assert what(scene.restore(nodes, 8)) == ("memory", 4, lost)


def test_two_lost_nodes_are_decoded_with_two_parities(scene: Scene) -> None:
    nodes = [scene.nodes.add() for _ in range(4)]
    scene.train_and_kill(nodes, 5, parity=2)
    for place in (0, 2):
        nodes[place].lose()
        nodes[place] = scene.nodes.add()
    restored = scene.restore(nodes, 8, parity=2)
    assert what(restored) == ("memory", 4, (0, 2))
    assert restored["decoded_nbytes"] > 0
    assert scene.losses == {step: loss for step, loss in undisturbed(8).items() if step > 4}


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_job_goes_on_with_the_nodes_that_are_left(scene: Scene, layout: str) -> None:
    nodes = [scene.nodes.add() for _ in range(4)]
    scene.train_and_kill(nodes, 5, layout=layout)
    nodes.pop(1).lose()
    assert what(scene.restore(nodes, 8, layout=layout)) == ("memory", 4, (1,))
    expected = {step: loss for step, loss in undisturbed(8).items() if step > 4}
    assert scene.losses == (expected if layout == "replicated" else pytest.approx(expected, rel=1e-4))


def test_ranks_may_come_back_in_another_order_and_with_one_node_more(scene: Scene) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 5)
    restored = scene.restore([nodes[2], scene.nodes.add(), nodes[0], nodes[1]], 8)
    assert (what(restored), restored["decoded_nbytes"]) == (("memory", 4, ()), 0)
    assert scene.losses == {step: loss for step, loss in undisturbed(8).items() if step > 4}


def test_fewer_ranks_than_parity_needs_go_on_with_less_parity(scene: Scene) -> None:
    nodes = [scene.nodes.add() for _ in range(4)]
    scene.train_and_kill(nodes, 5, parity=2)
    for place in (3, 0):
        nodes.pop(place).lose()
    assert what(scene.restore(nodes, 7, parity=2)) == ("memory", 4, (0, 3))


def test_more_lost_than_parity_allows_come_back_from_the_store(scene: Scene) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 7, every=4)
    for place in (1, 2):
        nodes[place].lose()
        nodes[place] = scene.nodes.add()
    restored = scene.restore(nodes, 9, every=4)
    assert what(restored) == ("store", 4, ())
    assert restored["passed_over"][0] == "step 6 in memory: of ranks [1, 2] too little is left"
    assert scene.losses == {step: loss for step, loss in undisturbed(9).items() if step > 4}


@pytest.mark.parametrize("kind", ["image", "parity", "header"])
def test_flipped_bit_in_memory_counts_as_lost(scene: Scene, kind: str) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 5, every=4)
    for path in nodes[1].segments():
        if ("parity" in str(path.parent)) == (kind == "parity"):
            flip(path, 100 if kind == "header" else HEADER_BYTES + 20_000)  # among the tensors
    if kind == "parity":
        nodes[0].lose()
        nodes[0] = scene.nodes.add()
    restored = scene.restore(nodes, 6, every=4)
    assert what(restored) == {"image": ("memory", 4, (1,)), "header": ("memory", 4, ())}.get(kind, ("store", 4, ()))


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])  # all ranks meet the damage in the store, or one of them
def test_behind_a_damaged_checkpoint_an_older_snapshot_in_memory_comes_before_an_older_checkpoint(
    scene: Scene, layout: str
) -> None:
    nodes = [scene.nodes.add() for _ in range(3)]
    scene.train_and_kill(nodes, 6, every=3, layout=layout)
    images = sorted(Path(scene.url).glob("step-000000000006/*/*.safetensors"))
    flip(images[1], images[1].stat().st_size // 3)
    for node in nodes[1:]:  # of step 6 more is damaged than parity makes again
        for path in node.segments():
            if "parity" not in str(path.parent) and peek(path).step == 6:
                flip(path, HEADER_BYTES + 20_000)
    restored = scene.restore(nodes, 9, every=3, layout=layout)
    assert what(restored) == ("memory", 4, ())
    passed_over = list(dict.fromkeys(text.partition(":")[0] for text in restored["passed_over"]))
    assert passed_over == ["step 6 in memory", "step 6 on the store"]
    # Step 6 cannot be saved again: it is kept in memory, and the next step is stored.
    assert steps_in(scene.url) == [3, 6, 7, 9]


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("place", "victim", "steps"),
    [
        ("agent.before-parity", 1, {2}),
        ("agent.in-parity", 1, {2, 4}),  # 4 if the others had made their parity of it by then
        ("agent.before-vote", 1, {2, 4}),
        ("agent.before-vote", 0, {2, 4}),  # the one lost is who counts the votes
        ("agent.before-protected", 1, {4}),  # all have voted
    ],
)
def test_node_lost_in_the_middle_of_an_encode(scene: Scene, place: str, victim: int, steps: set[int]) -> None:
    nodes = [scene.nodes.add(failpoint=f"{place}:kill@2" if number == victim else "") for number in range(3)]
    scene.train_until_agent_dies(nodes, nodes[victim], stop=5)
    nodes[victim].lose()
    nodes[victim] = scene.nodes.add()
    tier, step, lost = what(scene.restore(nodes, 8))
    assert (tier, step in steps, lost) == ("memory", True, (victim,))
    assert scene.losses == {number: loss for number, loss in undisturbed(8).items() if number > step}


def test_agent_killed_in_an_encode_leaves_its_memory_to_the_next(scene: Scene) -> None:
    nodes = [scene.nodes.add(failpoint="agent.in-parity:kill@2" if number == 1 else "") for number in range(3)]
    scene.train_until_agent_dies(nodes, nodes[1], stop=5)
    nodes[1] = dataclasses.replace(nodes[1], failpoint="")
    assert what(scene.restore(nodes, 6)) == ("memory", 4, ())


@pytest.mark.parametrize(
    ("place", "victim", "stored"),
    [
        ("agent.in-flush", 1, 4),
        ("commit.before-receipt", 1, 4),
        ("commit.before-manifest", 0, 4),
        ("commit.after-manifest", 0, 8),
    ],
)
@pytest.mark.parametrize("num_lost", [1, 2])
def test_node_lost_in_the_middle_of_a_flush(scene: Scene, place: str, victim: int, stored: int, num_lost: int) -> None:
    nodes = [scene.nodes.add(failpoint=f"{place}:kill@2" if number == victim else "") for number in range(3)]
    scene.train_until_agent_dies(nodes, nodes[victim], stop=9, every=4)
    lost = sorted({victim, 2} if num_lost == 2 else {victim})
    for number in lost:
        nodes[number].lose()
        nodes[number] = scene.nodes.add()
    tier, step, _ = what(scene.restore(nodes, 13, every=4))  # and saves steps 8 and 12, if they are not there
    # The snapshot of step 8 was under way, too; and a trainer stores what its agent has not, while it lives.
    outcomes = {("store", 8)} | ({("memory", 6), ("memory", 8)} if num_lost == 1 else {("store", stored)})
    assert (tier, step) in outcomes and step >= stored
    assert scene.losses == {step_: loss for step_, loss in undisturbed(13).items() if step_ > step}
    assert steps_in(scene.url) == [4, 8, 12] if step < 8 or stored == 8 else steps_in(scene.url)[-1] == 12


def steps_in(url: str) -> list[int]:
    return find.steps(open_store(url, options=OPTIONS))
