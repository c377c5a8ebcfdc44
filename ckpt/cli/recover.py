"""`ckpt recover URL`: what is left of a run where, and back to a store with it."""

from __future__ import annotations

from typing import Any

import click

from ckpt import config
from ckpt.agent.inventory import Candidate
from ckpt.agent.survey import Asked, Holding
from ckpt.cli import recover_to, texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command
from ckpt.cli.exit_codes import DONE
from ckpt.cli.printer import Column, Printer
from ckpt.cli.recover_to import Wanted
from ckpt.cli.rewrite import memory_option
from ckpt.cli.standing import STORED_SHOWN_MAX, Standing, label, look, nothing
from ckpt.errors import InvalidInputError


@command("recover")
@click.argument("run", type=ADDRESS, metavar="URL[@STEP]")
@click.option("--to", "target", type=ADDRESS, metavar="URL", help="Write the newest recoverable step into this run.")
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="This step only.")
@click.option(
    "--approximate",
    type=click.Choice(["checkfree"]),
    help="Make up a pipeline stage that is lost on every tier out of its neighbours. Not the state that was saved.",
)
@click.option("--layers", metavar="PATTERN", help="Names of layers, as layers.{}.** has it; for --approximate.")
@click.option("--num-layers", type=click.IntRange(min=1), metavar="N", help="Where no stored checkpoint tells it.")
@click.option("--weights", metavar="FILE", help="JSON: layer number to its gradient norm; else the metrics tell them.")
@click.option("--equal-weights", is_flag=True, help="Without gradient norms: both neighbours count the same.")
@memory_option
def recover(printer: Printer, run: Address, target: Address | None, step: int | None, **flags: Any) -> int:
    """Show what is left of a run in memory and on the store, which step can be had back, and what would be lost.

    Asks the agents of this user on this host, and through them those of other nodes. With --to the newest recoverable step is
    written to a store as a normal checkpoint, for when the trainers cannot come back; agents are kept from ending meanwhile. A
    restarted trainer needs none of this: `Checkpointer.restore` does the same by itself.
    """
    wanted = _wanted(run, step, flags)
    printer.about["run"] = run.url
    options = config.from_environment()
    standing = look(run.url, options, hold=target is not None)
    document = _document(run, standing, wanted.step)
    if target is None and wanted.approximate is None:
        printer.document(document)
        _print(printer, standing, wanted.step)
        if not standing.recoverable(wanted.step):
            raise nothing(standing, run.url, wanted.step)
        return DONE
    if not printer.json:
        _print(printer, standing, wanted.step)
    with Holding(standing.survey, options) as holding:
        for address, error in holding.refused.items():
            printer.note(f"agent {address} could not be held: {error}")
        if wanted.approximate is not None:
            from ckpt.cli.approximate import approximate  # needs torch, whose import no other command should wait for

            document["approximated"] = approximate(printer, run, target, standing, wanted, options)
        else:
            assert target is not None
            if not standing.recoverable(wanted.step):
                raise nothing(standing, run.url, wanted.step)
            document["written"] = recover_to.write(printer, run, target, standing, wanted, options)
    printer.document(document)
    return DONE


def _wanted(run: Address, step: int | None, flags: dict[str, Any]) -> Wanted:
    named = run.one() if run.steps is not None else None
    if step is not None and named not in (None, step):
        raise InvalidInputError(f"`{run.url}@{named}` and --step {step} name different steps", kind="usage")
    step = step if step is not None else (named if isinstance(named, int) else None)
    approximate = flags["approximate"]
    given = [f"--{name.replace('_', '-')}" for name in ("layers", "num_layers", "weights") if flags[name] is not None]
    given += ["--equal-weights"] if flags["equal_weights"] else []
    if given and approximate is None:
        raise InvalidInputError(f"{given[0]} goes with --approximate", kind="usage")
    if approximate is not None and flags["layers"] is None:
        raise InvalidInputError(
            "--approximate needs --layers: which part of a name is the number of the layer",
            kind="usage",
            hints=("for example --layers 'layers.{}.**'",),
        )
    if flags["weights"] is not None and flags["equal_weights"]:
        raise InvalidInputError("--weights and --equal-weights contradict each other", kind="usage")
    memory = flags["memory"]
    return Wanted(
        step=step,
        approximate=approximate,
        layers=flags["layers"] or "",
        num_layers=flags["num_layers"],
        weights_file=flags["weights"],
        equal_weights=flags["equal_weights"],
        memory_bytes=texts.parse_size(memory) if memory is not None else None,
    )


