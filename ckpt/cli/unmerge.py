"""`ckpt unmerge URL[@STEP] [SOURCE] -o URL`: one source of a reversible merge, given back."""

from __future__ import annotations

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened
from ckpt.cli.printer import Column, Printer
from ckpt.errors import InvalidInputError
from ckpt.kernels.merge import FloatDtype
from ckpt.merge.nodes import Node
from ckpt.merge.recipe import size_of
from ckpt.merge.unmerge import Inside, carry_out_recipe, find_inside, recipe_for, sources_inside


@command("unmerge")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@click.argument("source", required=False)
@click.option(
    "-o", "--output", type=ADDRESS, metavar="URL[@STEP]", help="The run to write into; the step is the source's."
)
@click.option(
    "--dtype", type=click.Choice(tuple(FloatDtype.__members__)), help="Of parameters; default: what the source had."
)
@click.option("--memory", metavar="SIZE", help="Memory that all processes together may take.")
@click.option("--workers", type=int, metavar="N", help="Processes; default: 1.")
def unmerge(
    printer: Printer,
    checkpoint: Address,
    source: str | None,
    output: Address | None,
    dtype: str | None,
    memory: str | None,
    workers: int | None,
) -> None:
    """Give back one source of a merge that was made with `--method reversible`.

    SOURCE is its step, or its address as it was merged. Without one: list what is inside, and how near to what it was each
    source comes back (relative to the length of its parameters, at most).
    """
    if (source is None) != (output is None):
        raise InvalidInputError("say both which source and where it goes: SOURCE -o URL", kind="usage")
    limits = {"workers": workers} if workers is not None else {}
    if memory is not None:
        limits["memory"] = size_of(Node(memory, "--memory"))
    with opened(printer, checkpoint) as stored:
        inside = sources_inside(stored)
        if source is None or output is None:
            _list(printer, inside)
            return
        one = find_inside(stored, source)
        step = None if output.steps is None else output.one()
        if step == "latest":
            raise InvalidInputError("the step of a result is a number: -o URL@STEP", kind="bad-address")
        recipe = recipe_for(stored, checkpoint.url, one, into=output.url, step=step, dtype=dtype, limits=limits)
    done = carry_out_recipe(recipe, config.from_environment())
    printer.document(
        {
            "source": _document(one),
            "target": {"url": output.url, "step": done.step},
            "read_bytes": done.read_nbytes,
            "written_bytes": done.written_nbytes,
            "seconds": round(done.seconds, 3),
        }
    )
    printer.text(
        f"step {done.step} is in {output.url}: {one.label}, but for an error of {one.error:.2g} at most, "
        f"{texts.size(done.written_nbytes)} written, {texts.duration(done.seconds)}"
    )


def _list(printer: Printer, inside: list[Inside]) -> None:
    printer.document({"sources": [_document(one) for one in inside]})
    columns = (Column(title="source"), Column(title="step", right=True), Column(title="error at most", right=True))
    rows = [(one.label, "-" if one.step is None else str(one.step), f"{one.error:.2g}") for one in inside]
    printer.table(columns, rows)


def _document(one: Inside) -> dict[str, object]:
    return {"label": one.label, "step": one.step, "dtypes": list(one.dtypes), "error": one.error}
