"""`ckpt report RUN`: what the saves and loads of a run cost, from its event log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.printer import Column, Printer
from ckpt.cli.timing import no_events, seconds, straggler_of
from ckpt.commit import find
from ckpt.errors import CheckpointError
from ckpt.observe.log import LogContents, read_log
from ckpt.observe.report import report_page
from ckpt.observe.summary import Operation, operations
from ckpt.observe.trace import chrome_trace


@command("report")
@click.argument("run", type=ADDRESS, metavar="URL[@STEP]")
@click.option("-o", "--output", "page", metavar="FILE", help="Write one self-contained HTML page.")
@click.option("--trace", "trace", metavar="FILE", help="Write a trace for https://ui.perfetto.dev or chrome://tracing.")
def report(printer: Printer, run: Address, page: str | None, trace: str | None) -> None:
    """Report what the saves and loads of a run cost, from its event log: a table, an HTML page, a trace.

    The page shows the save of STEP, the newest one when no step is named, and the slowest one.
    """
    with opened_run(printer, run) as store:
        asked = None if run.steps is None else run.one()
        step = find.resolve(store, asked) if asked == "latest" else asked
        log = read_log(store)
        if not log.events:
            refuse_no_run(store, find.step_folders(store))
    found = operations(log.events)
    chosen = [o for o in found if o.operation == "save" and (step is None or o.step == step)]
    if not found or (step is not None and not chosen):
        raise no_events(run.url, step)
    if page is not None:
        _write(page, report_page(log.events, run=run.url, step=step, left_out=_left_out(log)))
        printer.note(f"wrote {page}")
    if trace is not None:
        _write(trace, json.dumps(chrome_trace(log.events), default=str))
        printer.note(f"wrote {trace}")
    printer.document(_document(run, log, found, page, trace))
    _print(printer, log, found)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write `{path}`: {error.strerror or error}", kind="cannot-write") from error


def _document(
    run: Address, log: LogContents, found: list[Operation], page: str | None, trace: str | None
) -> dict[str, Any]:
    return {
        "url": run.url,
        "page": page,
        "trace": trace,
        "num_events": len(log.events),
        "num_lines_skipped": log.num_lines_skipped,
        "num_files_left_out": log.num_files_left_out,
        "operations": [_record(operation) for operation in found],
    }


def _record(operation: Operation) -> dict[str, Any]:
    return {
        "operation": operation.operation,
        "step": operation.step,
        "attempt": operation.attempt,
        "start": texts.utc(operation.start_s),
        "outcome": operation.outcome,
        "error": operation.error,
        "world": operation.world,
        "num_ranks": len(operation.seconds),
        "stall_s": operation.stall_s,
        "total_s": operation.total_s,
        "nbytes": operation.nbytes,
        "straggler": straggler_of(operation),
    }


def _print(printer: Printer, log: LogContents, found: list[Operation]) -> None:
    columns = (
        Column(title="what"),
        Column(title="step", right=True),
        Column(title="start"),
        Column(title="outcome"),
        Column(title="ranks", right=True),
        Column(title="stall", right=True),
        Column(title="took", right=True),
        Column(title="size", right=True),
        Column(title="straggler"),
    )
    rows = [
        (
            o.operation,
            o.step,
            texts.local_time(texts.utc(o.start_s)),
            o.outcome,
            len(o.seconds) if len(o.seconds) == o.world else f"{len(o.seconds)} of {o.world}",
            seconds(o.stall_s),
            seconds(o.total_s),
            texts.size(o.nbytes),
            f"rank {o.straggler.rank}, {o.straggler.phase}" if o.straggler is not None else "",
        )
        for o in found
    ]
    saves = sum(o.operation == "save" for o in found)
    footer = f"{texts.plural(saves, 'save')}, {texts.plural(len(found) - saves, 'load')}"
    printer.table(columns, rows, footer=footer)
    if (left_out := _left_out(log)) != "":
        printer.note(left_out)


def _left_out(log: LogContents) -> str:
    parts = []
    if log.num_lines_skipped:
        parts.append(f"{texts.plural(log.num_lines_skipped, 'line')} of the event log could not be read")
    if log.num_files_left_out:
        parts.append(f"the log is long: {texts.plural(log.num_files_left_out, 'file')} of it, the oldest, left out")
    return "; ".join(parts)
