"""Events as OpenTelemetry spans: one per save or load and rank, with one below it per phase, at the times when they were.

In: events. Out: spans, to the tracer provider that the program has set up. Never sets one up, never starts a span that it does
not end, never touches the current context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt.events import Event
from ckpt.observe.extras import needed


class OpenTelemetrySink:
    """A `Sink` for OpenTelemetry. Any thread.

    Args:
        tracer_provider: an `opentelemetry.trace.TracerProvider`; the global one when None.
    """

    def __init__(self, tracer_provider: Any = None) -> None:
        self._trace = needed("opentelemetry.trace", extra="observe", what="OpenTelemetrySink")
        self._context = needed("opentelemetry.context", extra="observe", what="OpenTelemetrySink")
        self._tracer = self._trace.get_tracer("ckpt", tracer_provider=tracer_provider)

    def emit(self, events: Sequence[Event]) -> None:
        """Tell the spans of one save or load."""
        whole = next((event for event in events if event.phase == "total"), None)
        if not events:
            return
        start_s = min(event.start_s for event in events)
        stop_s = max(event.start_s + event.seconds for event in events)
        # A context of its own: whatever span the emitting thread is in has nothing to do with this save.
        root = self._started(f"ckpt.{events[0].operation}", whole or events[0], start_s, self._context.Context())
        below = self._trace.set_span_in_context(root, self._context.Context())
        for event in events:
            if event is not whole:
                self._ended(self._started(f"ckpt.{event.phase}", event, event.start_s, below), event)
        if whole is not None:
            self._mark(root, whole)
        root.end(end_time=_ns(stop_s))

    def close(self) -> None:
        """The provider is the program's."""

    def _started(self, name: str, event: Event, start_s: float, context: Any) -> Any:
        attributes = {
            "ckpt.run": event.run,
            "ckpt.step": event.step,
            "ckpt.attempt": event.attempt,
            "ckpt.rank": event.rank,
            "ckpt.world": event.world,
            "ckpt.bytes": event.nbytes,
            "ckpt.outcome": event.outcome,
        }
        details = {
            f"ckpt.detail.{key}": value if isinstance(value, str | bool | int | float) else str(value)
            for key, value in event.detail.items()
        }
        return self._tracer.start_span(name, context=context, attributes=attributes | details, start_time=_ns(start_s))

    def _ended(self, span: Any, event: Event) -> None:
        self._mark(span, event)
        span.end(end_time=_ns(event.start_s + event.seconds))

    def _mark(self, span: Any, event: Event) -> None:
        if event.outcome == "failed":
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(event.detail.get("error", ""))))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
