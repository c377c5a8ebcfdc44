"""`ckpt ls URL`: the checkpoints of a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.exit_codes import DONE, PARTLY
from ckpt.cli.printer import Column, Printer
from ckpt.commit import find, names
from ckpt.errors import DamagedError, NotFoundError, VersionError
from ckpt.format import manifest
from ckpt.store.base import Store

_READS_AT_ONCE = 8
_METRICS_SHOWN_MAX = 3
_FIELDS = ("created", "world", "num_images", "num_tensors", "tensor_bytes", "stored_bytes", "referred_bytes")


@command("ls")
@click.argument("run", type=ADDRESS, metavar="URL[@A..B]")
@click.option("--all", "show_all", is_flag=True, help="Also attempts that are not complete, aborted or forgotten.")
def ls(printer: Printer, run: Address, show_all: bool) -> int:
    """List the complete checkpoints of a run, oldest first."""
    with opened_run(printer, run) as store:
        folders = find.step_folders(store)
        refuse_no_run(store, folders)
        complete = find.steps(store)
        steps = run.among(complete) if run.steps is not None else complete
        with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="ckpt-ls") as pool:
            found = list(pool.map(lambda step: _record(store, step), steps))
        records = [record for record in found if record is not None]
        attempts = [_attempt(a) for a in find.attempts(store) if a.state != "complete"] if show_all else []
    document: dict[str, Any] = {"url": run.url, "checkpoints": records}
    if show_all:
        document["attempts"] = attempts
    printer.document(document)
    _print_checkpoints(printer, records)
    if attempts:
        _print_attempts(printer, attempts)
    return PARTLY if any(record["error"] for record in records) else DONE


def _record(store: Store, step: int) -> dict[str, Any] | None:
    """What the manifest says; the reason where it cannot be read; None when it went away meanwhile."""
    key = names.manifest_key(step)
    empty = dict.fromkeys(_FIELDS)
    try:
        found = manifest.unpack(store.read(key), name=key)
    except NotFoundError:
        return None
    except (DamagedError, VersionError) as error:
        return {"step": step, **empty, "metrics": {}, "error": error.message}
    index = sum(record.nbytes for record in (found.tensors, found.fragments, found.objects))
    return {
        "step": step,
        "created": found.created,
        "world": found.world,
        "num_images": len(found.writers),
        "num_tensors": found.num_tensors,
        "tensor_bytes": found.tensor_bytes,
        "stored_bytes": index + sum(writer.nbytes for writer in found.writers),
        "referred_bytes": sum(one.used_bytes for one in found.references),
        "metrics": found.metrics,
        "error": None,
    }


def _attempt(attempt: find.Attempt) -> dict[str, Any]:
    return {"step": attempt.step, "attempt": attempt.attempt, "state": attempt.state, "stored_bytes": attempt.nbytes}


def _print_checkpoints(printer: Printer, records: list[dict[str, Any]]) -> None:
    columns = (
        Column(title="step", right=True),
        Column(title="saved"),
        Column(title="ranks", right=True),
        Column(title="files", right=True),
        Column(title="tensors", right=True),
        Column(title="size", right=True),
        Column(title="metrics"),
    )
    rows = [
        (r["step"], "-", "-", "-", "-", "-", f"cannot be read: {r['error']}")
        if r["error"]
        else (
            r["step"],
            texts.local_time(r["created"]),
            r["world"],
            r["num_images"],
            f"{r['num_tensors']:,}",
            texts.size(r["stored_bytes"]) + (f" + {texts.size(r['referred_bytes'])}" if r["referred_bytes"] else ""),
            _metrics(r["metrics"]),
        )
        for r in records
    ]
    total = sum(r["stored_bytes"] or 0 for r in records)
    printer.table(columns, rows, footer=f"{texts.plural(len(records), 'checkpoint')}, {texts.size(total)}")


def _metrics(metrics: dict[str, float]) -> str:
    shown = [f"{name}={value:.6g}" for name, value in list(metrics.items())[:_METRICS_SHOWN_MAX]]
    return " ".join(shown + ["..."] * (len(metrics) > _METRICS_SHOWN_MAX))


def _print_attempts(printer: Printer, attempts: list[dict[str, Any]]) -> None:
    printer.text("")
    columns = (
        Column(title="step", right=True),
        Column(title="state"),
        Column(title="size", right=True),
        Column(title="attempt"),
    )
    rows = [(a["step"], a["state"], texts.size(a["stored_bytes"]), a["attempt"]) for a in attempts]
    printer.table(columns, rows, footer=f"{texts.plural(len(attempts), 'attempt')} that `ckpt gc` looks after")
