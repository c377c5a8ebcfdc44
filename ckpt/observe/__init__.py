"""Where events go, and what is made of them: the log beside the run, metrics, spans, a trace, a report.

In: `ckpt.events.Event`s. Out: JSON lines, Prometheus metrics, OpenTelemetry spans, a Chrome trace, an HTML page. Never touches a
checkpoint. Each library that only one of these needs is imported by that one, when it is used.
"""

from __future__ import annotations

from ckpt.config import Options
from ckpt.events import Sink
from ckpt.observe.log import EventLog
from ckpt.store.base import Store


def default_sinks(store: Store, options: Options, *, rank: int, world: int) -> list[Sink]:
    """The sinks of a run for which nobody asked: its event log, unless `options.events` is False. Writes nothing yet."""
    return [EventLog(store, rank=rank, world=world)] if options.events else []
