"""What `ckpt show --timing` prints: the phases of one save over its ranks.

In: the event log of a run, and a step. Out: a table or a document. Needs no checkpoint: saves that failed have times too.
"""

from __future__ import annotations

from typing import Any

from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import refuse_no_run
from ckpt.cli.printer import Column, Printer
from ckpt.commit import find
from ckpt.commit.publish import published_attempt
from ckpt.errors import CheckpointError, DamagedError
from ckpt.observe.log import read_log
from ckpt.observe.summary import Operation, operations
from ckpt.store.base import Store


def show_timing(printer: Printer, checkpoint: Address, store: Store) -> None:
    """Print where the time of a save went."""
    asked = checkpoint.one()
    step = find.resolve(store, asked) if asked == "latest" else asked
    saves = [o for o in operations(read_log(store, step=step).events) if o.operation == "save"]
    if not saves:
        refuse_no_run(store, find.step_folders(store))
        raise no_events(checkpoint.url, step)
    try:
        attempt = published_attempt(store, step)
    except DamagedError:
        attempt = None
    save = next((save for save in saves if attempt and save.attempt == attempt), saves[-1])
    printer.document({"url": checkpoint.url, "step": step, "timing": _document(save)})
    _print(printer, checkpoint, save)


def no_events(url: str, step: int | str | None) -> CheckpointError:
    """The error for a run or step that the log says nothing of."""
    what = f"no events in {url}" if step is None else f"no events of a save of step {step} in {url}"
    hint = "events are logged while saving and loading, unless the option `events` is off (CKPT_EVENTS=0)"
    return CheckpointError(what, kind="no-events", hints=(hint, f"ckpt report {url}") if step is not None else (hint,))


def seconds(value: float | None) -> str:
    """Seconds for a table."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def straggler_of(operation: Operation) -> dict[str, Any] | None:
    """The straggler for a document."""
    late = operation.straggler
    return (
        None if late is None else {"rank": late.rank, "phase": late.phase, "s": late.seconds, "median_s": late.median_s}
    )


def _document(save: Operation) -> dict[str, Any]:
    return {
        "attempt": save.attempt,
        "start": texts.utc(save.start_s),
        "outcome": save.outcome,
        "error": save.error,
        "world": save.world,
        "num_ranks": len(save.seconds),
        "stall_s": save.stall_s,
        "total_s": save.total_s,
        "nbytes": save.nbytes,
        "straggler": straggler_of(save),
        "phases": [
            {
                "phase": found.phase,
                "num_ranks": found.num_ranks,
                "min_s": found.min_s,
                "median_s": found.median_s,
                "max_s": found.max_s,
                "slowest_rank": found.slowest_rank,
                "nbytes": found.nbytes,
            }
            for found in save.stats
        ],
        "ranks": [{"rank": rank, "seconds": phases} for rank, phases in save.seconds.items()],
    }


def _print(printer: Printer, checkpoint: Address, save: Operation) -> None:
    told = f" ({len(save.seconds)} told of it)" if len(save.seconds) < save.world else ""
    facts = [
        ("run", checkpoint.url),
        ("step", save.step),
        ("attempt", save.attempt or "-"),
        ("started", f"{texts.local_time(texts.utc(save.start_s))} on {texts.plural(save.world, 'rank')}{told}"),
        ("outcome", f"{save.outcome}{', ' + save.error if save.error else ''}"),
        ("stall", f"{seconds(save.stall_s)} on the slowest rank"),
        ("durable" if save.outcome == "ok" else "over", f"after {seconds(save.total_s)}"),
        ("straggler", str(save.straggler).replace("`", "") if save.straggler is not None else "none"),
    ]
    width = max(len(name) for name, _ in facts) + 1
    printer.text("\n".join(f"{name + ':':<{width}} {value}" for name, value in facts) + "\n")
    printer.text("")
    columns = (
        Column(title="phase"),
        Column(title="ranks", right=True),
        Column(title="min", right=True),
        Column(title="median", right=True),
        Column(title="max", right=True),
        Column(title="slowest", right=True),
        Column(title="bytes", right=True),
    )
    rows = [
        (
            found.phase,
            found.num_ranks,
            seconds(found.min_s),
            seconds(found.median_s),
            seconds(found.max_s),
            f"rank {found.slowest_rank}" if found.num_ranks > 1 else "",
            texts.size(found.nbytes) if found.nbytes else "",
        )
        for found in save.stats
    ]
    printer.table(columns, rows)
