"""An average that is kept up beside a training job, in a process of its own with low priority.

In: a run, a rule, and word of each checkpoint that is complete. Out: averages in the run that the rule names, and what went
wrong: logged as an error, and kept in `failures`. Never holds up whoever gives word: a process that dies is started anew at the
next one, and finds in the store what there is to do.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ckpt.agent.wire import rebuilt
from ckpt.commit import pins
from ckpt.config import OnlineAverage, Options
from ckpt.errors import first_line
from ckpt.merge.online import pin_rule
from ckpt.merge.processes import Child, Says
from ckpt.merge.remote import absolute
from ckpt.store.base import Store

_log = logging.getLogger("ckpt")
NICE = 10
FINISH_S = 60.0  # that `close` waits for the averages that are due


class Beside:
    """Keeps one average up. `committed` and `close` by whoever finishes saves, one at a time; `close` may be called twice.

    Attributes:
        failures: what went wrong, oldest first, for people.
        published: the newest step that there is an average of; None before the first.
    """

    def __init__(self, url: str, rule: OnlineAverage, options: Options, storage: Mapping[str, Any] | None) -> None:
        rule = OnlineAverage(**{**vars(rule), "into": absolute(rule.into)})
        self._url, self._rule = url, rule
        self._first = {
            "url": absolute(url),
            "online": asdict(rule),
            "options": asdict(options),
            "storage_options": dict(storage or {}),
            "nice": NICE,
        }
        self.failures: list[str] = []
        self.published: int | None = None
        self._pinned = False
        self._child: Child | None = None
        self._said: queue.SimpleQueue[Says] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._child is None or not self._child.is_alive else self._child.pid

    def before_retention(self, store: Store) -> None:
        """Pin what the average needs before anything of the run is forgotten for the first time."""
        if not self._pinned:
            self._pinned = True
            pin = pin_rule(self._rule, None)
            if pin.name not in {one.name for one in pins.read(store)}:
                pins.put(store, pin)

    def committed(self, step: int) -> None:
        """A checkpoint is complete."""
        if self._child is None or not self._child.is_alive:
            if self._child is not None:
                self._child.end()
            self._start()
        assert self._child is not None
        self._child.say({"commit": step})

    def close(self, timeout_s: float = FINISH_S) -> None:
        """Let the averages that are due be written, within `timeout_s`; the next job goes on with what is not."""
        child, self._closing = self._child, True
        if child is None:
            return
        child.end(timeout_s)
        if self._listener is not None:
            self._listener.join(timeout_s)
        self._child = None

    def _start(self) -> None:
        self._said = queue.SimpleQueue()
        self._child = Child(0, self._first, self._said)
        self._listener = threading.Thread(
            target=self._listen, args=(self._child, self._said), name="ckpt-average", daemon=True
        )
        self._listener.start()

    def _listen(self, child: Child, said: queue.SimpleQueue[Says]) -> None:
        while True:
            _, what = said.get()
            if what is None:
                if not self._closing:
                    self._failed(f"its process ended; {first_line(child.died())}")
                return
            if "told" in what:
                self._heard(what["told"])
            elif "failed" in what or "error" in what:
                self._failed(first_line(rebuilt(what.get("failed") or what["error"])))

    def _heard(self, told: Mapping[str, Any]) -> None:
        if told["kind"] == "published":
            self.published = int(told["step"])
        elif told["kind"] in ("skipped", "late", "failed"):
            self._failed(str(told["text"]))

    def _failed(self, text: str) -> None:
        self.failures.append(text)
        _log.error("the average of %s in %s: %s", self._url, self._rule.into, text)
