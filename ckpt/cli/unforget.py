"""`ckpt unforget URL@STEP`: bring forgotten checkpoints back."""

from __future__ import annotations

import click

from ckpt.cli.address import Address, StepRange
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.printer import Printer
from ckpt.commit import find, names, retention
from ckpt.errors import InvalidInputError


@command("unforget")
@click.argument("checkpoints", type=ADDRESS, metavar="URL@STEP|URL@A..B")
def unforget(printer: Printer, checkpoints: Address) -> None:
    """Bring forgotten checkpoints back, as long as `ckpt gc` has not removed their data."""
    if checkpoints.steps is None or checkpoints.steps == "latest":
        raise InvalidInputError("say which step to bring back, as in URL@STEP", kind="bad-address")
    with opened_run(printer, checkpoints) as store:
        folders = find.step_folders(store)
        refuse_no_run(store, folders)
        if isinstance(checkpoints.steps, StepRange):
            forgotten = [step for step in folders if store.exists(names.forgotten_key(step))]
            steps = checkpoints.among(forgotten)
        else:
            steps = [checkpoints.steps]
        for step in steps:
            retention.unforget(store, step)
    printer.document({"url": checkpoints.url, "restored": steps})
    printer.text("\n".join(f"step {step} is back in {checkpoints.url}" for step in steps))
