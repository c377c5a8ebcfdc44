"""`ckpt explain URL[@STEP] [GLOB]`: where every tensor of a merged checkpoint came from."""

from __future__ import annotations

import fnmatch
from typing import Any

import click

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened
from ckpt.cli.printer import Column, Printer
from ckpt.merge.lineage import KEY, Origin
from ckpt.merge.lineage import explain as origins_of

_SHARES_SHOWN = 4


@command("explain")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@click.argument("glob", required=False)
def explain(printer: Printer, checkpoint: Address, glob: str | None) -> None:
    """Show where the tensors of a merged checkpoint came from, with what weight; those whose name matches GLOB.

    Reads the manifest and the index only: the sources need not be there any more.
    """
    with opened(printer, checkpoint) as stored:
        origins = origins_of(stored.manifest, [spec.name for spec in stored.specs])
        record = stored.manifest.metadata[KEY]
    shown = [origin for origin in origins if glob is None or fnmatch.fnmatchcase(origin.name, glob)]
    printer.document(
        {
            "url": checkpoint.url,
            "step": stored.step,
            "program": record["program"],
            "recipe": record["recipe"],
            "sources": record["sources"],
            "base": record["base"],
            "tensors": [_document(origin) for origin in shown],
        }
    )
    columns = (Column(title="tensor"), Column(title="how"), Column(title="from"))
    rows = [(origin.name, _how(origin), _from(origin)) for origin in shown]
    footer = f"{texts.plural(len(rows), 'tensor')}, step {stored.step}, made by {record['program']}"
    printer.table(columns, rows, footer=footer)


def _document(origin: Origin) -> dict[str, Any]:
    return {
        "name": origin.name,
        "policy": origin.policy,
        "why": origin.why,
        "method": origin.method,
        "parameters": dict(origin.parameters),
        "shares": [vars(share) for share in origin.shares],
    }


def _how(origin: Origin) -> str:
    if origin.policy == "combine" or origin.method is not None:
        return origin.method or "combined"
    return {"same": "copied, compared", "reset": "reset"}.get(origin.policy, "copied")


def _from(origin: Origin) -> str:
    parts = [
        (f"{share.weight:.4g} x " if share.weight is not None else "")
        + share.source
        + (" (master copy)" if share.master else "")
        for share in origin.shares
    ]
    more = [f"and {len(parts) - _SHARES_SHOWN} more"] if len(parts) > _SHARES_SHOWN else []
    return ", ".join([*parts[:_SHARES_SHOWN], *more])
