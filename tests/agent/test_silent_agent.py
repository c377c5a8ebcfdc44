"""An agent that does not answer, or dies over a save, costs snapshots: neither the training's time nor a save to the store.

Method: one rank with a real agent, in this process. The agent is stopped with SIGSTOP, or killed by its failpoint in the middle
of a save; the training must not wait for its answer, which never comes, and what is in memory and in the store afterwards is
read back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.agent import discover, own, segments, spawn
from ckpt.agent.identity import memory_folder, parity_folder
from ckpt.agent.owner import Owner
from ckpt.commit import find
from ckpt.config import Memory, Options
from ckpt.engine.pending import PendingSave
from ckpt.store.open import open_store
from tests.agent.conftest import until

pytestmark = pytest.mark.timeout(120)

BEGIN_S = 0.5
NEVER_S = 100.0  # for an answer of a stopped agent: who waits for it is seen by the test's timeout


@pytest.fixture
def folders(options: Options) -> Iterator[dict[str, Any]]:
    """Options of an agent with short deadlines; it ends with the test."""
    yield {
        "agent_runtime_folder": options.agent_runtime_folder,
        "agent_memory_folder": options.agent_memory_folder,
        "agent_reserve_bytes": 0,
        "agent_lease_s": 30.0,
        "agent_heartbeat_s": 0.2,
        "agent_stop_grace_s": 3.0,
        "agent_begin_timeout_s": BEGIN_S,
        "agent_call_timeout_s": 3.0,
        "agent_start_timeout_s": 20.0,
        "commit_timeout_s": 20.0,
    }
    for found in discover.agents(options):
        if found.status is None:  # stopped, or about to end
            for path in Path(options.agent_runtime_folder).glob("*/*.lock"):
                with contextlib.suppress(FileNotFoundError):  # it has ended
                    spawn.end(int(path.read_text() or "0"))
        else:
            discover.stop(found, options, force=True)
    for folder in (memory_folder(options), parity_folder(options)):  # of agents that were killed, here or by a test
        for left in segments.leftovers(folder):
            segments.remove(left)
    until(lambda: left_in_memory(options) == [])  # who was told that the job is over ends a moment later


def left_in_memory(options: Options) -> list[Path]:
    return [path for folder in (memory_folder(options), parity_folder(options)) for path in segments.listing(folder)]


@pytest.fixture
def make(folders: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., ckpt.Checkpointer]]:
    """Makes checkpointers of one run; those of a process that is to have died are left, not closed."""
    made: list[ckpt.Checkpointer] = []

    def one(*, every: int = 1000, **changes: Any) -> ckpt.Checkpointer:
        chosen = Options(**{**folders, **changes})
        made.append(ckpt.Checkpointer(tmp_path / "run", every=every, memory=Memory(every=1), options=chosen))
        return made[-1]

    yield one
    for checkpointer in made:
        checkpointer._run.leave()
        checkpointer._run.close(over=True)


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((300_000,), value), "b": torch.arange(7) * value}}


def pid_of(checkpointer: ckpt.Checkpointer) -> int:
    assert checkpointer._tier is not None and checkpointer._tier._client is not None
    return checkpointer._tier._client.agent_pid


def begun(checkpointer: ckpt.Checkpointer, step: int) -> PendingSave:
    pending = checkpointer.step(step, state(step))
    assert pending is not None
    return pending


def kept(checkpointer: ckpt.Checkpointer, step: int) -> bool:
    """Whether a snapshot of this step is protected in memory now."""
    pending = checkpointer.step(step, state(step))
    return pending is not None and not pending.skipped and pending.outcome(30.0) is None


def test_a_stopped_agent_does_not_hold_up_the_training(
    make: Callable[..., ckpt.Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    wait = own._Room.wait
    monkeypatch.setattr(own._Room, "wait", lambda room, seconds: (waits.append(seconds), wait(room, seconds))[1])
    checkpointer = make(agent_call_timeout_s=NEVER_S)
    checkpointer.prepare(state(0))
    assert kept(checkpointer, 1)
    pid = pid_of(checkpointer)
    os.kill(pid, signal.SIGSTOP)
    waits.clear()
    skipped = [begun(checkpointer, step).skipped for step in (2, 3, 4)]
    os.kill(pid, signal.SIGCONT)
    assert (skipped, checkpointer.skipped) == ([True] * 3, 3)
    assert waits == [BEGIN_S]  # once, and not again while the question is open
    steps = iter(range(5, 1000))
    until(lambda: kept(checkpointer, next(steps)))
    assert pid_of(checkpointer) == pid


def test_a_save_to_the_store_goes_on_without_a_stopped_agent(
    make: Callable[..., ckpt.Checkpointer], tmp_path: Path
) -> None:
    checkpointer = make(every=2, agent_call_timeout_s=NEVER_S)
    checkpointer.prepare(state(0))
    assert kept(checkpointer, 1)
    pid = pid_of(checkpointer)
    os.kill(pid, signal.SIGSTOP)
    saved = begun(checkpointer, 2).wait(40.0)
    os.kill(pid, signal.SIGCONT)
    assert saved.tier == "store"
    found = ckpt.open(tmp_path / "run", step=2)
    assert torch.equal(found["model/w"][:], state(2)["model"]["w"])


def test_an_agent_that_stays_silent_is_replaced_and_its_memory_taken_over(
    make: Callable[..., ckpt.Checkpointer],
) -> None:
    checkpointer = make()
    checkpointer.prepare(state(0))
    assert kept(checkpointer, 1)
    first = pid_of(checkpointer)
    os.kill(first, signal.SIGSTOP)
    steps = iter(range(2, 100_000))

    def again() -> bool:
        time.sleep(0.02)
        return kept(checkpointer, next(steps))

    until(again, timeout_s=60.0)
    assert pid_of(checkpointer) != first
    assert Owner.of(first) is None


def test_a_job_that_starts_beside_a_stopped_agent_restores_what_that_holds(
    make: Callable[..., ckpt.Checkpointer],
) -> None:
    before = make()
    before.prepare(state(0))
    assert kept(before, 5)
    first = pid_of(before)
    before._run.leave()
    before._run.close()
    os.kill(first, signal.SIGSTOP)
    after = make()
    target = state(0)
    assert after.restore(target) == 5
    assert after.restored is not None and after.restored.tier == "memory"
    assert torch.equal(target["model"]["w"], state(5)["model"]["w"])
    assert pid_of(after) != first


def test_a_job_with_a_stopped_agent_ends_and_leaves_nothing(
    make: Callable[..., ckpt.Checkpointer], options: Options
) -> None:
    checkpointer = make(agent_call_timeout_s=NEVER_S)
    checkpointer.prepare(state(0))
    assert kept(checkpointer, 1)
    os.kill(pid_of(checkpointer), signal.SIGSTOP)
    assert begun(checkpointer, 2).skipped
    checkpointer.close()
    assert left_in_memory(options) == []


@pytest.mark.parametrize(
    "place", ["agent.in-flush", "commit.before-receipt", "commit.after-receipt", "commit.before-manifest"]
)
def test_a_save_whose_agent_dies_is_stored_by_the_trainer(
    make: Callable[..., ckpt.Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", f"{place}:kill")
    checkpointer = make(every=2)
    monkeypatch.delenv("CKPT_FAILPOINT")  # of its agent alone
    checkpointer.prepare(state(0))
    first = pid_of(checkpointer)
    assert checkpointer.step(2, state(2)).wait(60.0).step == 2  # type: ignore[union-attr]
    assert Owner.of(first) is None
    assert find.steps(open_store(tmp_path / "run", options=Options())) == [2]
    found = ckpt.open(tmp_path / "run", step=2)
    assert torch.equal(found["model/w"][:], state(2)["model"]["w"])


def test_a_save_that_its_agent_has_published_before_it_died_counts(
    make: Callable[..., ckpt.Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "commit.after-manifest:kill")
    checkpointer = make(every=2)
    monkeypatch.delenv("CKPT_FAILPOINT")
    checkpointer.prepare(state(0))
    saved = checkpointer.step(2, state(2)).wait(60.0)  # type: ignore[union-attr]
    assert find.steps(open_store(tmp_path / "run", options=Options())) == [2]
    assert saved.step == 2


def test_a_save_whose_agent_stops_in_the_middle_is_stored_by_the_trainer(
    make: Callable[..., ckpt.Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent is ended first: it must not write to the same place when it wakes up."""
    monkeypatch.setenv("CKPT_FAILPOINT", "agent.in-flush:delay=5")
    checkpointer = make(every=2)
    monkeypatch.delenv("CKPT_FAILPOINT")
    checkpointer.prepare(state(0))
    pid = pid_of(checkpointer)
    pending = checkpointer.step(2, state(2))
    assert pending is not None
    run = tmp_path / "run"
    until(lambda: any(run.glob("step-*/*/*.safetensors")))
    os.kill(pid, signal.SIGSTOP)
    assert pending.wait(60.0).step == 2
    assert Owner.of(pid) is None
    found = ckpt.open(run, step=2)
    assert torch.equal(found["model/w"][:], state(2)["model"]["w"])
