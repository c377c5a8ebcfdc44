"""`ckpt gc URL`: the second of two steps that delete: remove what no checkpoint needs."""

from __future__ import annotations

from typing import Any

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.printer import Column, Printer
from ckpt.commit import find
from ckpt.commit.gc import GcPlan, GcReport, collect_garbage
from ckpt.errors import InvalidInputError


@command("gc")
@click.argument("run", type=ADDRESS, metavar="URL")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed and kept, and why.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--unsafe-remove-unfinished",
    "unfinished",
    is_flag=True,
    help="Also remove young unpublished attempts. A save that is running then fails.",
)
def gc(printer: Printer, run: Address, dry_run: bool, yes: bool, unfinished: bool) -> None:
    """Free the space of forgotten checkpoints and of saves that never finished.

    Removed data cannot be brought back, so it asks; without a terminal it needs --yes. Complete checkpoints are never
    touched, nor are attempts so young that a save may be running, nor images of forgotten checkpoints that others refer to.
    """
    if run.steps is not None:
        raise InvalidInputError("gc looks at a whole run: name it without `@`", kind="bad-address")
    options = config.from_environment()
    with opened_run(printer, run) as store:
        refuse_no_run(store, find.step_folders(store))
        report = collect_garbage(store, options=options, dry_run=True, force_unfinished=unfinished)
        num_known = len(report.plan.removals) + len(report.plan.leftovers)
        if not dry_run:
            if num_known:
                _print(printer, report, "to be removed")
                nbytes = sum(removal.nbytes for removal in report.plan.removals)
                question = f"Remove {texts.plural(len(report.plan.removals), 'attempt')}, {texts.size(nbytes)}, from {run.url}?"
                printer.confirm(question, yes=yes)
            report = collect_garbage(store, options=options, force_unfinished=unfinished)
    printer.document(_document(run, report))
    if dry_run or not num_known:
        _print(printer, report, "to be removed" if dry_run else "removed")
    elif not printer.json:
        printer.text(f"{texts.size(report.nbytes)} freed, {texts.plural(report.num_objects, 'file')} removed")


def _document(run: Address, report: GcReport) -> dict[str, Any]:
    plan: GcPlan = report.plan
    return {
        "url": run.url,
        "dry_run": report.dry_run,
        "removals": [
            {"step": r.step, "attempt": r.attempt, "reason": r.reason, "nbytes": r.nbytes} for r in plan.removals
        ],
        "kept": [{"step": k.step, "attempt": k.attempt, "reason": k.reason, "nbytes": k.nbytes} for k in plan.kept],
        "leftovers": list(plan.leftovers),
        "spared": list(report.spared),
        "freed_bytes": report.nbytes,
        "num_files_removed": report.num_objects,
        "num_unfinished_removed": report.num_swept,
    }


def _print(printer: Printer, report: GcReport, verb: str) -> None:
    columns = (
        Column(title="step", right=True),
        Column(title="verdict"),
        Column(title="size", right=True),
        Column(title="reason"),
        Column(title="attempt"),
    )
    plan = report.plan
    rows = [(r.step, "remove", texts.size(r.nbytes), r.reason, r.attempt) for r in plan.removals]
    rows += [(k.step, "keep", texts.size(k.nbytes), k.reason, k.attempt) for k in plan.kept]
    rows.sort()
    nbytes = sum(removal.nbytes for removal in plan.removals)
    footer = f"{texts.plural(len(plan.removals), 'attempt')} {verb}, {texts.size(nbytes)}"
    printer.table(columns, rows, footer=footer)
