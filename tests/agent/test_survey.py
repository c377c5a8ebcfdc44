"""Who looks at agents finds what is there while a trainer goes on, and disturbs nobody."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from ckpt.agent.identity import places
from ckpt.agent.inventory import candidates
from ckpt.agent.local import connect
from ckpt.agent.log import tail
from ckpt.agent.survey import survey
from ckpt.commit.complete import Request
from tests.agent.conftest import until
from tests.agent.snapshots import Cluster, Cut, Node

NBYTES = 8 << 20
STEPS = 40


def part(step: int) -> Cut:
    return Cut(image=bytes([step]) * NBYTES, receipt=b"receipt", request=Request(step=step), attempt=f"attempt-{step}")


def test_an_inventory_taken_while_a_trainer_saves_is_neither_an_error_nor_harm(tmp_path: Path) -> None:
    node = Node(0, str(tmp_path / "run"))
    try:
        node.mapped = {one.name: one for one in node.client.reserve(NBYTES + (1 << 20))}
        alone = {"rank": 0, "world": 1, "members": [0], "parity": 0, "addresses": {"0": node.address}}
        node.client.call("join", {**alone, "parity_bytes": 0})
        over, seen, errors = threading.Event(), set[int](), list[Exception]()

        def look() -> None:
            where = places(node.identity, node.options).socket
            client = connect(where, node.identity, node.options, role="observer")
            try:
                while not over.is_set():
                    seen.update(card["step"] for card in client.call("inventory")[0]["blobs"])
            except Exception as error:  # noqa: BLE001 - told by the thread that waits
                errors.append(error)
            finally:
                client.close()

        observers = [threading.Thread(target=look) for _ in range(2)]
        for one in observers:
            one.start()
        for step in range(STEPS):
            node.keep(part(step))
            until(lambda step=step: node.state_of(part(step)) == "protected")  # type: ignore[misc]
        over.set()
        for one in observers:
            one.join()
        last = node.client.segments()
        mapped = {one.name: one for one in node.client.attach()}
        held = {
            one.step: bool((np.frombuffer(mapped[one.name].memory, np.uint8)[:NBYTES] == one.step).all())
            for one in last
        }
        for one in (*mapped.values(), *node.mapped.values()):
            one.close()
        log = tail(places(node.identity, node.options).log, 500)
    finally:
        node.clean()
    assert errors == [] and not [line for line in log if '"damaged"' in line]
    assert held == {STEPS - 1: True, STEPS - 2: True} and len(seen) > 2


def test_a_survey_from_any_node_finds_the_agents_of_all(tmp_path: Path) -> None:
    with Cluster(str(tmp_path / "run"), ((0, 1), (2, 3)), 1) as cluster:
        cluster.join(1 << 20)
        small = Cut(image=b"x" * 5000, receipt=b"r", request=Request(step=3), attempt="a")
        cluster.keep([small] * 4)
        cluster.leave()
        found = [survey(node.identity.run_id, node.options) for node in cluster.nodes]
    addresses = [node.address for node in cluster.nodes]
    assert [[one.address for one in each.agents] for each in found] == [addresses] * 4
    assert [[one.found is not None for one in each.agents] for each in found] == [
        [here == rank for rank in range(4)] for here in range(4)
    ]
    assert all([(one.step, one.held) for one in candidates(each.inventories)] == [(3, (0, 1, 2, 3))] for each in found)
