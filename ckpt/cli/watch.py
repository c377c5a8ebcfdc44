"""`ckpt watch RUN --recipe online.yaml`: keep an average of a run up while its checkpoints land."""

from __future__ import annotations

import functools
import json
import sys
import time

import click

from ckpt import config
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command
from ckpt.cli.printer import Printer, describe
from ckpt.commit import find
from ckpt.errors import InvalidInputError, StoreError
from ckpt.merge import api
from ckpt.merge.online import Told, Updater
from ckpt.merge.online_recipe import rule_from
from ckpt.store.open import open_store


@command("watch")
@click.argument("run", type=ADDRESS, metavar="URL")
@click.option("--recipe", required=True, metavar="FILE", help="Which average, and where to (docs/reference/recipe.md).")
@click.option(
    "--poll", type=float, default=5.0, show_default=True, metavar="SECONDS", help="Look so often for new checkpoints."
)
@click.option("--until", type=int, metavar="STEP", help="End when a checkpoint of this step, or a later one, is in.")
@click.option("--once", is_flag=True, help="Bring the average up to date, and end.")
def watch(printer: Printer, run: Address, recipe: str, poll: float, until: int | None, once: bool) -> None:
    """Keep an average of a run up while its checkpoints land, from outside the job.

    Ends when interrupted, and goes on where it was when it is started again. With --json it prints one line for each thing that
    happens. A store that cannot be reached is tried again at the next look.
    """
    if run.steps is not None:
        raise InvalidInputError("watch looks at a whole run: name it without `@`", kind="bad-address")
    if not poll > 0:
        raise InvalidInputError(f"--poll must be positive, found {poll}", kind="usage")
    options = config.from_environment()
    rule = rule_from(api.recipe_file(recipe))
    store = open_store(run.url, options=options)
    updater = Updater(run.url, rule, options, functools.partial(open_store, options=options))
    try:
        updater.pin()
        seen: list[int] | None = None
        while True:
            steps = find.steps(store)
            if steps != seen and _caught_up(printer, updater, once=once):
                seen = steps
            if once or (until is not None and seen and seen[-1] >= until):
                return
            time.sleep(poll)
    finally:
        updater.close()
        store.close()


def _caught_up(printer: Printer, updater: Updater, *, once: bool) -> bool:
    """One round; whether it ended well. With `once` a failure is raised."""
    try:
        updater.catch_up(lambda told: _tell(printer, told))
    except StoreError as error:
        if once:
            raise
        describe(error, printer)
        return False
    return True


def _tell(printer: Printer, told: Told) -> None:
    if printer.json:
        sys.stdout.write(json.dumps(vars(told)) + "\n")
        sys.stdout.flush()
    elif told.kind in ("late", "skipped", "failed"):
        printer.note(f"warning: {told.text}")
    else:
        printer.text(told.text + (f" ({told.applied} checkpoints)" if told.kind == "published" else ""))
