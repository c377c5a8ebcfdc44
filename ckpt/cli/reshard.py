"""`ckpt reshard SRC[@STEP] DST`: lay a checkpoint out anew."""

from __future__ import annotations

from typing import Any

import click

from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, target_layout, target_options
from ckpt.cli.printer import Printer
from ckpt.cli.rewrite import memory_option, rewrite
from ckpt.engine.reshard import plan_reshard


@command("reshard")
@click.argument("source", type=ADDRESS, metavar="SRC[@STEP]")
@click.argument("target", type=ADDRESS, metavar="DST")
@target_options
@memory_option
def reshard(printer: Printer, source: Address, target: Address, memory: str | None, **aim: Any) -> None:
    """Write a checkpoint into the run DST under the same step, cut for other ranks.

    Loading needs no such step: any layout loads from any other. It is worth its while before many loads, or for other
    readers. DST shows nothing until all of it is there.
    """
    rewrite(
        printer,
        source,
        target,
        lambda stored, options: plan_reshard(stored, target_layout(stored, aim), options=options),
        verb="reshard",
        memory=memory,
        tell_wanted=True,
    )
