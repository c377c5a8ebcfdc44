"""Events as Prometheus metrics of this process, on a registry of the caller's.

In: events. Out: counters, histograms and gauges. Never opens a port (`prometheus_client.start_http_server(9400)` does), never
removes a metric: one sink can serve several runs, which the label `run` tells apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt.events import Event
from ckpt.observe.extras import needed

BUCKETS_S = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class PrometheusSink:
    """A `Sink` for `prometheus_client`. Any thread.

    Args:
        registry: a `prometheus_client.CollectorRegistry`; its default one when None. One sink per registry.
    """

    def __init__(self, registry: Any = None) -> None:
        client = needed("prometheus_client", extra="observe", what="PrometheusSink")
        registry = client.REGISTRY if registry is None else registry
        phase, outcome = ("run", "operation", "phase"), ("run", "operation", "outcome")
        self._seconds = client.Histogram(
            "ckpt_phase_seconds", "Time in each phase of a save or load.", phase, registry=registry, buckets=BUCKETS_S
        )
        self._bytes = client.Counter("ckpt_phase_bytes", "Bytes moved in each phase.", phase, registry=registry)
        self._operations = client.Counter(
            "ckpt_operations", "Saves and loads that are over: ok, failed, skipped.", outcome, registry=registry
        )
        self._step = client.Gauge("ckpt_last_durable_step", "Step of the last good save.", ("run",), registry=registry)
        self._time = client.Gauge(
            "ckpt_last_durable_timestamp_seconds", "End of the last good save.", ("run",), registry=registry
        )

    def emit(self, events: Sequence[Event]) -> None:
        """Count the events of one save or load."""
        for event in events:
            self._seconds.labels(event.run, event.operation, event.phase).observe(event.seconds)
            if event.nbytes:
                self._bytes.labels(event.run, event.operation, event.phase).inc(event.nbytes)
            if event.phase == "total":
                self._over(event)

    def close(self) -> None:
        """The metrics stay, for the last scrape."""

    def _over(self, event: Event) -> None:
        self._operations.labels(event.run, event.operation, event.outcome).inc()
        if event.operation == "save" and event.outcome == "ok":
            self._step.labels(event.run).set(event.step)
            self._time.labels(event.run).set(event.start_s + event.seconds)
