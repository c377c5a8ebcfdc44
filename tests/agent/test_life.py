"""An agent outlives its trainer, and the next agent takes over what a dead one held. Real processes, real SIGKILL."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckpt.agent import discover
from ckpt.agent.identity import Identity, memory_folder, places
from ckpt.agent.local import Client, connect
from ckpt.agent.owner import Owner
from ckpt.agent.spawn import start, start_or_adopt
from ckpt.config import Options
from ckpt.errors import AgentError, AlreadyExistsError, BudgetError, InvalidInputError, VersionError
from tests.agent.conftest import Trainer, kill_and_wait, names_in_memory, until
from tests.workers.agent_trainer import CHUNKS

IMAGE_BYTES = 256 * 1024
Make = Callable[[], Trainer]


def test_a_trainer_killed_while_it_writes_costs_only_that_image_at_every_chunk(trainer: Make) -> None:
    kept = []
    for chunks in range(CHUNKS + 1):
        one = trainer()
        one.start(epoch=chunks)
        one.do("reserve", image_bytes=IMAGE_BYTES)
        one.do("save", step=10 * chunks, nbytes=IMAGE_BYTES)
        one.do("begin", step=10 * chunks + 1)
        one.do("write", step=10 * chunks + 1, nbytes=IMAGE_BYTES, chunks=chunks)
        one.kill()
        after = trainer()
        after.start(epoch=chunks)
        kept.append(after.do("images"))
        after.kill()
    assert kept == [{str(10 * chunks): True} for chunks in range(CHUNKS + 1)]


@pytest.mark.parametrize("trainer_too", [False, True])
def test_the_next_agent_takes_over_what_a_killed_one_held(
    trainer: Make, options: Options, identity: Identity, trainer_too: bool
) -> None:
    one = trainer()
    agent = one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    one.do("save", step=5, nbytes=IMAGE_BYTES)
    before = names_in_memory(options)
    kill_and_wait(agent["pid"])
    if trainer_too:
        one.kill()
        one = trainer()

    again = one.start()

    assert again["pid"] != agent["pid"] and again["incarnation"] > agent["incarnation"]
    assert one.do("images") == {"5": True}
    assert names_in_memory(options) == before
    assert one.do("reserve", image_bytes=IMAGE_BYTES) and names_in_memory(options) == before  # used again
    one.do("bye")
    until(lambda: names_in_memory(options) == [])


def test_an_image_that_was_changed_while_no_agent_lived_is_given_up(trainer: Make, options: Options) -> None:
    one = trainer()
    agent = one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    sealed = one.do("save", step=5, nbytes=IMAGE_BYTES)
    kill_and_wait(agent["pid"])
    with open(memory_folder(options) / sealed["name"], "r+b") as file:
        file.seek(64 * 1024 + 1000)
        file.write(b"?")

    one.start()

    assert one.do("images") == {}


def test_the_job_being_over_ends_the_agent_and_leaves_no_socket_and_no_memory(
    trainer: Make, options: Options, identity: Identity
) -> None:
    one = trainer()
    agent = one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    one.do("bye")
    until(lambda: Owner.of(agent["pid"]) is None)

    where = places(identity, options)
    assert sorted(path.name for path in where.folder.iterdir()) == ["00001.err", "00001.log"]
    assert not memory_folder(options).exists()


def test_an_agent_without_a_trainer_ends_when_its_lease_is_over(trainer: Make, options: Options) -> None:
    one = trainer()
    one.options = dataclasses.replace(options, agent_lease_s=1.0)
    agent = one.start()
    time.sleep(1.5)
    assert Owner.of(agent["pid"]) is not None, "it has a trainer"
    one.kill()
    until(lambda: Owner.of(agent["pid"]) is None)


def test_what_a_dead_agent_of_another_run_left_goes_when_its_lease_is_over(trainer: Make, options: Options) -> None:
    one = trainer()
    agent = one.start(run_id=uuid.uuid4().hex)
    one.do("reserve", image_bytes=IMAGE_BYTES)
    left = names_in_memory(options)
    kill_and_wait(agent["pid"])

    one.start(run_id=uuid.uuid4().hex)
    one.do("reserve", image_bytes=IMAGE_BYTES)
    kept = names_in_memory(options)
    one.do("bye")
    one.options = dataclasses.replace(options, agent_lease_s=0.2)
    time.sleep(0.3)
    one.start(run_id=uuid.uuid4().hex)

    assert set(left) < set(kept)
    assert not set(left) & set(names_in_memory(options))


def test_sigterm_ends_the_agent_and_gives_everything_back(trainer: Make, options: Options) -> None:
    one = trainer()
    agent = one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    os.kill(agent["pid"], signal.SIGTERM)
    until(lambda: Owner.of(agent["pid"]) is None)
    assert names_in_memory(options) == []


def test_a_second_agent_of_a_rank_is_refused_with_the_pid_of_the_first(
    trainer: Make, options: Options, identity: Identity
) -> None:
    agent = trainer().start()
    with pytest.raises(AlreadyExistsError, match=f"pid {agent['pid']}") as refused:
        start(identity, options, places(identity, options), deadline=time.monotonic() + 60)
    assert refused.value.kind == "agent-runs"


def test_a_second_agent_with_another_runtime_folder_is_refused_too(
    trainer: Make, options: Options, identity: Identity, tmp_path: Path
) -> None:
    one = trainer()
    agent = one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    other = dataclasses.replace(options, agent_runtime_folder=str(tmp_path))
    with pytest.raises(AlreadyExistsError, match=f"pid {agent['pid']}"):
        start(identity, other, places(identity, other), deadline=time.monotonic() + 60)


def test_those_that_start_one_agent_at_once_all_get_the_same(options: Options, identity: Identity) -> None:
    def ask(_: int) -> Client:
        return start_or_adopt(identity, options)  # all of one process: the last to say hello is the trainer

    with ThreadPoolExecutor(4) as pool:
        clients = list(pool.map(ask, range(4)))
    pids = {client.agent["pid"] for client in clients}
    for client in clients:
        client.close()
    for found in discover.agents(options):
        discover.stop(found, options, force=True)
    assert len(pids) == 1


def test_the_agent_has_no_torch_and_nothing_of_its_trainer(
    trainer: Make, options: Options, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    read_fd, write_fd = os.pipe()
    os.set_inheritable(write_fd, True)
    client = start_or_adopt(identity, options)
    os.close(write_fd)
    pid = client.agent["pid"]
    held = os.read(read_fd, 1)  # at its end at once: nobody else has the other end
    os.close(read_fd)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    maps = Path(f"/proc/{pid}/maps").read_text()

    assert held == b""
    assert b"MASTER_ADDR" not in environment and "torch" not in maps
    assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid) and os.getsid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    client.bye()
    until(lambda: Owner.of(pid) is None)


def test_an_agent_that_does_not_come_up_is_told_with_what_it_said(options: Options, identity: Identity) -> None:
    wrong = dataclasses.replace(options, agent_cpus="no cpus")
    with pytest.raises(InvalidInputError, match="agent_cpus"):
        start_or_adopt(identity, wrong)


def test_an_agent_that_dies_at_its_start_is_told_with_its_last_lines(
    options: Options, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('psutil is broken here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(AgentError, match="psutil is broken here") as refused:
        start_or_adopt(identity, options)
    assert refused.value.kind == "not-started"


def test_memory_that_is_not_there_is_refused_with_all_figures(
    trainer: Make, options: Options, identity: Identity
) -> None:
    client = start_or_adopt(identity, options)
    with pytest.raises(BudgetError, match=r"needed 2,\d\d\d,\d\d\d,\d\d\d,\d\d\d,\d\d\d.*host.*control group.*free in"):
        client.reserve(10**15, timeout_s=20)
    assert names_in_memory(options) == []
    client.bye()


def test_trainers_that_are_not_meant_are_refused(trainer: Make, options: Options, identity: Identity) -> None:
    one = trainer()
    one.start(epoch=3)
    where = places(identity, options).socket

    def refusal(who: Identity, epoch: int) -> str:
        try:
            connect(where, who, options, epoch=epoch).close()
        except AgentError as error:
            return error.kind
        return "welcome"

    found = {
        "another run": refusal(dataclasses.replace(identity, run_id=uuid.uuid4()), 3),
        "another rank": refusal(dataclasses.replace(identity, rank=0), 3),
        "a lower epoch": refusal(identity, 2),
        "another world, same epoch": refusal(dataclasses.replace(identity, world=8), 3),
        "while the first lives": refusal(identity, 4),
    }
    one.do("close")
    found["after the first left"] = refusal(dataclasses.replace(identity, world=8), 4)
    found["the epoch before"] = refusal(identity, 3)

    assert found == {
        "another run": "other-run",
        "another rank": "other-rank",
        "a lower epoch": "stale-epoch",
        "another world, same epoch": "other-world",
        "while the first lives": "held",
        "after the first left": "welcome",
        "the epoch before": "stale-epoch",
    }


def test_a_lower_epoch_is_refused_by_the_next_agent_as_well(trainer: Make) -> None:
    one = trainer()
    kill_and_wait(one.start(epoch=7)["pid"])
    assert one.start(epoch=6)["kind"] == "stale-epoch"
    assert one.start(epoch=7)["epoch"] == 7


@pytest.mark.parametrize(("major", "minor", "welcome"), [(1, 0, True), (1, 1, True), (1, 2, False), (2, 0, False)])
def test_versions_mix_when_the_major_number_is_the_same_and_the_minor_at_most_one_apart(
    trainer: Make,
    options: Options,
    identity: Identity,
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    minor: int,
    welcome: bool,
) -> None:
    trainer().start()
    monkeypatch.setattr("ckpt.agent.local.PROTOCOL", (major, minor))
    try:
        client = connect(places(identity, options).socket, identity, options, role="observer")
        spoken = client.agent["protocol"]
        client.close()
    except VersionError as error:
        spoken = error.kind
    assert spoken == ([1, 0] if welcome else "other-protocol")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_where_the_folders_let_him_in(
    trainer: Make, options: Options, identity: Identity
) -> None:
    trainer().start()
    where = places(identity, options)
    for path, mode in ((where.folder.parent, 0o755), (where.folder, 0o755), (where.socket, 0o666)):
        path.chmod(mode)
    script = (
        "import os, socket, sys, json; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(s.recv(4096)[8:].decode())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(where.socket)], capture_output=True, text=True, check=True)
    for path in (where.folder.parent, where.folder):
        path.chmod(0o700)
    assert '"kind":"other-user"' in done.stdout


def test_an_observer_may_look_but_not_touch(trainer: Make, options: Options, identity: Identity) -> None:
    one = trainer()
    one.start()
    client = connect(places(identity, options).socket, identity, options, role="observer")
    assert client.status()["trainer_pid"] == one.process.pid
    with pytest.raises(AgentError) as refused:
        client.reserve(IMAGE_BYTES)
    with pytest.raises(InvalidInputError) as kept:
        client.stop()
    client.close()
    assert (refused.value.kind, kept.value.kind) == ("observer", "trainer-there")


def test_a_stopped_agent_costs_a_timeout_and_no_hang(options: Options, identity: Identity) -> None:
    client = start_or_adopt(identity, options)
    pid = client.agent["pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(AgentError) as late:
        client.call("ping", timeout_s=0.5)
    with pytest.raises(AgentError) as closed:
        client.ping()
    os.kill(pid, signal.SIGCONT)
    again = start_or_adopt(identity, options)
    again.bye()
    until(lambda: Owner.of(pid) is None)
    assert (late.value.kind, closed.value.kind) == ("timeout", "agent-gone")


def test_a_forked_child_neither_speaks_for_the_trainer_nor_keeps_it_alive(
    trainer: Make, options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    one = trainer()
    one.start()
    one.do("reserve", image_bytes=IMAGE_BYTES)
    one.do("begin", step=1)
    child = int(one.do("fork"))
    until(lambda: "forked" in capfd.readouterr().err)
    os.kill(one.process.pid, signal.SIGKILL)
    until(lambda: discover.agents(options)[0].status["trainer_pid"] is None)
    states = {segment["state"] for segment in discover.agents(options)[0].status["segments"]}
    os.kill(child, signal.SIGKILL)
    assert states == {"EMPTY"}


def test_methods_that_are_not_there_end_the_connection_with_a_reason(
    trainer: Make, options: Options, identity: Identity
) -> None:
    client = start_or_adopt(identity, options)
    with pytest.raises(AgentError) as unknown:
        client.call("fly")
    with pytest.raises(AgentError) as closed:
        client.ping()
    assert (unknown.value.kind, closed.value.kind) == ("unknown-method", "agent-gone")
    start_or_adopt(identity, options).bye()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_hundred_lives_leave_no_memory_no_descriptor_and_no_process(options: Options) -> None:
    run_id = uuid.uuid4()
    fds_before = len(os.listdir("/proc/self/fd"))

    def live(rank: int) -> list[str]:
        """Fifty agents of one rank, one after the other: killed, or ended; each finds what the killed one before held."""
        who, wrong, held = Identity(run_id=run_id, rank=rank, world=4), [], -1
        for life in range(50):
            client = start_or_adopt(who, options)
            steps = [one.step for one in client.segments() if one.state == "SEALED"]
            if (max(steps) if steps else -1) != held:
                wrong.append(f"life {life}: expected step {held}, found {steps}")
            for mapped in client.reserve(4096):
                mapped.close()
            client.seal(client.begin(life, "a" * 16), 4096)
            pid, held = client.agent["pid"], life
            if life % 5 == 4:
                client.bye()
                held = -1
                until(lambda pid=pid: Owner.of(pid) is None)
            else:
                client.close()
                kill_and_wait(pid)
            if len(names_of(rank)) > 2:
                wrong.append(f"life {life}: {names_of(rank)}")
        return wrong

    def names_of(rank: int) -> list[str]:
        return [name for name in names_in_memory(options) if f"-{rank:05d}-" in name]

    with ThreadPoolExecutor(4) as pool:
        wrong = [text for texts in pool.map(live, range(4)) for text in texts]
    assert wrong == []
    assert names_in_memory(options) == []
    assert len(os.listdir("/proc/self/fd")) == fds_before
