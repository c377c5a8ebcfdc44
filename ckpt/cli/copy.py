"""`ckpt copy SRC[@STEP] DST`: a checkpoint that stands alone."""

from __future__ import annotations

import click

from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command
from ckpt.cli.printer import Printer
from ckpt.cli.rewrite import memory_option, rewrite
from ckpt.engine.reshard import plan_copy


@command("copy")
@click.argument("source", type=ADDRESS, metavar="SRC[@STEP]")
@click.argument("target", type=ADDRESS, metavar="DST")
@memory_option
def copy(printer: Printer, source: Address, target: Address, memory: str | None) -> None:
    """Copy a checkpoint into the run DST under the same step, cut as it was saved.

    The copy refers to no other checkpoint, also where the source does (`incremental=True`): it needs nothing of the run that it
    came from. Every byte is checked on the way. DST shows nothing until all of it is there.
    """
    rewrite(
        printer,
        source,
        target,
        lambda stored, options: plan_copy(stored, options=options),
        verb="copy",
        memory=memory,
        tell_wanted=False,
    )
