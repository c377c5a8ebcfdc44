"""`ckpt copy SRC[@STEP] DST`: a checkpoint that stands alone."""

from __future__ import annotations

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened, opened_run
from ckpt.cli.printer import Printer
from ckpt.commit.publish import refuse_existing
from ckpt.engine.reshard import carry_out, plan_copy
from ckpt.errors import InvalidInputError


@command("copy")
@click.argument("source", type=ADDRESS, metavar="SRC[@STEP]")
@click.argument("target", type=ADDRESS, metavar="DST")
@click.option("--memory", metavar="SIZE", help="Memory for images in the making; default: a quarter of what is free.")
def copy(printer: Printer, source: Address, target: Address, memory: str | None) -> None:
    """Copy a checkpoint into the run DST under the same step, cut as it was saved.

    The copy refers to no other checkpoint, also where the source does (`incremental=True`): it needs nothing of the run that it
    came from. Every byte is checked on the way. DST shows nothing until all of it is there.
    """
    if target.steps is not None:
        raise InvalidInputError(
            "the step stays what it was: name the run to write into without `@`", kind="bad-address"
        )
    memory_bytes = texts.parse_size(memory) if memory is not None else None
    options = config.from_environment()
    with opened(printer, source) as stored, opened_run(printer, target, role="target") as into:
        refuse_existing(into, stored.step)
        plan = plan_copy(stored, options=options)
        with printer.progress(f"copy step {stored.step}", plan.work_nbytes) as bar:
            done = carry_out(plan, into, options=options, memory_bytes=memory_bytes, progress=bar.advance)
    printer.document(
        {
            "source": {"url": source.url, "step": stored.step},
            "target": {"url": target.url, "step": done.step},
            "attempt": done.attempt,
            "num_images": done.num_images,
            "read_bytes": done.read_nbytes,
            "written_bytes": done.written_nbytes,
            "seconds": round(done.seconds, 3),
        }
    )
    printer.text(
        f"step {done.step} is in {target.url}: {texts.plural(done.num_images, 'image')}, {texts.size(done.written_nbytes)}"
        f" written, {texts.size(done.read_nbytes)} read, {texts.duration(done.seconds)}"
    )
