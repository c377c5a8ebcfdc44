"""Stores that fail in the middle of a save: all ranks raise in bounded time, and the checkpoint before it is whole.

Goal: a full disk, missing permission, an unreachable server and lost answers are told as what they are, on every rank.
Method: two real ranks save step 1, then step 2 on a store that follows a script, or that the kernel or a server makes fail.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.crash.left_behind import check_run, save_again
from tests.servers import rclone_server
from tests.workers.crashing import COMMIT_TIMEOUT_S, OUTCOME_GRACE_S
from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

_SLACK_S = 10.0
_WAIT_S = 60.0

Told = dict[str, Any]


def _told(function: str, *args: Any, environment: dict[str, str] | None = None) -> list[Told]:
    with RankGroup(2, environment=environment) as group:
        told: list[Told] = group.call(f"tests.workers.crashing:{function}", *args, timeout_s=_WAIT_S)
    for one in told:
        assert one["seconds"] < COMMIT_TIMEOUT_S + OUTCOME_GRACE_S + _SLACK_S, one
    return told


def _errors(told: list[Told]) -> list[tuple[str, str]]:
    return [(one["error"], one["kind"]) for one in told]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_answer_lost_after_the_manifest_landed(mode: str, tmp_path: Path) -> None:
    """The committer reads back: the save is complete, on every rank."""
    url = str(tmp_path / "run")
    told = _told("scripted_second_save", url, {0: ("lost-response", ["create"])}, mode)
    assert _errors(told) == [("", ""), ("", "")], told
    check_run(url, [1, 2])


def test_manifest_that_may_be_on_its_way(tmp_path: Path) -> None:
    """Nobody is told that it failed, nobody that it is complete: it may still land."""
    url = str(tmp_path / "run")
    told = _told("scripted_second_save", url, {0: ("timeout", ["create"])}, "sync")
    assert _errors(told) == [("StoreError", "outcome-unknown"), ("RankFailedError", "outcome-unknown")], told
    check_run(url, [1])
    save_again(url, 2)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("word", "method"), [("full", "write"), ("denied", "open_writer"), ("full", "commit")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_refuses_one_rank(word: str, method: str, rank: int, mode: str, tmp_path: Path) -> None:
    """That rank says what the store said; the other one names that rank or the reason, without waiting for a deadline."""
    url = str(tmp_path / "run")
    told = _told("scripted_second_save", url, {rank: (word, [method])}, mode)
    errors = _errors(told)
    assert errors[rank] == ("StoreError", word), told
    assert errors[1 - rank][0] == "RankFailedError", told
    assert f"scripted fault: {word}" in told[1 - rank]["message"]
    if rank == 1:
        assert "rank 1" in told[0]["message"]
    check_run(url, [1])
    save_again(url, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_for_one_rank(rank: int, tmp_path: Path) -> None:
    """It cannot even tell the others: they find out at their deadline."""
    url = str(tmp_path / "run")
    script = ("timeout*1000", ["open_writer", "write", "commit", "put", "create"])
    told = _told("scripted_second_save", url, {rank: script}, "sync")
    errors = _errors(told)
    assert errors[rank] == ("StoreError", "unreachable"), told
    assert errors[1 - rank] == ("RankFailedError", "outcome-unknown" if rank == 0 else "rank-missing"), told
    if rank == 1:
        assert "no receipt for step 2 from rank 1" in told[0]["message"]
    check_run(url, [1])
    save_again(url, 2)


@pytest.mark.parametrize("method", ["exists", "open_writer", "write", "commit", "put"])
def test_a_hiccup_on_one_rank_costs_one_save(method: str, tmp_path: Path) -> None:
    """In steady state, at whatever call: the other rank hears of it at once, and the next save is saved."""
    url = str(tmp_path / "run")
    with RankGroup(2) as group:
        told = group.call("tests.workers.crashing:store_hiccup_in_steady_state", url, "timeout", [method])
    (other, third_of_0), (mine, third_of_1) = told
    assert (mine["error"], mine["kind"]) == ("StoreError", "unreachable"), told
    assert (other["error"], other["kind"]) == ("RankFailedError", "rank-failed"), told
    assert "rank 1" in other["message"] and "scripted fault" in other["message"]
    assert _errors([third_of_0, third_of_1]) == [("", ""), ("", "")], told
    check_run(url, [1, 3])


def test_disk_full_by_the_kernel(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    told = _told("file_too_large_on_rank_1", url)
    assert _errors(told) == [("RankFailedError", "rank-failed"), ("StoreError", "full")], told
    assert "rank 1" in told[0]["message"]
    check_run(url, [1])
    save_again(url, 2)


def test_permission_denied_by_the_kernel(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    told = _told("nobody_may_write", url)
    assert {one["error"] for one in told} <= {"StoreError", "RankFailedError"}, told
    assert ("StoreError", "denied") in _errors(told), told
    check_run(url, [1])


@pytest.mark.s3
def test_server_that_stops_answering(tmp_path: Path) -> None:
    """A server that accepts and says nothing, then comes back: requests end, and what was there is there."""
    (tmp_path / "server").mkdir()
    with rclone_server(tmp_path / "server") as server:
        url = server.url("run")
        with RankGroup(2, environment=server.environment) as group:
            first = group.call("tests.workers.crashing:save_one", url, 1, False)
            assert _errors(first) == [("", ""), ("", "")]
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                told = group.call("tests.workers.crashing:save_one", url, 2, True, timeout_s=90.0)
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
        assert {one["error"] for one in told} <= {"StoreError", "RankFailedError"}, told
        assert ("StoreError", "unreachable") in _errors(told), told
        assert max(one["seconds"] for one in told) < 60.0
        check_run(url, [1], server.storage_options)
        save_again(url, 2, server.storage_options)
