"""Single faults of a real job, each at the moment that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.drill.job import Job, wait_for
from tests.drill.trainer import EVERY

WAIT_S = 90.0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, 3, parity=1)
    try:
        yield made
    finally:
        made.close()


def heard(job: Job, told: list[dict[str, Any]], condition: Callable[[], bool], what: str) -> None:
    """Listen to the trainers until it is so."""

    def look() -> bool:
        told.extend(job.news())
        return condition()

    wait_for(look, WAIT_S, lambda: f"{what}\n{job.texts()}")


def durable(told: list[dict[str, Any]], *, tier: str, after: int = -1) -> set[int]:
    """Ranks that were told of a durable step after that one."""
    return {one["rank"] for one in told if one["event"] == "durable" and one["tier"] == tier and one["step"] > after}


def newest(told: list[dict[str, Any]]) -> int:
    return max((one["step"] for one in told if one["event"] == "began"), default=-1)


def hear_durable(job: Job, told: list[dict[str, Any]], tier: str) -> None:
    """Listen until all ranks were told of a durable step that has not begun yet."""
    after = newest(told)
    heard(job, told, lambda: len(durable(told, tier=tier, after=after)) == len(job.nodes), f"nothing new in the {tier}")


def end(job: Job, told: list[dict[str, Any]]) -> None:
    job.stop()
    heard(
        job, told, lambda: len([one for one in told if one["event"] == "closed"]) == len(job.nodes), "it does not end"
    )
    wait_for(lambda: not any(node.agent_pids() for node in job.nodes), WAIT_S, lambda: f"agents stay\n{job.texts()}")
    assert [path.name for node in job.nodes for path in node.memory.rglob("*.seg")] == []


@pytest.mark.parametrize("rank", [0, 2])
def test_an_agent_that_dies_is_replaced_and_protection_goes_on(job: Job, rank: int) -> None:
    told: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, told, lambda: len(durable(told, tier="memory")) == 3, "nothing was protected")
    for _ in range(2):
        job.nodes[rank].kill_agent()
        hear_durable(job, told, "memory")
    hear_durable(job, told, "store")
    end(job, told)


def test_all_agents_that_die_at_once_are_replaced(job: Job) -> None:
    told: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, told, lambda: len(durable(told, tier="memory")) == 3, "nothing was protected")
    for node in job.nodes:
        node.kill_agent()
    hear_durable(job, told, "memory")
    end(job, told)


def test_ranks_that_plan_anew_while_an_agent_is_gone_save_all_the_same(job: Job) -> None:
    """A save that fails makes all ranks plan anew, and reserve memory again: with no agent, they go on without."""
    told: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, told, lambda: len(durable(told, tier="store")) == 3, "nothing was stored")
    with job.store_away():
        heard(job, told, lambda: any(one["event"] in ("failed", "refused") for one in told), "no save has failed")
        job.nodes[1].kill_agent()
        hear_durable(job, told, "memory")
    hear_durable(job, told, "store")
    assert [one for one in told if one["event"] == "refused" and "agent" in one["error"]] == []
    end(job, told)


def test_a_flush_that_waits_for_a_lost_node_holds_up_neither_snapshots_nor_the_store(job: Job) -> None:
    """Rank 0's agent waits for the receipt of a node that is gone, for two minutes; the next life of the job must not."""
    told: list[dict[str, Any]] = []
    patient = {"commit_timeout_s": dict.fromkeys(range(3), "120")}
    job.start(step_s=0.004, write_bytes_per_s_max={2: "2000"}, chunk_bytes={2: "4096"}, **patient)
    heard(job, told, lambda: newest(told) >= EVERY + 8, "no save to the store began")
    job.kill_trainers()
    job.nodes[2].lose()
    told.extend(job.news())
    life: list[dict[str, Any]] = []
    job.start(step_s=0.004, **patient)
    heard(job, life, lambda: len([one for one in life if one["event"] == "restored"]) == 3, "not restored")
    step = next(one["step"] for one in life if one["event"] == "restored")
    heard(job, life, lambda: len(durable(life, tier="memory", after=step)) == 3, "snapshots are held up")
    heard(job, life, lambda: len(durable(life, tier="store", after=step)) == 3, "the store is held up")
    end(job, life)


def test_a_job_comes_back_when_all_its_agents_have_died_too(job: Job) -> None:
    """What they knew, the newest epoch among it, is in their folders; what they held is in memory."""
    told: list[dict[str, Any]] = []
    for _ in range(2):
        told.clear()
        job.start(step_s=0.004)
        hear_durable(job, told, "memory")
        job.kill_trainers()
    for node in job.nodes:
        node.kill_agent()
    told.extend(job.news())
    newest_kept = max(one["step"] for one in told if one["event"] == "durable")
    life: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, life, lambda: len([one for one in life if one["event"] == "restored"]) == 3, "not restored")
    assert {(one["tier"], one["step"] >= newest_kept) for one in life if one["event"] == "restored"} == {
        ("memory", True)
    }
    end(job, life)


def test_a_rank_without_an_agent_saves_beside_those_that_have_one(job: Job) -> None:
    """Rank 0's agent commits what rank 1 has written itself."""
    told: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, told, lambda: len(durable(told, tier="store")) == 3, "nothing was stored")
    for _ in range(3):
        job.nodes[1].kill_agent()
        hear_durable(job, told, "store")
    aborted = [one["error"] for one in told if one["event"] in ("failed", "refused") and "structure" in one["error"]]
    assert aborted == []
    end(job, told)


def test_memory_brings_a_job_back_while_the_store_is_away(job: Job) -> None:
    told: list[dict[str, Any]] = []
    job.start(step_s=0.004)
    heard(job, told, lambda: len(durable(told, tier="memory")) == 3, "nothing was protected")
    job.kill_trainers()
    told.extend(job.news())
    life: list[dict[str, Any]] = []
    with job.store_away():
        job.start(step_s=0.004)
        heard(job, life, lambda: len([one for one in life if one["event"] == "restored"]) == 3, "not restored")
    found = {
        (one["tier"], one["step"] >= min(one["step"] for one in told if one["event"] == "durable")) for one in life[:3]
    }
    assert found == {("memory", True)}
    end(job, life)
