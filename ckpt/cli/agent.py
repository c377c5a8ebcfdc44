"""`ckpt agent run|status|stop`: the processes that hold snapshots in memory."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from ckpt import config
from ckpt.agent import discover, segments
from ckpt.agent.discover import Found
from ckpt.agent.identity import Identity, memory_folder, parity_folder, run_id_of
from ckpt.agent.segments import Leftover
from ckpt.agent.spawn import arguments
from ckpt.cli import texts
from ckpt.cli.command import command
from ckpt.cli.exit_codes import DONE, PARTLY
from ckpt.cli.printer import Column, Printer
from ckpt.config import Options
from ckpt.errors import CheckpointError, InvalidInputError


@command("agent")
@click.argument("action", type=click.Choice(["run", "status", "stop"]))
@click.argument("url", required=False, metavar="[URL]")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="The agent of this rank only.")
@click.option("--world", type=click.IntRange(min=1), metavar="N", help="Ranks of the job, for `run`.")
@click.option("--all", "every", is_flag=True, help="With `stop`: the agents of all runs.")
@click.option("--force", is_flag=True, help="With `stop`: also agents that a trainer uses.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def agent(printer: Printer, action: str, url: str | None, rank: int | None, **flags: Any) -> int:
    """Run, list or end the agents of this user on this host.

    `run` is the agent of one rank in the foreground; a trainer otherwise starts its own. `status` lists agents and what they
    hold, and the memory that dead ones left. `stop` ends agents and gives back their memory: snapshots in it are lost.
    """
    if url is not None:
        printer.about["run"] = url
    options = config.from_environment()
    if action == "run":
        _run(printer, url, rank, flags["world"], options)
    if action == "stop":
        return _stop(printer, url, rank, options, **{name: flags[name] for name in ("every", "force", "yes")})
    return _status(printer, url, rank, options)


def _run(printer: Printer, url: str | None, rank: int | None, world: int | None, options: Options) -> NoReturn:
    if url is None or rank is None or world is None:
        raise InvalidInputError("`ckpt agent run` needs URL, --rank and --world", kind="usage")
    identity = Identity(run_id=run_id_of(url), rank=rank, world=world)
    command = [sys.executable, "-m", "ckpt.agent", *arguments(identity, options)]
    command += ["--say", "json" if printer.json else "nothing" if printer.quiet else "text"]
    sys.stdout.flush()
    os.execv(command[0], command)  # the same process, without what the command line has imported: torch, 300 MB


def _status(printer: Printer, url: str | None, rank: int | None, options: Options) -> int:
    found, left = _look(url, rank, options)
    printer.document(
        {"action": "status", "agents": [_record(one) for one in found], "leftovers": [_left(one) for one in left]}
    )
    _print_agents(printer, found)
    if left:
        printer.text("")
        _print_leftovers(printer, left)
    return PARTLY if any(one.status is None for one in found) else DONE


def _stop(
    printer: Printer, url: str | None, rank: int | None, options: Options, *, every: bool, force: bool, yes: bool
) -> int:
    if (url is None) != every:
        raise InvalidInputError("name the run whose agents are to end, or give --all", kind="usage")
    found, left = _look(url, rank, options)
    if found or left:
        _print_agents(printer, found)
        nbytes = sum(one.nbytes for one in left)
        what = f"{texts.plural(len(found), 'agent')} and {texts.size(nbytes)} that dead ones left"
        printer.confirm(f"End {what}? Snapshots in their memory are lost.", yes=yes)
    failed: list[dict[str, Any]] = []
    for one in found:
        try:
            discover.stop(one, options, force=force)
        except CheckpointError as error:
            failed.append(
                {
                    "rank": one.identity.rank,
                    "run_id": one.identity.run_id.hex,
                    "kind": error.kind,
                    "error": error.message,
                }
            )
            printer.note(f"rank {one.identity.rank}: {error.message}")
    removed = [one for one in left if segments.remove(one)]
    printer.document(
        {
            "action": "stop",
            "num_stopped": len(found) - len(failed),
            "failed": failed,
            "leftovers_removed": [_left(one) for one in removed],
        }
    )
    printer.text(
        f"{texts.plural(len(found) - len(failed), 'agent')} ended, {texts.plural(len(removed), 'leftover')} removed"
    )
    return PARTLY if failed else DONE


def _look(url: str | None, rank: int | None, options: Options) -> tuple[list[Found], list[Leftover]]:
    run_id = run_id_of(url) if url is not None else None
    left = [
        one
        for folder in (memory_folder(options), parity_folder(options))
        for one in segments.leftovers(folder)
        if (run_id is None or (one.header is not None and one.header.run_id == run_id))
        and (rank is None or (one.header is not None and one.header.rank == rank))
    ]
    return discover.agents(options, run_id=run_id, rank=rank), left


def _record(found: Found) -> dict[str, Any]:
    """An agent for JSON; null for what it did not say."""
    status = found.status or {}
    names = ("pid", "world", "incarnation", "epoch", "protocol", "state", "trainer_pid", "lease_left_s", "uptime_s")
    return {
        "run_id": found.identity.run_id.hex,
        "rank": found.identity.rank,
        **{name: status.get(name) for name in names},
        "segments": status.get("segments", []),
        "pss_bytes": found.pss_bytes,
        "error": found.error or None,
    }


def _left(leftover: Leftover) -> dict[str, Any]:
    header = leftover.header
    return {
        "name": leftover.path.name,
        "nbytes": leftover.nbytes,
        "run_id": header.run_id.hex if header else None,
        "rank": header.rank if header else None,
        "state": header.state.name if header else None,
        "step": header.step if header else None,
    }


def _print_agents(printer: Printer, found: list[Found]) -> None:
    columns = (
        Column(title="run"),
        Column(title="rank", right=True),
        Column(title="pid", right=True),
        Column(title="state"),
        Column(title="trainer", right=True),
        Column(title="lease left", right=True),
        Column(title="memory", right=True),
        Column(title="images"),
    )
    rows = []
    for one in found:
        start = (one.identity.run_id.hex[:12], one.identity.rank)
        if one.status is None:
            rows.append((*start, "-", "does not answer", "-", "-", "-", one.error))
            continue
        status = one.status
        images = (
            f"{s['step']} {s['state'].lower()} {texts.size(s['image_bytes'])}"
            for s in status["segments"]
            if s["step"] >= 0
        )
        rows.append(
            (
                *start,
                status["pid"],
                status["state"],
                status["trainer_pid"] or "-",
                texts.duration(status["lease_left_s"]),
                texts.size(one.pss_bytes) if one.pss_bytes is not None else "-",
                ", ".join(images) or "none",
            )
        )
    printer.table(columns, rows, footer=texts.plural(len(found), "agent"))


def _print_leftovers(printer: Printer, left: list[Leftover]) -> None:
    columns = (Column(title="left by a dead agent"), Column(title="size", right=True), Column(title="state"))
    rows = [
        (one.path.name, texts.size(one.nbytes), one.header.state.name.lower() if one.header else "-") for one in left
    ]
    printer.table(columns, rows, footer="the next agent of the same run and rank takes them over")
