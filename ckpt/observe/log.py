"""The event log: JSON lines beside the run, below `events/`.

In: events, and the store of the run. Out: small files, and the events back. Never syncs, never makes a save wait for more than
one write, never grows beyond `EVENT_LOG_BYTES_MAX` per process: then its oldest part goes.

    events/<when>-00003-of-00128-<pid>-<token>/000001.jsonl                          a folder: appended to
    events/<when>-00003-of-00128-<pid>-<token>/000001-save-000000001000.jsonl        an object store: one object per save or load

Every process has a folder of its own, so that restarts do not meet. A batch of lines is one write(2), so that lines never tear
but at a crash.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ckpt import config
from ckpt.commit import find, names
from ckpt.errors import NotFoundError, StoreError
from ckpt.events import Event
from ckpt.observe.lines import decode, encode
from ckpt.store.base import Entry, Store
from ckpt.store.posix import PosixStore

_log = logging.getLogger("ckpt")
_READS_AT_ONCE = 8
_OF_STEP = re.compile(r".*/[0-9]+-(?:save|load)-([0-9]{12})\.jsonl")


class EventLog:
    """A `Sink` that writes the log of one process. One thread at a time."""

    def __init__(self, store: Store, *, rank: int, world: int) -> None:
        self._store = store
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        process = f"{rank:05d}-of-{world:05d}-{os.getpid()}-{secrets.token_hex(4)}"
        self._folder = f"{names.EVENTS}{when}-{process}/"
        self._parts: deque[tuple[str, int]] = deque()  # key and bytes, oldest first
        self._num_parts = 0
        self._on = True

    def emit(self, events: Sequence[Event]) -> None:
        """Write the events of one save or load."""
        if not events or not self._on or self._is_stray(events[0]):
            return
        try:
            self._write(b"".join(encode(event) for event in events), events[0])
        except StoreError as error:
            if error.kind != "denied":
                raise
            self._on = False  # somebody loads from a run that is not theirs to write to: nothing to warn of
            _log.info("no event log in %s: %s", self._store.url, error.message)

    def close(self) -> None:
        """Nothing is held open."""

    def _is_stray(self, event: Event) -> bool:
        """A load that found no run must not leave a folder where the user mistyped the name of one."""
        return event.operation == "load" and not self._parts and not find.step_folders(self._store)

    def _write(self, data: bytes, first: Event) -> None:
        if isinstance(self._store, PosixStore):
            if not self._parts or self._parts[-1][1] + len(data) > config.EVENT_LOG_PART_BYTES:
                self._parts.append((self._next_key(""), 0))
            key, nbytes = self._parts.pop()
            self._parts.append((key, nbytes + len(data)))
            self._store.append(key, data)
        else:
            key = self._next_key(f"-{first.operation}-{first.step:012d}")
            self._parts.append((key, len(data)))
            self._store.put(key, data)
        while len(self._parts) > 1 and sum(nbytes for _, nbytes in self._parts) > config.EVENT_LOG_BYTES_MAX:
            self._store.delete([self._parts.popleft()[0]])

    def _next_key(self, suffix: str) -> str:
        self._num_parts += 1
        return f"{self._folder}{self._num_parts:06d}{suffix}.jsonl"


@dataclass(frozen=True, kw_only=True)
class LogContents:
    """What a log holds."""

    events: list[Event]  # by start
    num_lines_skipped: int  # that are no events: torn by a crash, or not ours
    num_files_left_out: int  # older ones, beyond `EVENT_LOG_READ_BYTES_MAX`


def read_events(store: Store) -> list[Event]:
    """All events of a run, by their start; see `read_log`."""
    return read_log(store).events


def read_log(store: Store, *, step: int | None = None) -> LogContents:
    """The log of a run, or what it says of one step. Newest files first, as far as the limit goes. Refuses nothing."""
    entries = sorted((e for e in store.list(names.EVENTS) if _may_hold(e.key, step)), key=_newest_first)
    events: list[Event] = []
    num_skipped = num_bytes = num_files = 0
    for lines in _lines_of(store, entries, step):
        num_files += 1
        found = [decode(line) for line in lines]
        events += [event for event in found if event is not None and (step is None or event.step == step)]
        num_skipped += sum(event is None for event in found)
        num_bytes += sum(map(len, lines))
        if num_bytes > config.EVENT_LOG_READ_BYTES_MAX:
            break
    events.sort(key=lambda event: event.start_s)
    return LogContents(events=events, num_lines_skipped=num_skipped, num_files_left_out=len(entries) - num_files)


def _lines_of(store: Store, entries: Sequence[Entry], step: int | None) -> Iterator[list[bytes]]:
    """The lines of each file; of one step only, most others are passed over without being parsed."""
    needle = b"" if step is None else b'"step":%d,' % step
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="ckpt-events") as pool:
        for start in range(0, len(entries), _READS_AT_ONCE):
            for data in pool.map(lambda entry: _read(store, entry.key), entries[start : start + _READS_AT_ONCE]):
                yield [line for line in data.split(b"\n") if line and needle in line]


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except NotFoundError:
        return b""  # its writer dropped its oldest part meanwhile


def _may_hold(key: str, step: int | None) -> bool:
    match = _OF_STEP.fullmatch(key)
    return key.endswith(".jsonl") and (step is None or match is None or int(match[1]) == step)


def _newest_first(entry: Entry) -> tuple[float, str]:
    return -entry.modified_s, entry.key
