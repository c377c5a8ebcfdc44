"""Named places where a test can kill, fail or delay a process.

In: the name of the place, and the environment, read here only and at call time. Out: nothing. Does nothing at all
unless `CKPT_FAILPOINT` is set, and never anything else than what it says:

    CKPT_FAILPOINT=commit.before-manifest:kill          SIGKILL to this process when it gets there
    CKPT_FAILPOINT=commit.before-manifest:error         raise FailpointError
    CKPT_FAILPOINT=commit.before-manifest:delay=2.5     sleep 2.5 seconds
    CKPT_FAILPOINT=save.chunk:kill@3                    at the third time only; several, separated by commas
    CKPT_FAILPOINT_RANK=1                               only where the variable RANK has this value
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass

from ckpt.errors import CheckpointError, InvalidInputError

# Every failpoint and what it cuts. A name that is not here is a bug at the call and a usage error in the environment.
KNOWN = {
    "stage.before-chunk": "a chunk is about to be copied in the background",
    "save.before-image": "step 1: nothing is written yet",
    "save.in-image": "step 1: some of the rank's image is written: after each chunk",
    "save.before-image-commit": "step 1: all of the image is written, it is not durable",
    "save.before-index": "step 4: before each file of the index",
    "commit.before-receipt": "step 2: the rank's image is durable, its receipt is not",
    "commit.after-receipt": "step 2 done on this rank",
    "commit.receipts-complete": "step 3: every receipt is read, nothing is decided",
    "references.before-pin": "before step 5: the images that the attempt refers to are not pinned",
    "references.after-pin": "before step 5: they are pinned and not yet looked at",
    "commit.after-claim": "step 5: the claim of a store without conditional writes is left",
    "commit.before-manifest": "step 6: everything is durable but the manifest",
    "commit.after-manifest": "step 6 done: the checkpoint is complete, nobody has been told",
    "commit.before-abort": "the committer has given up and not yet said so",
    "forget.after-record": "the copy of the manifest is durable, the manifest still there",
    "forget.after-manifest": "the manifest is gone, the step forgotten",
    "gc.after-verdict": "an attempt is marked as dead, all of its data still there",
    "gc.after-marks": "the images to remove are marked, nothing has been looked at again",
    "gc.between-deletes": "some of a dead attempt's data are gone",
    "merge.before-record": "a task of a pass is done, its record is not durable",
    "merge.in-image": "some of an image of a merge is written: after each chunk",
    "merge.before-image-commit": "all of an image of a merge is written, it is not durable",
    "merge.before-index": "all images of a merge are durable: before each file of the index",
    "agent.before-parity": "a snapshot is sealed, its parity not begun",
    "agent.in-parity": "some of the parity is made: after each chunk",
    "agent.before-vote": "this rank's parity is sealed, nobody has been told",
    "agent.before-protected": "all ranks have voted, this one does not count the snapshot yet",
    "agent.in-flush": "some of the image is in the store: after each chunk",
}

_counts: dict[str, int] = {}
_counts_lock = threading.Lock()


class FailpointError(CheckpointError):
    """Raised on demand of `CKPT_FAILPOINT=...:error`; never in production."""

    kind = "failpoint"


@dataclass(frozen=True, kw_only=True)
class Failpoint:
    """One entry of `CKPT_FAILPOINT`."""

    name: str
    action: str  # kill, error, delay
    delay_s: float = 0.0
    count: int = 0  # fire at this hit only, from 1; 0: at every hit


def hit(name: str) -> None:
    """Do here what `CKPT_FAILPOINT` says about `name`; nothing when it says nothing. Any thread."""
    assert name in KNOWN, name
    text = os.environ.get("CKPT_FAILPOINT")
    if not text:
        return
    rank = os.environ.get("CKPT_FAILPOINT_RANK")
    if rank is not None and rank != os.environ.get("RANK"):
        return
    with _counts_lock:
        _counts[name] = seen = _counts.get(name, 0) + 1
    for point in parse(text):
        if point.name == name and point.count in (0, seen):
            _act(point)


def parse(text: str) -> list[Failpoint]:
    """The failpoints in the text of `CKPT_FAILPOINT`. A name or action that does not exist is an InvalidInputError."""
    return [_parse_one(part) for part in text.split(",")]


def reset() -> None:
    """Forget how often each failpoint was hit (`@count` starts again)."""
    with _counts_lock:
        _counts.clear()


def _parse_one(text: str) -> Failpoint:
    name, _, rest = text.strip().partition(":")
    action, _, count = rest.partition("@")
    action, _, delay = action.partition("=")
    try:
        if name not in KNOWN or action not in ("kill", "error", "delay") or (action == "delay") != bool(delay):
            raise ValueError
        return Failpoint(name=name, action=action, delay_s=float(delay or 0), count=int(count or 0))
    except ValueError:
        raise InvalidInputError(
            f"CKPT_FAILPOINT: cannot read {text!r}, expected NAME:kill, NAME:error or NAME:delay=SECONDS, then @COUNT",
            hints=(f"names: {', '.join(sorted(KNOWN))}",),
        ) from None


def _act(point: Failpoint) -> None:
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if point.action == "error":
        raise FailpointError(f"failpoint {point.name}")
    time.sleep(point.delay_s)
