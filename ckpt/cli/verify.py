"""`ckpt verify URL[@STEP]`: check every byte of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.exit_codes import DAMAGED, DONE
from ckpt.cli.printer import Column, Printer
from ckpt.commit import find, names
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.verify import Finding, Verified, verify_nbytes
from ckpt.engine.verify import verify as verify_stored
from ckpt.errors import DamagedError
from ckpt.store.base import Store


@command("verify")
@click.argument("checkpoints", type=ADDRESS, metavar="URL[@STEP|@A..B|@latest]")
def verify(printer: Printer, checkpoints: Address) -> int:
    """Read every byte of checkpoints (all of the run when no step is named) and list every damaged place.

    Exit status 13 when there is one.
    """
    with opened_run(printer, checkpoints) as store:
        refuse_no_run(store, find.step_folders(store))
        steps = checkpoints.among(find.steps(store))
        opened = [_open(store, step) for step in steps]
        total = sum(verify_nbytes(stored) for stored in opened if isinstance(stored, StoredCheckpoint))
        with printer.progress("verify", total) as bar:
            results = [
                verify_stored(stored, progress=bar.advance) if isinstance(stored, StoredCheckpoint) else stored
                for stored in opened
            ]
    _report(printer, checkpoints, results)
    return DAMAGED if any(result.findings for result in results) else DONE


def _open(store: Store, step: int) -> StoredCheckpoint | Verified:
    """The checkpoint, or what is wrong with its manifest."""
    try:
        return StoredCheckpoint(store, step, config.from_environment())
    except DamagedError as error:
        finding = Finding(kind=error.kind, message=error.message, file=names.manifest_key(step))
        return Verified(step=step, num_files=1, nbytes=0, findings=[finding])


def _report(printer: Printer, address: Address, results: Sequence[Verified]) -> None:
    num_findings = sum(len(result.findings) for result in results)
    printer.document(
        {
            "url": address.url,
            "ok": num_findings == 0,
            "num_findings": num_findings,
            "checkpoints": [{**dataclasses.asdict(result), "ok": not result.findings} for result in results],
        }
    )
    columns = (
        Column(title="step", right=True),
        Column(title="files", right=True),
        Column(title="size", right=True),
        Column(title="result"),
    )
    rows = [
        (
            r.step,
            r.num_files,
            texts.size(r.nbytes),
            texts.plural(len(r.findings), "damaged place") if r.findings else "ok",
        )
        for r in results
    ]
    printer.table(columns, rows)
    if not num_findings:
        return
    printer.text("")
    places = (
        Column(title="step", right=True),
        Column(title="what"),
        Column(title="file"),
        Column(title="bytes"),
        Column(title="kind"),
    )
    printer.table(places, [(result.step, *_row(finding)) for result in results for finding in result.findings])
    sound = [result.step for result in results if not result.findings]
    hints = [f"checkpoint {sound[-1]} is sound; load it with `step={sound[-1]}`"] if sound else []
    damaged = [str(result.step) for result in results if result.findings]
    message = f"{texts.plural(num_findings, 'damaged place')} in {texts.plural(len(damaged), 'checkpoint')}: {', '.join(damaged)}"
    printer.error(message, kind="damaged", exit_code=DAMAGED, hints=hints)


def _row(finding: Finding) -> tuple[str, str, str, str]:
    what = f"object {finding.object}" if finding.object else finding.tensor or "-"
    place = "-" if finding.start is None else f"[{finding.start}, {finding.stop})"
    return what, finding.file, place, finding.kind