def _document(run: Address, standing: Standing, step: int | None) -> dict[str, Any]:
    best = next(iter(standing.recoverable(step)), None)
    newest = standing.newest
    return {
        "url": run.url,
        "run_id": standing.survey.run_id.hex,
        "agents": [_agent(one) for one in standing.survey.agents],
        "memory": [_candidate(one) for one in standing.candidates],
        "store": {
            "steps": [{"step": number, "attempt": attempt} for number, attempt in standing.stored.steps],
            "error": standing.stored.error or None,
        },
        "leftovers": list(standing.leftovers),
        "newest_step": newest,
        "recoverable": None if best is None else {"step": best[0], "tier": best[1]},
        "lost_steps": None if best is None or newest is None else newest - best[0],
        "written": None,
        "approximated": None,
    }


def _agent(one: Asked) -> dict[str, Any]:
    return {
        "address": one.address,
        "rank": one.rank,
        "here": one.found is not None,
        "listens": one.listens,
        "trainer_pid": one.trainer_pid,
        "error": one.error or None,
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    states = (
        dict.fromkeys(one.held, "held") | dict.fromkeys(one.decodable, "decodable") | dict.fromkeys(one.gone, "lost")
    )
    return {
        "step": one.step,
        "attempt": one.attempt,
        "world": one.world,
        "recoverable": one.recoverable,
        "ranks": [{"rank": r, "state": states[r], "address": one.holder(r)} for r in range(one.world)],
    }


def _print(printer: Printer, standing: Standing, step: int | None) -> None:
    columns = (
        Column(title="step", right=True),
        Column(title="tier"),
        Column(title="attempt"),
        Column(title="ranks", right=True),
        Column(title="held"),
        Column(title="decodable"),
        Column(title="lost"),
        Column(title="recoverable"),
    )
    rows: list[tuple[int, tuple[object, ...]]] = [
        (
            one.step,
            (
                one.step,
                "memory",
                one.attempt,
                one.world,
                texts.numbers(one.held),
                texts.numbers(one.decodable),
                texts.numbers(one.gone),
                "yes" if one.recoverable else "no",
            ),
        )
        for one in standing.candidates
    ]
    for number, attempt in standing.stored.steps[:STORED_SHOWN_MAX]:
        rows.append((number, (number, "store", attempt or "-", "-", "-", "-", "-", "yes")))
    rows.sort(key=lambda row: (-row[0], str(row[1][1])))
    survey = standing.survey
    footer = (
        f"{texts.plural(len(survey.agents), 'agent')}, {texts.plural(standing.stored.num_steps, 'step')} on the store"
    )
    printer.table(columns, [row for _, row in rows], footer=footer)
    for one in survey.silent:
        printer.text(f"agent {label(one)} does not answer: {one.error}")
    for name in standing.leftovers:
        printer.text(f"`{name}` in shared memory was left by a dead agent: `ckpt agent run` takes it over")
    if standing.stored.error:
        printer.text(f"the store does not answer: {standing.stored.error}")
    if any(one.trainer_pid is not None for one in survey.agents):
        printer.text("a trainer is at work: what is in memory changes as it goes on")
    best, newest = next(iter(standing.recoverable(step)), None), standing.newest
    if best is not None and newest is not None:
        lost = newest - best[0]
        printer.text(
            f"step {best[0]} can be had back from {'memory' if best[1] == 'memory' else 'the store'}; "
            + (f"{texts.plural(lost, 'step')} up to {newest} would be lost" if lost else "nothing newer is known")
        )
