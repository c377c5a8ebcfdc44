"""`ckpt tensors URL@STEP [GLOB]`: the tensors of one checkpoint."""

from __future__ import annotations

import fnmatch

import click
import numpy as np

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened
from ckpt.cli.printer import Column, Printer


@command("tensors")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@click.argument("glob", required=False)
def tensors(printer: Printer, checkpoint: Address, glob: str | None) -> None:
    """List the tensors of one checkpoint whose name (or alias) matches GLOB; `*` also matches `/` and `.`."""
    with opened(printer, checkpoint) as stored:
        specs = stored.specs
        ids = [i for i, s in enumerate(specs) if any(_matches(name, glob) for name in (s.name, *s.aliases))]
        fragments = stored.fragments(np.array(ids, np.int32)) if ids else None
    counts = np.zeros(len(specs), np.int64)
    if fragments is not None:
        counts = np.bincount(fragments.boxes.tensor, minlength=len(specs))
    records = [
        {
            "name": specs[i].name,
            "role": specs[i].role,
            "dtype": specs[i].dtype,
            "shape": list(specs[i].shape),
            "nbytes": specs[i].nbytes,
            "num_fragments": int(counts[i]),
            "aliases": list(specs[i].aliases),
        }
        for i in ids
    ]
    printer.document({"url": checkpoint.url, "step": stored.step, "tensors": records})
    columns = (
        Column(title="name"),
        Column(title="role"),
        Column(title="dtype"),
        Column(title="shape"),
        Column(title="fragments", right=True),
        Column(title="size", right=True),
    )
    rows = [
        (
            s.name + "".join(f" = {a}" for a in s.aliases),
            s.role,
            s.dtype,
            texts.shape(s.shape),
            counts[i],
            texts.size(s.nbytes),
        )
        for i, s in ((i, specs[i]) for i in ids)
    ]
    total = sum(specs[i].nbytes for i in ids)
    printer.table(columns, rows, footer=f"{texts.plural(len(ids), 'tensor')}, {texts.size(total)}, step {stored.step}")


def _matches(name: str, glob: str | None) -> bool:
    return glob is None or fnmatch.fnmatchcase(name, glob)
