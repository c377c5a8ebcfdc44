"""Other parts add methods to an agent, and one that does not finish does not keep it from ending. The log stays bounded."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt.agent.identity import Identity, places
from ckpt.agent.log import AgentLog, tail
from ckpt.agent.spawn import arguments, start_or_adopt
from ckpt.config import Options
from ckpt.errors import AgentError, DamagedError
from tests.agent.conftest import ROOT, kill_and_wait, names_in_memory, until

AGENT = """
import json, sys, time, uuid
from ckpt.agent import process
from ckpt.agent.identity import Identity
from ckpt.config import Options
from ckpt.errors import DamagedError

class Part:
    def start(self, agent):
        self.agent = agent
        agent.server.handlers["sum"] = self.sum
        agent.server.handlers["fail"] = self.fail
        agent.server.handlers["bug"] = lambda call: 1 / 0

    def sum(self, call):
        newest = self.agent.slots.newest()
        with self.agent.slots.pinned(call.text("name"), newest.generation) as segment, segment.image() as image:
            return {"sum": sum(image), "seconds_left": call.deadline - time.monotonic()}

    def fail(self, call):
        raise DamagedError("a block is wrong", kind="bad-block", hints=("look",))

    def stop(self, deadline):
        time.sleep(float(sys.argv[1]))

given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
identity = Identity(run_id=uuid.UUID(given["--run-id"]), rank=int(given["--rank"]), world=int(given["--world"]))
process.run(identity, Options(**json.loads(given["--options"])), plugins=[Part()])
"""


def start_agent(identity: Identity, options: Options, stop_s: float) -> subprocess.Popen[bytes]:
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(stop_s), *arguments(identity, options)], cwd=ROOT)
    until(lambda: places(identity, options).socket.exists())
    return agent


def test_a_part_answers_from_the_memory_and_its_errors_reach_the_trainer(options: Options, identity: Identity) -> None:
    agent = start_agent(identity, options, 0.0)
    client = start_or_adopt(identity, options)
    mapped = {one.name: one for one in client.reserve(4096)}
    began = client.begin(1, "a")
    mapped[began.name].memory[:3] = bytes([1, 2, 3])
    client.seal(began, 100)
    answer, _ = client.call("sum", {"name": began.name}, timeout_s=7)
    with pytest.raises(DamagedError) as failed:
        client.call("fail")
    with pytest.raises(AgentError) as bug:
        client.call("bug")
    still = client.ping()
    client.bye()

    assert agent.wait(20) == 0
    assert answer["sum"] == 6 and 0 < answer["seconds_left"] <= 7
    assert (failed.value.kind, failed.value.hints) == ("bad-block", ("look",))
    assert bug.value.kind == "bug" and "ZeroDivisionError" in bug.value.message and still > 0
    assert any("ZeroDivisionError" in line for line in tail(places(identity, options).log, 20))


def test_a_part_that_does_not_finish_costs_the_grace_and_leaves_nothing(options: Options, identity: Identity) -> None:
    options = dataclasses.replace(options, agent_stop_grace_s=0.3)
    agent = start_agent(identity, options, 60.0)
    client = start_or_adopt(identity, options)
    client.reserve(4096)
    os.kill(agent.pid, signal.SIGTERM)
    code = agent.wait(20)
    client.close()

    assert code == 1
    assert names_in_memory(options) == []
    assert json.loads(tail(places(identity, options).log, 1)[0])["reason"] == "did not finish within the grace"


def test_the_log_keeps_its_last_two_parts_and_whole_lines(tmp_path: Path) -> None:
    log = AgentLog(tmp_path / "log", part_bytes=1000)
    for number in range(100):
        log.tell("counted", number=number)
    log.tell("large", text="x" * 100_000)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    numbers = [json.loads(line).get("number") for line in (tmp_path / "log.1").read_text().splitlines()]
    assert len(sizes) == 2 and max(sizes) <= 1000
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert json.loads(tail(tmp_path / "log", 1)[0])["left_out"] == ["text"]


BROKEN = AGENT.replace("    def start(self, agent):", "    def start(self, agent):\n        raise OSError(5, 'broken')")


def test_an_agent_that_fails_as_it_starts_leaves_what_it_took_over_to_the_next(
    options: Options, identity: Identity
) -> None:
    client = start_or_adopt(identity, options, epoch=7)
    mapped = {one.name: one for one in client.reserve(4096)}
    began = client.begin(1, "a")
    mapped[began.name].memory[:3] = bytes([1, 2, 3])
    client.seal(began, 100)
    kill_and_wait(client.agent["pid"])
    client.close()
    broken = [sys.executable, "-c", BROKEN, "0", *arguments(identity, options)]
    assert subprocess.run(broken, cwd=ROOT, capture_output=True, timeout=60).returncode == 1
    with pytest.raises(AgentError, match="epoch 7 was here"):
        start_or_adopt(identity, options, epoch=6)
    after = start_or_adopt(identity, options, epoch=7)
    held = {one.step: one.state for one in after.segments()}
    after.bye()
    until(lambda: names_in_memory(options) == [])
    assert held[1] == "SEALED"


def test_an_agent_whose_starter_has_died_meanwhile_serves_the_next(options: Options, identity: Identity) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    command = [sys.executable, "-m", "ckpt.agent", "--ready-fd", str(write_fd), *arguments(identity, options)]
    agent = subprocess.Popen(
        command, cwd=ROOT, pass_fds=(write_fd,), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    os.close(write_fd)
    until(lambda: places(identity, options).socket.exists())
    time.sleep(0.5)  # it has said that it is ready
    client = start_or_adopt(identity, options)
    pid = client.agent["pid"]
    client.bye()
    assert (agent.wait(20), pid) == (0, agent.pid)
