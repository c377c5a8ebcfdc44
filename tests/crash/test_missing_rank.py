"""A rank that is gone, or does nothing, while the others wait for it in a collective of ckpt's own.

Goal: the others raise RankFailedError within a stated time; none hangs. Method: rank 1 of two real ranks is killed, or sleeps for
longer than the exchange may take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.crash.left_behind import check_run
from tests.workers.crashing import EXCHANGE_TIMEOUT_S, SHORT_EXCHANGE_TIMEOUT_S
from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

_SLACK_S = 10.0  # on a machine that is busy


def _outcomes(function: str, *args: Any) -> list[dict[str, Any]]:
    with RankGroup(2) as group:
        group.start(f"tests.workers.crashing:{function}", *args)
        return group.outcomes(EXCHANGE_TIMEOUT_S + _SLACK_S)


def _check_missing(outcome: dict[str, Any], within_s: float) -> None:
    told = outcome["value"]
    assert (told["error"], told["kind"]) == ("RankFailedError", "rank-missing"), told
    assert "waited for the other ranks" in told["message"] and "hint:" in told["message"]
    assert told["seconds"] < within_s + _SLACK_S, told


@pytest.mark.parametrize("with_group", [False, True], ids=["making-the-group", "exchanging"])
def test_killed_before_its_first_save(with_group: bool, tmp_path: Path) -> None:
    survivor, victim = _outcomes("die_before_first_save", str(tmp_path / "run"), with_group)
    assert victim == {"died": -9}
    _check_missing(survivor, SHORT_EXCHANGE_TIMEOUT_S)
    assert not list((tmp_path / "run").rglob("manifest.json"))


@pytest.mark.parametrize("with_group", [False, True], ids=["making-the-group", "exchanging"])
def test_silent_before_its_first_save(with_group: bool, tmp_path: Path) -> None:
    waiting, late = _outcomes("stop_before_first_save", str(tmp_path / "run"), with_group)
    _check_missing(waiting, SHORT_EXCHANGE_TIMEOUT_S)
    assert late["value"]["error"] == "RankFailedError", late  # it comes too late, and is told so
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_killed_in_a_load(tmp_path: Path) -> None:
    survivor, victim = _outcomes("die_in_load", str(tmp_path / "run"))
    assert victim == {"died": -9}
    _check_missing(survivor, EXCHANGE_TIMEOUT_S)
    check_run(str(tmp_path / "run"), [1])
