"""`ckpt simulate`: what failures would cost a job, and the checkpoint intervals and the code that cost least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ckpt.cli import texts
from ckpt.cli.command import command
from ckpt.cli.printer import Column, Printer
from ckpt.config import SIMULATE_FILE_BYTES_MAX
from ckpt.errors import InvalidInputError
from ckpt.simulate import inputs
from ckpt.simulate.closed import Estimate
from ckpt.simulate.table import Row, document_of, rows_of, sized

_Function = TypeVar("_Function", bound=Callable[..., Any])
_METAVARS = {"count": "N", "time": "TIME", "size": "SIZE", "rate": "RATE", "share": "SHARE"}
_DURATION = inputs.Parameter(name="duration", record=object, field="", kind="time", text="")


def _parameters(function: _Function) -> _Function:
    """An option per parameter, in their order."""
    for p in reversed(inputs.PARAMETERS):
        function = click.option(f"--{p.name}", p.key, metavar=_METAVARS[p.kind], help=p.text)(function)
    return function


@command("simulate")
@click.option(
    "--cluster", "file", metavar="FILE", help="A YAML file with any of the numbers below; options go before it."
)
@_parameters
@click.option(
    "--ranks", multiple=True, type=int, metavar="N", help="Ranks of the cluster; a row for each, given often."
)
@click.option("--duration", default="30 d", metavar="TIME", help="Length of a simulated job; default: 30 d.")
@click.option("--runs", default=100, metavar="N", help="Simulated jobs of a policy; default: 100.")
@click.option(
    "--seed", default=0, metavar="N", help="Of the first job; default: 0. The same seed gives the same numbers."
)
def simulate(printer: Printer, file: str | None, ranks: tuple[int, ...], **given: Any) -> None:
    """Simulate failures of a cluster: goodput, lost work, survival of the memory tier, its cost; and find the best policy.

    What is not given of group size, parity and intervals is looked for. Each cluster is also simulated without the memory tier.
    """
    duration_s = float(inputs.parse(_DURATION, given.pop("duration")))
    num_runs, seed = given.pop("runs"), given.pop("seed")
    from_file = inputs.read_file(_read(file), source=file) if file is not None else {}
    options = {p.name: given[p.key] for p in inputs.PARAMETERS if given[p.key] is not None}
    cluster, tiers, demand = inputs.build({**from_file, **options})
    if ranks and "nodes" in options:
        raise InvalidInputError("name the size either by --nodes or by --ranks", kind="bad-cluster")
    clusters = [sized(cluster, n) for n in ranks] or [cluster]
    rows = rows_of(clusters, tiers, demand, duration_s=duration_s, num_runs=num_runs, seed=seed, told=printer.note)
    printer.document(
        {
            "cluster": dataclasses.asdict(cluster),
            "tiers": dataclasses.asdict(tiers),
            "demand": dataclasses.asdict(demand),
            "duration_s": duration_s,
            "num_runs": num_runs,
            "seed": seed,
            "confidence": 0.95,
            "rows": [document_of(row) for row in rows],
        }
    )
    _print(printer, rows, footer=_footer(rows, duration_s, num_runs, seed))


def _read(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as stream:
            return stream.read(SIMULATE_FILE_BYTES_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cluster file `{path}` cannot be read: {error}", kind="bad-cluster") from error


def _print(printer: Printer, rows: list[Row], *, footer: str) -> None:
    columns = (
        Column(title="ranks", right=True),
        Column(title="fails every", right=True),
        Column(title="scheme"),
        Column(title="memory every", right=True),
        Column(title="store every", right=True),
        Column(title="goodput", right=True),
        Column(title="lost", right=True),
        Column(title="stalled", right=True),
        Column(title="down", right=True),
        Column(title="node loss survived", right=True),
        Column(title="job survived", right=True),
        Column(title="memory/rank", right=True),
        Column(title="network/node", right=True),
    )
    printer.table(columns, [_cells(row) for row in rows], footer=footer)


def _cells(row: Row) -> tuple[object, ...]:
    result, costs = row.result, row.result.costs
    memory = result.policy.has_memory
    half = (result.goodput.high - result.goodput.low) / 2
    return (
        f"{row.cluster.num_ranks:,}",
        _time(row.cluster.mtbf_s),
        row.scheme,
        _time(costs.memory_every_s) if memory else "-",
        _time(costs.store_every_s),
        f"{100 * result.goodput.value:.2f} ± {100 * half:.2f} %",
        f"{100 * result.lost:.2f} %",
        f"{100 * result.stalled:.2f} %",
        f"{100 * result.down:.2f} %",
        _share(result.node_loss_survival) if memory else "-",
        _share(result.job_survival) if memory else "-",
        texts.size(costs.memory_bytes_per_rank) if memory else "-",
        texts.size(result.network_bytes_per_node_s) + "/s" if memory else "-",
    )


def _footer(rows: list[Row], duration_s: float, num_runs: int, seed: int) -> str:
    last = rows[-1].result
    total = sum(row.result.num_failures for row in rows)
    return (
        f"{texts.plural(num_runs, 'job')} of {_time(duration_s)} per row, seeds {seed} to {seed + num_runs - 1}, "
        f"{texts.plural(total, 'failure')}; 95 % confidence\n"
        f"last row: recovered {last.recoveries['own']:,} times from the own agent, "
        f"{last.recoveries['peers']:,} times from peers, {last.recoveries['store']:,} times from the store"
    )


def _share(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "none lost"
    digits = 2 if estimate.high - estimate.low > 0.001 else 3
    low, high = (f"{100 * x:.{digits}f}" for x in (estimate.low, estimate.high))
    return f"{100 * estimate.value:.{digits}f} % ({low} to {high})"


def _time(seconds: float) -> str:
    if math.isinf(seconds):
        return "never"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} d"
    return f"{seconds:.2g} s" if seconds < 10 else texts.duration(seconds)
