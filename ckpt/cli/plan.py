"""`ckpt plan URL@STEP`: what a reshard would read and write, without doing it."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened, target_layout, target_options
from ckpt.cli.printer import Column, Printer
from ckpt.engine.reshard import ReshardPlan, TargetImage, plan_reshard
from ckpt.layout.document import to_document
from ckpt.layout.layout import Layout


@command("plan")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@target_options
def plan(printer: Printer, checkpoint: Address, **target: Any) -> None:
    """Show what each rank of another layout would read of a checkpoint, and what `ckpt reshard` would write for it.

    Reads the index only.
    """
    with opened(printer, checkpoint) as stored:
        layout = target_layout(stored, target)
        made = plan_reshard(stored, layout, options=stored.options)
        ranks = [_rank(made, layout, image) for image in made.images]
        once = made.all_reads()
    document = {
        "url": checkpoint.url,
        "step": stored.step,
        "layout": to_document(layout),
        "ranks": ranks,
        "tensor_bytes": stored.manifest.tensor_bytes,
        "load": _amount(sum(rank["held_bytes"] for rank in ranks), sum(rank["read_bytes"] for rank in ranks)),
        "reshard": {
            **_amount(once.wanted_nbytes, once.read_nbytes),
            "written_bytes": sum(rank["written_bytes"] for rank in ranks),
        },
    }
    printer.document(document)
    _print(printer, document)


def _amount(wanted: int, read: int) -> dict[str, Any]:
    return {"wanted_bytes": wanted, "read_bytes": read, "read_ratio": read / wanted if wanted else 1.0}


def _rank(made: ReshardPlan, layout: Layout, image: TargetImage) -> dict[str, Any]:
    reads = made.reads(image.held)
    return {
        "rank": image.rank,
        "coordinate": dict(zip(layout.mesh.names, layout.mesh.coordinate(image.rank), strict=True)),
        "held_bytes": reads.wanted_nbytes,
        "read_bytes": reads.read_nbytes,
        "num_reads": len(reads.writer),
        "files": [made.stored.image_keys[writer] for writer in np.unique(reads.writer).tolist()],
        "written_bytes": image.nbytes,
    }


def _print(printer: Printer, document: dict[str, Any]) -> None:
    columns = (
        Column(title="rank", right=True),
        Column(title="place"),
        Column(title="holds", right=True),
        Column(title="reads", right=True),
        Column(title="requests", right=True),
        Column(title="files", right=True),
        Column(title="image", right=True),
    )
    rows = [
        (
            rank["rank"],
            " ".join(f"{axis}={index}" for axis, index in rank["coordinate"].items()) or "-",
            texts.size(rank["held_bytes"]),
            texts.size(rank["read_bytes"]),
            rank["num_reads"],
            len(rank["files"]),
            texts.size(rank["written_bytes"]),
        )
        for rank in document["ranks"]
    ]
    load, reshard = document["load"], document["reshard"]
    footer = (
        f"load on {texts.plural(len(rows), 'rank')}: {_ratio(load)}\n"
        f"reshard in one process: {_ratio(reshard)}, {texts.size(reshard['written_bytes'])} written"
    )
    printer.table(columns, rows, footer=footer)


def _ratio(amount: dict[str, Any]) -> str:
    wanted, read = texts.size(amount["wanted_bytes"]), texts.size(amount["read_bytes"])
    return f"{read} read for {wanted} wanted ({amount['read_ratio']:.3f} times)"
