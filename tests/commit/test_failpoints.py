"""Goal: failpoints do what the environment says and nothing else, and each is reached. Method: the real code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ckpt import failpoints
from ckpt.commit.gc import collect_garbage
from ckpt.commit.publish import abort
from ckpt.commit.receipts import leave_receipt
from ckpt.commit.retention import forget
from ckpt.errors import InvalidInputError
from tests.commit.conftest import OPTIONS, OpenStore, save


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    """Each test counts hits from zero."""
    failpoints.reset()


def test_nothing_happens_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_FAILPOINT", raising=False)
    failpoints.hit("commit.before-manifest")
    monkeypatch.setenv("CKPT_FAILPOINT", "commit.after-manifest:error")
    failpoints.hit("commit.before-manifest")


def test_error_delay_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "commit.before-manifest:error@2, commit.after-manifest:delay=0.1")
    failpoints.hit("commit.before-manifest")
    with pytest.raises(failpoints.FailpointError):
        failpoints.hit("commit.before-manifest")
    failpoints.hit("commit.before-manifest")
    start_s = time.monotonic()
    failpoints.hit("commit.after-manifest")
    assert time.monotonic() - start_s >= 0.1


def test_rank_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "commit.before-manifest:error")
    monkeypatch.setenv("CKPT_FAILPOINT_RANK", "1")
    monkeypatch.setenv("RANK", "0")
    failpoints.hit("commit.before-manifest")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(failpoints.FailpointError):
        failpoints.hit("commit.before-manifest")


def test_kill_is_a_sigkill() -> None:
    script = "from ckpt import failpoints; failpoints.hit('commit.before-manifest')"
    environment = {**os.environ, "CKPT_FAILPOINT": "commit.before-manifest:kill", "PYTHONPATH": os.getcwd()}
    environment.pop("CKPT_FAILPOINT_RANK", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "no.such:kill",
        "commit.before-manifest",
        "commit.before-manifest:explode",
        "commit.before-manifest:kill@x",
        "commit.before-manifest:delay",
        "commit.before-manifest:kill=3",
        "commit.before-manifest:kill,",
    ],
)
def test_what_cannot_be_read_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", text)
    with pytest.raises(InvalidInputError, match="CKPT_FAILPOINT"):
        failpoints.hit("commit.before-manifest")


def test_every_failpoint_of_this_package_is_reached(weak_open: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    for module in ("receipts", "publish", "retention", "gc"):
        monkeypatch.setattr(f"ckpt.commit.{module}.failpoints.hit", seen.add)
    store = weak_open()
    save(store, 1, "attempt-one")
    save(store, 2, "attempt-two")
    forget(store, [1])
    leave_receipt(store, 3, "attempt-three", 0, 1, b"")
    abort(store, 3, "attempt-three", "no")
    collect_garbage(store, options=OPTIONS)
    assert seen == {name for name in failpoints.KNOWN if name.split(".")[0] in ("commit", "forget", "gc")}
