"""`ckpt forget URL[@...]`: the first of two steps that delete. Data stay until `ckpt gc`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import click

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened_run, refuse_no_run
from ckpt.cli.printer import Column, Printer
from ckpt.commit import find, names, pins, retention
from ckpt.commit.retention import Policy, StepRecord, Verdict
from ckpt.errors import InvalidInputError
from ckpt.format import manifest
from ckpt.store.base import Store


@command("forget")
@click.argument("checkpoints", type=ADDRESS, metavar="URL[@STEP|@A..B]")
@click.option("--keep-last", type=int, metavar="N", help="Keep the newest N.")
@click.option("--keep-every", type=int, metavar="K", help="Keep steps divisible by K.")
@click.option("--keep-best", type=int, metavar="N", help="Keep the N best by --metric.")
@click.option("--metric", metavar="NAME", help="A metric saved with the checkpoints, for --keep-best.")
@click.option("--mode", type=click.Choice(("min", "max")), default="min", show_default=True, help="What is best.")
@click.option(
    "--keep", "keep_steps", type=int, multiple=True, metavar="STEP", help="Keep this step; may be given often."
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be kept and forgotten, and why.")
def forget(printer: Printer, checkpoints: Address, dry_run: bool, **rules: Any) -> None:
    """Forget checkpoints: those named, or those that no keep rule keeps (the newest is always kept).

    Forgotten checkpoints cannot be loaded. `ckpt unforget` brings them back until `ckpt gc` has removed their data.
    """
    policy = _policy(rules)
    if (policy is None) == (checkpoints.steps is None):
        raise InvalidInputError(
            "say what to forget: either steps, as in URL@STEP or URL@A..B, or rules that keep, as in --keep-last 3",
            kind="no-policy",
        )
    with opened_run(printer, checkpoints) as store:
        refuse_no_run(store, find.step_folders(store))
        verdicts = _verdicts(store, checkpoints, policy)
        going = [verdict.step for verdict in verdicts if not verdict.keep]
        if not dry_run:
            retention.forget(store, going)
    printer.document(
        {
            "url": checkpoints.url,
            "dry_run": dry_run,
            "checkpoints": [{"step": v.step, "keep": v.keep, "reason": v.reason} for v in verdicts],
            "forgotten": [] if dry_run else going,
        }
    )
    _print(printer, checkpoints.url, verdicts, dry_run)


def _policy(rules: dict[str, Any]) -> Policy | None:
    given = {
        name: rules[name] for name in ("keep_last", "keep_every", "keep_best", "metric") if rules[name] is not None
    }
    if not given and not rules["keep_steps"]:
        return None
    return Policy(
        last=rules["keep_last"],
        every=rules["keep_every"],
        best=rules["keep_best"],
        metric=rules["metric"],
        mode=cast(Literal["min", "max"], rules["mode"]),
        steps=tuple(rules["keep_steps"]),
    )


def _verdicts(store: Store, checkpoints: Address, policy: Policy | None) -> list[Verdict]:
    complete = find.steps(store)
    if policy is None:
        named = checkpoints.among(complete)
        return [
            Verdict(step=step, keep=step not in named, reason="named" if step in named else "not named")
            for step in complete
        ]
    records = []
    for step in complete:
        key = names.manifest_key(step)
        records.append(StepRecord(step=step, metrics=manifest.unpack(store.read(key), name=key).metrics))
    return retention.decide(records, policy, pins.pinned(store, complete))


def _print(printer: Printer, url: str, verdicts: Sequence[Verdict], dry_run: bool) -> None:
    columns = (Column(title="step", right=True), Column(title="verdict"), Column(title="reason"))
    rows = [(v.step, "keep" if v.keep else "forget", v.reason) for v in verdicts]
    going = sum(not v.keep for v in verdicts)
    verb = "would be forgotten" if dry_run else "forgotten"
    footer = f"{texts.plural(len(verdicts) - going, 'checkpoint')} kept, {going} {verb}"
    printer.table(columns, rows, footer=footer)
    if going and not dry_run:
        printer.note(f"`ckpt gc {url}` frees the space; until then `ckpt unforget {url}@STEP` brings a checkpoint back")
