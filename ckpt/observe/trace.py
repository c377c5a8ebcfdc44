"""Events as a trace in the Chrome format, for https://ui.perfetto.dev or chrome://tracing.

In: events. Out: a JSON document. Pure. A rank is a process of the trace; its lanes are: whole saves and loads, the training
thread, the background.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ckpt.events import Event
from ckpt.observe.lanes import lanes
from ckpt.observe.summary import FOREGROUND

_LANES = ("whole", "training thread", "background")
_LANES_APART = 100  # thread ids between one group of lanes and the next


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """The trace, times in microseconds since the first event; when that was stands in `otherData`."""
    by_lane: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        by_lane[event.rank, _group(event)].append(event)
    zero_s = min((event.start_s for found in by_lane.values() for event in found), default=0.0)
    records: list[dict[str, Any]] = []
    for (rank, group), found in sorted(by_lane.items()):
        placed = [group * _LANES_APART + lane for lane in lanes(found, nested=True)]
        records += _names(rank, group, placed)
        records += [_record(event, tid, zero_s) for event, tid in zip(found, placed, strict=True)]
    start = datetime.datetime.fromtimestamp(zero_s, datetime.UTC).isoformat()
    return {"traceEvents": records, "displayTimeUnit": "ms", "otherData": {"program": "ckpt", "start": start}}


def _group(event: Event) -> int:
    if event.phase == "total":
        return 0
    return 1 if event.operation == "load" or event.phase in FOREGROUND else 2


def _names(rank: int, group: int, placed: list[int]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
        {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}},
    ]
    for tid in sorted(set(placed)):
        more = f" {tid % _LANES_APART + 1}" if tid % _LANES_APART else ""
        out.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": _LANES[group] + more}})
        out.append({"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": tid, "args": {"sort_index": tid}})
    return out


def _record(event: Event, tid: int, zero_s: float) -> dict[str, Any]:
    name = f"{event.operation} {event.step}" if event.phase == "total" else event.phase
    facts = {"step": event.step, "attempt": event.attempt, "bytes": event.nbytes, "outcome": event.outcome}
    return {
        "ph": "X",
        "name": name,
        "cat": event.operation,
        "pid": event.rank,
        "tid": tid,
        "ts": round((event.start_s - zero_s) * 1e6, 3),
        "dur": round(event.seconds * 1e6, 3),
        "args": facts | event.detail,
    }
