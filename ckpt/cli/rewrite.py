"""Write a checkpoint anew into another run, under the same step, and say what was done: what `copy` and `reshard` share.

In: parsed addresses and how to plan. Out: a published checkpoint; a document and a line for the user.
"""

from __future__ import annotations

from collections.abc import Callable

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import opened, opened_run
from ckpt.cli.printer import Printer
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import ReshardPlan, carry_out
from ckpt.errors import InvalidInputError

MakePlan = Callable[[StoredCheckpoint, Options], ReshardPlan]

memory_option = click.option(
    "--memory", metavar="SIZE", help="Memory for images in the making; default: a quarter of what is free."
)


def rewrite(
    printer: Printer,
    source: Address,
    target: Address,
    make_plan: MakePlan,
    *,
    verb: str,
    memory: str | None,
    tell_wanted: bool,
) -> None:
    """Carry out the plan that `make_plan` makes of the opened source.

    Args:
        verb: for the progress bar.
        memory: for images in the making, as the user wrote it.
        tell_wanted: whether the document says how many bytes the plan wants of the source.
    """
    if target.steps is not None:
        raise InvalidInputError(
            "the step stays what it was: name the run to write into without `@`", kind="bad-address"
        )
    memory_bytes = texts.parse_size(memory) if memory is not None else None
    options = config.from_environment()
    with opened(printer, source) as stored, opened_run(printer, target, role="target") as into:
        refuse_existing(into, stored.step)
        plan = make_plan(stored, options)
        with printer.progress(f"{verb} step {stored.step}", plan.work_nbytes) as bar:
            done = carry_out(plan, into, options=options, memory_bytes=memory_bytes, progress=bar.advance)
    printer.document(
        {
            "source": {"url": source.url, "step": stored.step},
            "target": {"url": target.url, "step": done.step},
            "attempt": done.attempt,
            "num_images": done.num_images,
            **({"wanted_bytes": done.wanted_nbytes} if tell_wanted else {}),
            "read_bytes": done.read_nbytes,
            "written_bytes": done.written_nbytes,
            "seconds": round(done.seconds, 3),
        }
    )
    printer.text(
        f"step {done.step} is in {target.url}: {texts.plural(done.num_images, 'image')}, {texts.size(done.written_nbytes)}"
        f" written, {texts.size(done.read_nbytes)} read, {texts.duration(done.seconds)}"
    )
