"""What an agent leaves for the next one of its rank, beside what lies in memory.

In: a file in the agent's folder. Out: its incarnation, the newest epoch that it saw, and the snapshot that the job went on from
last. Replaced at once at every change: survives the process, which is all that its memory does. Any thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a job went on from: snapshots of an earlier epoch count no more, but for this one."""

    epoch: int
    step: int  # -1: from no snapshot, but from the store or from the beginning
    attempt: str  # empty then

    def fields(self) -> list[int | str]:
        """As JSON."""
        return [self.epoch, self.step, self.attempt]

    @classmethod
    def of(cls, fields: object) -> Chosen | None:
        """From JSON; None when it is something else."""
        if not isinstance(fields, list) or [type(one) for one in fields] != [int, int, str]:
            return None
        return cls(epoch=fields[0], step=fields[1], attempt=fields[2])


@dataclass(frozen=True, kw_only=True)
class Memo:
    """The record."""

    incarnation: int = 0
    epoch: int = -1
    chosen: Chosen | None = None

    @staticmethod
    def read(path: Path) -> Memo:
        """What the agent before knew; nothing where it ended well, and of what is no record."""
        try:
            found = json.loads(path.read_bytes())
            incarnation, epoch = found["incarnation"], found["epoch"]
            if type(incarnation) is int and type(epoch) is int:
                return Memo(incarnation=incarnation, epoch=epoch, chosen=Chosen.of(found.get("chosen")))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return Memo()


class MemoFile:
    """The record of an agent that lives."""

    def __init__(self, path: Path, memo: Memo) -> None:
        self._path, self._memo = path, memo
        self._lock = threading.Lock()
        self.change()

    @property
    def memo(self) -> Memo:
        return self._memo

    def change(self, **fields: object) -> None:
        """Durable when this returns, in the sense above."""
        with self._lock:
            self._memo = dataclasses.replace(self._memo, **fields)  # type: ignore[arg-type]
            memo = self._memo
            body = {"incarnation": memo.incarnation, "epoch": memo.epoch}
            if memo.chosen is not None:
                body["chosen"] = memo.chosen.fields()  # type: ignore[assignment]
            path = self._path.with_suffix(".new")
            path.write_text(json.dumps(body), encoding="ascii")
            path.chmod(0o600)
            os.replace(path, self._path)
