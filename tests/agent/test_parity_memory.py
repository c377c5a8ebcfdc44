"""The memory that parity lies in is given back as images are, and looking at what lies there harms nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt.agent import blob, segments
from ckpt.agent.identity import Identity, memory_folder, parity_folder, places
from ckpt.agent.inventory import Card
from ckpt.agent.log import AgentLog
from ckpt.agent.member import Member
from ckpt.agent.memo import Memo, MemoFile
from ckpt.agent.process import Agent
from ckpt.agent.segments import Segment
from ckpt.agent.slots import Slots
from ckpt.agent.spawn import arguments, start_or_adopt
from ckpt.config import Options
from tests.agent.conftest import ROOT, kill_and_wait, names_in_memory, until
from tests.agent.group import SECRET

STUCK = """
import json, sys, time, uuid
from ckpt.agent import process
from ckpt.agent.identity import Identity
from ckpt.agent.member import Member
from ckpt.config import Options

class Stuck:
    def start(self, agent):
        pass

    def stop(self, deadline):
        time.sleep(60)

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
identity = Identity(run_id=uuid.UUID(given["--run-id"]), rank=int(given["--rank"]), world=int(given["--world"]))
process.run(identity, Options(**json.loads(given["--options"])), plugins=[Member(), Stuck()])
"""


def join(identity: Identity, options: Options) -> Any:
    """A trainer of an agent that has reserved memory for images and for parity."""
    client = start_or_adopt(identity, options)
    address = client.call("listen", {"secret": SECRET, "host": "127.0.0.1", "port": 0})[0]["address"]
    client.reserve(4096)
    params = {"rank": identity.rank, "world": identity.world, "members": [0, 1], "parity": 1, "parity_bytes": 4096}
    client.call("join", {**params, "addresses": {"0": address, "1": address}})
    assert len(segments.listing(parity_folder(options))) == 2
    return client


def test_an_agent_that_is_cut_off_at_its_end_gives_its_parity_back(options: Options, identity: Identity) -> None:
    options = dataclasses.replace(options, agent_stop_grace_s=0.3)
    agent = subprocess.Popen([sys.executable, "-c", STUCK, *arguments(identity, options)], cwd=ROOT)
    until(lambda: places(identity, options).socket.exists())
    client = join(identity, options)
    os.kill(agent.pid, signal.SIGTERM)
    code = agent.wait(20)
    client.close()
    assert (code, names_in_memory(options), segments.listing(parity_folder(options))) == (1, [], [])


def test_the_command_line_removes_parity_that_a_dead_agent_left(options: Options, identity: Identity) -> None:
    client = join(identity, options)
    kill_and_wait(client.agent["pid"])
    client.close()
    environment = {
        "CKPT_AGENT_RUNTIME_FOLDER": options.agent_runtime_folder,
        "CKPT_AGENT_MEMORY_FOLDER": options.agent_memory_folder,
    }
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", "agent", "stop", "--all", "--yes", "--json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["leftovers_removed"]) == 4
    assert segments.listing(memory_folder(options)) + segments.listing(parity_folder(options)) == []


def test_a_look_at_what_is_held_passes_over_what_is_begun_meanwhile(
    options: Options, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the checksum is taken, the trainer gets the segment for its next image: neither an error nor a loss of that."""
    slots = Slots(memory_folder(options), identity, options)
    server: Any = SimpleNamespace(handlers={"abandon": None}, open_methods=set())
    where = places(identity, options)
    member, log = Member(), AgentLog(where.log)
    member.start(
        Agent(
            identity=identity, options=options, places=where, server=server, admission=None, slots=slots, log=log,  # type: ignore[arg-type]
            memo=MemoFile(where.state, Memo()), on_loss=[],
        )
    )  # fmt: skip
    try:
        slots.reserve(4096)
        for step in (1, 2):
            segment = slots.begin(step=step, attempt="a", epoch=0, world=1)
            card = Card(
                rank=0, world=1, step=step, attempt="a", image_bytes=10, blob_bytes=10, crc32c=0, members=(0,), parity=0
            )
            record = blob.pack_record(card.fields())
            segment.payload()[10 : 10 + len(record)] = record
            slots.seal(segment.name, segment.header.generation, 10 + len(record), None)
            slots.protect(segment.name, segment.header.generation)
        real = Segment.is_whole.fget
        assert real is not None

        def overtaken(self: Segment) -> bool:
            if self.header.step == 1:
                slots.begin(step=3, attempt="a", epoch=0, world=1)
                return False
            return bool(real(self))

        monkeypatch.setattr(Segment, "is_whole", property(overtaken))
        assert [card["step"] for card in member.call("inventory", {})["blobs"]] == [2]
        assert sorted(header.step for header in slots.headers()) == [2, 3]
    finally:
        member.stop(0.0)
        slots.close()
