"""Goal: Prometheus, OpenTelemetry and Perfetto are told what happened, with the true times.

Method: read back what each was told.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import prometheus_client
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import ckpt
from ckpt.events import Event
from ckpt.observe.metrics import PrometheusSink
from ckpt.observe.otel import OpenTelemetrySink
from ckpt.observe.trace import chrome_trace
from tests.observe.synthetic import load_events, run_events, save_events


def test_metrics_count_phases_bytes_outcomes_and_the_last_durable_step() -> None:
    registry = prometheus_client.CollectorRegistry()
    sink = PrometheusSink(registry)
    for step, outcome in ((10, "ok"), (20, "ok"), (30, "failed"), (40, "skipped")):
        sink.emit(save_events(step, 1, outcome=outcome))
    sink.emit(load_events(20, 1, run="runs/other"))
    sink.close()
    sink.close()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"run": "runs/gpt", **labels})

    saves = {o: value("ckpt_operations_total", operation="save", outcome=o) for o in ("ok", "failed", "skipped")}
    written = [e.nbytes for e in save_events(10, 1) if e.phase == "write"]
    last = max(e.start_s + e.seconds for e in save_events(20, 1) if e.phase == "total")
    assert saves == {"ok": 2, "failed": 1, "skipped": 1}
    assert value("ckpt_phase_bytes_total", operation="save", phase="write") == 4 * sum(written)
    assert value("ckpt_phase_seconds_count", operation="save", phase="fence") == 4
    assert value("ckpt_last_durable_step") == 20
    assert value("ckpt_last_durable_timestamp_seconds") == pytest.approx(last)
    assert value("ckpt_operations_total", operation="load", outcome="ok", run="runs/other") == 1
    assert value("ckpt_last_durable_step", run="runs/other") is None


def spans_of(events: list[Event]) -> list[Any]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    sink = OpenTelemetrySink(provider)
    with provider.get_tracer("trainer").start_as_current_span("training step"):
        sink.emit(events)
    sink.close()
    provider.shutdown()
    return [span for span in exporter.get_finished_spans() if span.name.startswith("ckpt.")]


def test_a_save_is_a_span_with_one_below_it_per_phase_at_the_true_times() -> None:
    events = [event for event in save_events(7, 2) if event.rank == 1]
    spans = {span.name: span for span in spans_of(events)}
    root = spans.pop("ckpt.save")

    assert root.parent is None
    assert {span.parent.span_id for span in spans.values()} == {root.context.span_id}
    assert {name: (span.start_time, span.end_time) for name, span in spans.items()} == {
        f"ckpt.{e.phase}": (round(e.start_s * 1e9), round((e.start_s + e.seconds) * 1e9))
        for e in events
        if e.phase != "total"
    }
    assert dict(root.attributes)["ckpt.step"] == 7 and dict(root.attributes)["ckpt.rank"] == 1
    assert root.start_time == min(span.start_time for span in spans.values())


def test_the_span_of_a_failed_save_says_why() -> None:
    spans = {span.name: span for span in spans_of(save_events(7, 1, outcome="failed", error="disk full"))}

    assert spans["ckpt.save"].status.status_code is StatusCode.ERROR
    assert spans["ckpt.save"].status.description == "disk full"
    assert spans["ckpt.write"].status.status_code is StatusCode.UNSET


def test_the_trace_has_every_event_and_within_a_lane_they_nest() -> None:
    events = run_events(3, straggler=(1, "copy", 8.0))
    trace = json.loads(json.dumps(chrome_trace(events), allow_nan=False))
    found = [record for record in trace["traceEvents"] if record["ph"] == "X"]
    by_lane = defaultdict(list)
    for record in found:
        by_lane[record["pid"], record["tid"]].append((record["ts"], record["ts"] + record["dur"]))

    assert len(found) == len(events)
    assert {record["pid"] for record in found} == {0, 1, 2}
    assert min(record["ts"] for record in found) == 0.0
    for spans in by_lane.values():
        for (start, stop), (start2, stop2) in itertools.pairwise(sorted(spans, key=lambda s: (s[0], -s[1]))):
            assert start2 >= stop - 2 or stop2 <= stop + 2, (start, stop, start2, stop2)  # apart or within, to 2 µs
    named = {(r["pid"], r["tid"]) for r in trace["traceEvents"] if r["name"] == "thread_name"}
    assert named == set(by_lane)


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert chrome_trace([])["traceEvents"] == []


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("prometheus_client", lambda: PrometheusSink(), "observe"),
        ("opentelemetry", lambda: OpenTelemetrySink(), "observe"),
        ("plotly", lambda: _page(), "report"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    module: str, make: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # `import` then raises ImportError

    with pytest.raises(ckpt.InvalidInputError) as caught:
        make()
    assert caught.value.kind == "missing-package" and caught.value.hints == (f"pip install 'ckpt[{extra}]'",)
    assert module in caught.value.message


def _page() -> str:
    from ckpt.observe.report import report_page

    return report_page(save_events(1, 1), run="runs/gpt")
