"""SIGKILL of one rank or of all ranks at every failpoint that a save reaches, on POSIX and on two kinds of S3 servers.

Goal: the last complete checkpoint loads bit-exactly, a partial one is never listed, gc removes it and only it, the survivors
hear of it within a stated time, and the step can be saved again. Method: two real ranks save step 1 and die in step 2; the test
process looks at what is left. The cases of a batch run side by side, because most of their time is waiting for deadlines.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckpt import failpoints
from tests.crash.left_behind import StorageOptions, check_run, save_again
from tests.servers import S3Server
from tests.workers.crashing import COMMIT_TIMEOUT_S, OUTCOME_GRACE_S
from tests.workers.rank_group import RankGroup

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

_AT_ONCE = 8  # cases
_SLACK_S = 15.0  # on top of the deadlines, on a machine that is busy
_SURVIVOR_S = COMMIT_TIMEOUT_S + OUTCOME_GRACE_S + _SLACK_S  # within this, a survivor knows
_CASE_S = 60.0  # within this, all is over

# What each failpoint is reached by. `commit.after-claim` is reached only without conditional writes.
_EVERY_RANK = (
    "save.before-image",
    "save.in-image@1",
    "save.in-image@2",
    "save.before-image-commit",
    "commit.before-receipt",
    "commit.after-receipt",
)
_COMMITTER = (
    "commit.receipts-complete",
    "save.before-index@1",
    "save.before-index@2",
    "save.before-index@3",
    "commit.after-claim",
    "commit.before-manifest",
    "commit.after-manifest",
    "commit.before-abort",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    store: str  # posix, moto, rclone
    mode: str  # steady: the session of step 1 goes on; sync, async: a new one, that talks first
    point: str  # with @count
    victims: tuple[int, ...]

    @property
    def id(self) -> str:
        who = "all" if len(self.victims) == 2 else f"rank{self.victims[0]}"
        return f"{self.store}-{self.mode}-{self.point}-{who}"

    @property
    def failpoint_of(self) -> dict[int, str]:
        """Per rank the text of CKPT_FAILPOINT."""
        if self.point == "commit.before-abort":  # a committer that has failed, and dies before it can say so
            return {0: "save.before-image-commit:error,commit.before-abort:kill"}
        name, _, count = self.point.partition("@")
        text = f"{name}:kill" + (f"@{count}" if count else "")
        return dict.fromkeys(self.victims, text)

    @property
    def completes(self) -> bool:
        """Whether step 2 is complete in spite of it."""
        return self.point == "commit.after-manifest" or (self.point == "commit.after-receipt" and self.victims == (1,))


def _cases() -> list[Case]:
    out = []
    for store in ("posix", "moto", "rclone"):
        for point in (*_EVERY_RANK, *_COMMITTER):
            if point == "commit.after-claim" and store != "rclone":
                continue
            modes = ["steady", "async"] if store == "posix" else ["async" if len(out) % 2 else "sync"]
            victims = [(0,), (1,), (0, 1)] if point in _EVERY_RANK else [(0,)]
            out += [Case(store=store, mode=m, point=point, victims=v) for m in modes for v in victims]
    return out


CASES = _cases()


@dataclass(frozen=True, kw_only=True)
class Crashed:
    """A run in which ranks were killed."""

    url: str
    storage: StorageOptions
    outcomes: list[dict[str, Any]]  # per rank


class Crashes:
    """Runs the cases batch by batch, when one of the batch is asked for."""

    def __init__(self, root: Path, server_of: Callable[[str], S3Server]) -> None:
        self._root = root
        self._server_of = server_of
        self._done: dict[str, Crashed | str] = {}

    def get(self, case: Case, wanted: list[Case]) -> Crashed:
        if case.id not in self._done:
            at = wanted.index(case)
            self._run([one for one in wanted[at : at + _AT_ONCE] if one.id not in self._done])
        found = self._done[case.id]
        assert isinstance(found, Crashed), found
        return found

    def _run(self, cases: list[Case]) -> None:
        groups: list[RankGroup] = []
        try:
            places = [self._place(case) for case in cases]
            for _, _, environment in places:
                groups.append(RankGroup(2, environment=environment, wait_until_up=False))
            for group, case, (url, _, _) in zip(groups, cases, places, strict=True):
                group.wait_until_up()
                group.start("tests.workers.crashing:die_in_second_save", url, case.mode, case.failpoint_of)
            for group, case, (url, storage, _) in zip(groups, cases, places, strict=True):
                try:
                    outcomes = group.outcomes(_CASE_S)
                    self._done[case.id] = Crashed(url=url, storage=storage, outcomes=outcomes)
                except AssertionError as problem:  # a rank hangs: this case fails, the others of the batch do not
                    self._done[case.id] = str(problem)
        finally:
            for group in groups:
                group.close()

    def _place(self, case: Case) -> tuple[str, StorageOptions, dict[str, str]]:
        name = f"run-{uuid.uuid4().hex}"
        if case.store == "posix":
            return str(self._root / name), None, {}
        server = self._server_of(case.store)
        return server.url(name), server.storage_options, server.environment


@pytest.fixture(scope="session")
def crashes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Crashes:
    return Crashes(tmp_path_factory.mktemp("crash"), lambda store: request.getfixturevalue(f"{store}_s3"))


def _wanted(request: pytest.FixtureRequest) -> list[Case]:
    """The cases that this session runs, in order."""
    return [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_kill_in_save" and hasattr(item, "callspec")
    ]


def test_every_failpoint_of_a_save_is_tried() -> None:
    tried = {point.split("@")[0] for point in (*_EVERY_RANK, *_COMMITTER)}
    assert tried == {name for name in failpoints.KNOWN if name.startswith(("save.", "commit."))}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=[pytest.mark.s3] if c.store != "posix" else []) for c in CASES]
)
def test_kill_in_save(case: Case, crashes: Crashes, request: pytest.FixtureRequest) -> None:
    crashed = crashes.get(case, _wanted(request))
    for rank, outcome in enumerate(crashed.outcomes):
        if rank in case.victims:
            assert outcome == {"died": -9}, f"rank {rank} was to be killed at {case.point}: {outcome}"
            continue
        assert "value" in outcome, outcome
        told = outcome["value"]
        assert told["seconds"] < _SURVIVOR_S, told
        assert bool(told["error"]) != case.completes, told
    check_run(crashed.url, [1, 2] if case.completes else [1], crashed.storage)
    if not case.completes:
        save_again(crashed.url, 2, crashed.storage)
