"""Agents of other versions either work with a job or refuse it, and no clock of a host matters to what is kept.

Method: agents whose protocol, or whose wall clock, is another one than here: started by a few lines that change it before all
else is imported. Groups of them protect a snapshot, and tell what they hold.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ckpt.agent.identity import PROTOCOL, Identity, places
from ckpt.agent.inventory import Card, Inventory, candidates
from ckpt.agent.local import connect
from ckpt.agent.spawn import arguments
from ckpt.config import Options
from ckpt.errors import VersionError
from tests.agent.conftest import ROOT, until
from tests.agent.group import Group, quick

OTHER_PROTOCOL = "import ckpt.agent.identity as identity; identity.PROTOCOL = ({}, {})"
OTHER_CLOCK = (
    "import time; real, real_ns = time.time, time.time_ns; time.time = lambda: real() + {0}; "
    "time.time_ns = lambda: real_ns() + {0} * 10**9"
)
DAY_S = 86400


@pytest.fixture
def start(folders: Options) -> Iterator[Callable[[Identity, str], None]]:
    """Start an agent that runs a line first, and wait until it listens."""
    made: list[subprocess.Popen[bytes]] = []

    def one(identity: Identity, line: str) -> None:
        script = f"{line}\nimport sys; from ckpt.agent.__main__ import main; sys.exit(main())"
        made.append(subprocess.Popen([sys.executable, "-c", script, *arguments(identity, folders)], cwd=ROOT))
        until(lambda: places(identity, folders).socket.exists())

    yield one
    for process in made:
        process.kill()
        process.wait()


def test_versions_that_are_one_minor_apart_work_together(
    folders: Options, start: Callable[[Identity, str], None]
) -> None:
    major, minor = PROTOCOL
    run = uuid.uuid4()
    start(Identity(run_id=run, rank=1, world=3), OTHER_PROTOCOL.format(major, minor + 1))
    with Group(quick(folders), [(0, 1, 2)], run_id=run) as group:
        for one in group.ranks:
            one.keep(5)
        assert group.until_decided(5) == ["protected"] * 3
        assert group.ranks[1].client.agent["protocol"] == [major, minor]


@pytest.mark.parametrize(("major", "minor"), [(PROTOCOL[0], PROTOCOL[1] + 2), (PROTOCOL[0] + 1, 0)])
def test_versions_that_are_further_apart_refuse_each_other_and_name_both(
    folders: Options, start: Callable[[Identity, str], None], identity: Identity, major: int, minor: int
) -> None:
    start(identity, OTHER_PROTOCOL.format(major, minor))
    where = places(identity, folders)
    with pytest.raises(VersionError, match=rf"{PROTOCOL[0]}\.{PROTOCOL[1]} and {major}\.{minor}") as raised:
        connect(where.socket, identity, folders)
    assert raised.value.kind == "other-protocol"
    assert raised.value.hints == ("end the agent of the other version: ckpt agent stop",)


def test_what_an_agent_that_knows_less_tells_is_understood() -> None:
    """Of the version before epochs stood in cards and choices in inventories."""
    card: dict[str, Any] = {
        "rank": 0, "world": 1, "step": 5, "attempt": "a-000001", "image_bytes": 1, "blob_bytes": 1, "crc32c": 0,
        "members": [0], "parity": 0,
    }  # fmt: skip
    found = Inventory.from_fields({"address": "x", "blobs": [card], "parities": []})
    assert (found.blobs[0].epoch, found.chosen) == (0, None)
    assert [one.step for one in candidates([found])] == [5]
    assert dataclasses.replace(Card.from_fields(card), epoch=3).fields()["epoch"] == 3


def test_clocks_that_are_days_apart_change_nothing(folders: Options, start: Callable[[Identity, str], None]) -> None:
    run = uuid.uuid4()
    for rank, days in ((0, -400), (1, 400)):
        start(Identity(run_id=run, rank=rank, world=3), OTHER_CLOCK.format(days * DAY_S))
    with Group(quick(folders), [(0, 1, 2)], run_id=run) as group:
        for step in (5, 6, 7):
            for one in group.ranks:
                one.keep(step)
            assert group.until_decided(step) == ["protected"] * 3
        for one in group.ranks[:2]:  # their successors have the right time
            one.kill()
            one.start()
        held = candidates([one.inventory() for one in group.ranks])
        assert [(one.step, one.recoverable, one.lost) for one in held] == [(7, True, ()), (6, True, ())]
