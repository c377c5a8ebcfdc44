"""Goal: the pages on events say what the code does. Method: compare their tables with the records, both ways."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import prometheus_client

from ckpt.events import LOAD_PHASES, SAVE_PHASES, Event
from ckpt.observe import report
from ckpt.observe.metrics import PrometheusSink
from ckpt.observe.summary import WAITING

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCE = (DOCS / "reference" / "events.md").read_text(encoding="utf-8")


def test_the_reference_has_the_fields_of_a_line() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (?:string|integer|number|object) \|", REFERENCE, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"\w+", row)]

    assert named == ["v", *(field.name for field in dataclasses.fields(Event))]


def test_the_reference_and_the_report_explain_every_phase() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (save, load|save|load) \|", REFERENCE, re.MULTILINE))
    explained = {name for name, _ in report.PHASES}

    assert {name for name, of in rows.items() if "save" in of} == set(SAVE_PHASES)
    assert {name for name, of in rows.items() if "load" in of} == set(LOAD_PHASES)
    assert explained == set(rows) - {"total"}


def test_the_reference_says_whose_time_is_its_own() -> None:
    listed = re.search(r"one phase of its own work\s+\((.*?);", REFERENCE, re.DOTALL)

    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == {*SAVE_PHASES, *LOAD_PHASES} - WAITING


def test_the_how_to_has_the_metrics_and_their_labels() -> None:
    page = (DOCS / "how-to" / "observe.md").read_text(encoding="utf-8")
    listed = {
        name: re.findall(r"`(\w+)`", labels)
        for name, labels in re.findall(r"^\| `(ckpt_\w+)` \| (.*?) \|", page, re.MULTILINE)
    }
    registry = prometheus_client.CollectorRegistry()
    sink = PrometheusSink(registry)
    names = {
        metric.name + ("_total" if metric.type == "counter" else ""): metric.documentation
        for metric in registry.collect()
    }

    assert listed.keys() == names.keys() and all(names.values())
    assert listed["ckpt_operations_total"] == list(sink._operations._labelnames)
    assert listed["ckpt_phase_seconds"] == list(sink._seconds._labelnames)
