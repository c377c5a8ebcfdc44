"""`ckpt diff URL@A URL@B`: what differs between two checkpoints."""

from __future__ import annotations

from typing import Any

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run
from ckpt.cli.exit_codes import DONE, FAILED
from ckpt.cli.printer import Column, Printer
from ckpt.engine.compare import Difference, compare, plan_comparison
from ckpt.engine.reader import StoredCheckpoint


@command("diff")
@click.argument("before", type=ADDRESS, metavar="URL@A")
@click.argument("after", type=ADDRESS, metavar="URL@B")
@click.option("--exit-code", "use_code", is_flag=True, help="Exit with 1 when they differ.")
def diff(printer: Printer, before: Address, after: Address, use_code: bool) -> int:
    """Compare two checkpoints, of one run or of two: tensors added, removed, reshaped, changed, and objects.

    Tensors that are cut alike are compared by their checksums, others by reading them.
    """
    options = config.from_environment()
    steps = before.one(), after.one()
    with opened_run(printer, before, role="before") as first, opened_run(printer, after, role="after") as second:
        stored = StoredCheckpoint(first, steps[0], options), StoredCheckpoint(second, steps[1], options)
        comparison = plan_comparison(*stored)
        with printer.progress("diff", comparison.read_nbytes) as bar:
            found = compare(comparison, progress=bar.advance)
    printer.document(
        {
            "before": {"url": before.url, "step": stored[0].step},
            "after": {"url": after.url, "step": stored[1].step},
            "same": not found.any,
            "tensors": {
                "added": list(found.added),
                "removed": list(found.removed),
                "reshaped": [_reshaped(item.name, item.before, item.after) for item in found.reshaped],
                "changed": list(found.changed),
                "num_same": found.num_same,
            },
            "objects": {
                "added": list(found.objects_added),
                "removed": list(found.objects_removed),
                "changed": list(found.objects_changed),
            },
        }
    )
    _print(printer, found)
    return FAILED if use_code and found.any else DONE


def _reshaped(name: str, before: Any, after: Any) -> dict[str, Any]:
    return {
        "name": name,
        "before": {"dtype": before.dtype, "shape": list(before.shape)},
        "after": {"dtype": after.dtype, "shape": list(after.shape)},
    }


def _print(printer: Printer, found: Difference) -> None:
    rows: list[tuple[str, str, str]] = [
        *(("removed", name, "") for name in found.removed),
        *(("added", name, "") for name in found.added),
        *(("reshaped", r.name, f"{_form(r.before)} -> {_form(r.after)}") for r in found.reshaped),
        *(("changed", name, "") for name in found.changed),
        *(("removed", f"object {name}", "") for name in found.objects_removed),
        *(("added", f"object {name}", "") for name in found.objects_added),
        *(("changed", f"object {name}", "") for name in found.objects_changed),
    ]
    footer = f"{texts.plural(len(rows), 'difference')}; {texts.plural(found.num_same, 'tensor')} the same"
    printer.table((Column(title="what"), Column(title="name"), Column(title="how")), rows, footer=footer)


def _form(spec: Any) -> str:
    return f"{spec.dtype} {texts.shape(spec.shape)}"
