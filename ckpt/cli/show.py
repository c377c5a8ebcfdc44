"""`ckpt show URL@STEP`: what one checkpoint says of itself."""

from __future__ import annotations

import json
from typing import Any

import click

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened, opened_run, saved_layout
from ckpt.cli.printer import Column, Printer, plain
from ckpt.cli.timing import show_timing
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.layout.files import write_layout
from ckpt.merge.lineage import KEY as LINEAGE


@command("show")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@click.option("--layout", "only_layout", is_flag=True, help="Print the saved layout, in the form of a layout file.")
@click.option("--timing", is_flag=True, help="Print where the time of the save went, by phase over the ranks.")
def show(printer: Printer, checkpoint: Address, only_layout: bool, timing: bool) -> None:
    """Show one checkpoint: when and by whom it was saved, sizes, files, objects, metrics and metadata."""
    if timing:
        if only_layout:
            raise InvalidInputError("--layout and --timing print different things: give one of them")
        with opened_run(printer, checkpoint) as store:
            show_timing(printer, checkpoint, store)
        return
    with opened(printer, checkpoint) as stored:
        if only_layout:
            _show_layout(printer, checkpoint, stored)
            return
        document = _document(checkpoint, stored)
    printer.document(document)
    _print(printer, document)


def _show_layout(printer: Printer, checkpoint: Address, stored: StoredCheckpoint) -> None:
    layout = saved_layout(stored)
    if layout is None:
        raise CheckpointError(
            f"the layout of step {stored.step} is not recorded",
            kind="no-layout",
            hints=("`ckpt plan` and `ckpt reshard` take a layout file of yours all the same",),
        )
    printer.document({"url": checkpoint.url, "step": stored.step, "layout": stored.manifest.layout})
    printer.text(write_layout(layout))


def _document(checkpoint: Address, stored: StoredCheckpoint) -> dict[str, Any]:
    found = stored.manifest
    index = sum(record.nbytes for record in (found.tensors, found.fragments, found.objects))
    return {
        "url": checkpoint.url,
        "step": stored.step,
        "attempt": found.attempt,
        "created": found.created,
        "program": found.program,
        "world": found.world,
        "block_bytes": found.block_bytes,
        "num_tensors": found.num_tensors,
        "num_fragments": found.num_fragments,
        "tensor_bytes": found.tensor_bytes,
        "index_bytes": index,
        "stored_bytes": index + sum(writer.nbytes for writer in found.writers),
        "images": [{"file": f"{stored.folder}/{writer.file}", "nbytes": writer.nbytes} for writer in found.writers],
        "references": [
            {"step": one.step, "file": image.key, "nbytes": one.nbytes, "used_bytes": one.used_bytes}
            for one, image in zip(found.references, stored.images[len(found.writers) :], strict=True)
        ],
        "objects": [
            {"name": row.name, "kind": row.kind, "rank": row.rank, "nbytes": row.nbytes} for row in stored.objects
        ],
        "metrics": found.metrics,
        "metadata": found.metadata,
        "layout": found.layout,
    }


def _print(printer: Printer, shown: dict[str, Any]) -> None:
    layout = "recorded; `ckpt show --layout` prints it" if shown["layout"] is not None else "not recorded"
    facts = (
        ("run", shown["url"]),
        ("step", shown["step"]),
        (
            "saved",
            f"{texts.local_time(shown['created'])} by {shown['program']} on {texts.plural(shown['world'], 'rank')}",
        ),
        (
            "tensors",
            f"{shown['num_tensors']:,} of {texts.size(shown['tensor_bytes'])}, in {shown['num_fragments']:,} fragments",
        ),
        ("stored", f"{texts.size(shown['stored_bytes'])}, {texts.size(shown['index_bytes'])} of it index"),
        *_referred(shown["references"]),
        ("attempt", shown["attempt"]),
        ("layout", layout),
        *((f"metric {name}", f"{value:.6g}") for name, value in shown["metrics"].items()),
        *((f"metadata {name}", _short(name, value)) for name, value in shown["metadata"].items()),
    )
    width = max(len(name) for name, _ in facts) + 1
    printer.text("\n".join(f"{name + ':':<{width}} {value}" for name, value in facts) + "\n")
    printer.text("")
    printer.table(
        (Column(title="file"), Column(title="size", right=True)),
        [(image["file"], texts.size(image["nbytes"])) for image in shown["images"]],
    )
    if shown["references"]:
        printer.text("")
        printer.table(
            (Column(title="file of another step"), Column(title="used", right=True), Column(title="size", right=True)),
            [(one["file"], texts.size(one["used_bytes"]), texts.size(one["nbytes"])) for one in shown["references"]],
        )
    if shown["objects"]:
        printer.text("")
        columns = (
            Column(title="object"),
            Column(title="kind"),
            Column(title="rank", right=True),
            Column(title="size", right=True),
        )
        rows = [(o["name"], o["kind"], o["rank"], texts.size(o["nbytes"])) for o in shown["objects"]]
        printer.table(columns, rows)


def _short(name: str, value: Any) -> str:
    """Metadata as one line; the lineage of a merge has a command of its own."""
    if name == LINEAGE and isinstance(value, dict) and isinstance(value.get("sources"), list):
        return f"of {texts.plural(len(value['sources']), 'source')}; `ckpt explain` tells more"
    return json.dumps(plain(value))


def _referred(references: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One line on what lies in images of other steps."""
    if not references:
        return []
    steps = ", ".join(str(step) for step in sorted({one["step"] for one in references}))
    nbytes = sum(one["used_bytes"] for one in references)
    return [("refers to", f"{texts.size(nbytes)} in {texts.plural(len(references), 'file')} of step {steps}")]
