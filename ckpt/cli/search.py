"""`ckpt search SOURCES... -o URL`: find the merge that an evaluator scores highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from ckpt.cli import texts
from ckpt.cli.command import command
from ckpt.cli.merge import output_of
from ckpt.cli.printer import Column, Printer
from ckpt.errors import InvalidInputError
from ckpt.merge.api import is_recipe, recipe_file
from ckpt.merge.given import Given, overlaid
from ckpt.merge.nodes import Node, read_yaml
from ckpt.search.api import run_search
from ckpt.search.document import search_of, sources_alone, with_search
from ckpt.search.driver import known
from ckpt.search.run import Found, Standing, Told, plain

_GROUPS_SHOWN = 4


@command("search")
@click.argument("sources", nargs=-1, metavar="[SOURCE...|RECIPE.yaml]")
@click.option("-o", "--output", metavar="URL[@STEP]", help="The run to write into; the step is the newest source's.")
@click.option("--driver", metavar="NAME", help=f"How to search: {', '.join(known())}.")
@click.option(
    "--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the driver; may be repeated."
)
@click.option("--budget", type=int, metavar="N", help="Evaluations.")
@click.option(
    "--evaluator", metavar="COMMAND", help="Scores a checkpoint, {url} and {step} in its words; higher is better."
)
@click.option("--holdout", metavar="COMMAND", help="Scores the result in the end, and never a candidate.")
@click.option("--objective", metavar="METRIC", help="Which metric counts, where the evaluator gives several.")
@click.option("--base", metavar="SOURCE", help="What changes are counted from: then the weights are of changes.")
@click.option("--layers", type=int, metavar="N", help="Weights of their own for the layers, in N runs of them.")
@click.option("--seed", type=int, metavar="N", help="Of everything random in the driver.")
@click.option("--scratch", metavar="DIR", help="A local folder for candidates; default: that for temporary files.")
def search(printer: Printer, sources: tuple[str, ...], **given: Any) -> None:
    """Search for the weights with which a merge of checkpoints scores highest, and merge with them.

    A SOURCE is as in `ckpt merge`; a recipe with a key `search` says all of it in a file, and options win over it. Each candidate
    is merged into a local folder, scored by the evaluator's command, and removed. What was scored is kept in `<URL>.search`:
    the same command goes on with a search that was killed.
    """
    wanted = search_of(_nodes(sources, given))
    if wanted.recipe.output is None:
        raise InvalidInputError("say where the result goes: -o URL", kind="no-output")
    printer.about["target"] = wanted.recipe.output
    found = run_search(wanted, scratch=given["scratch"], progress=_Lines(printer))
    _tell(printer, found, wanted.recipe.output)


class _Lines:
    """A line for every failed evaluation and every so many seconds, and one at the end. One thread."""

    def __init__(self, printer: Printer) -> None:
        self._printer, self._said = printer, printer.clock()

    def __call__(self, told: Told) -> None:
        now = self._printer.clock()
        due = now - self._said >= self._printer.line_every_s or told.number == told.budget
        if not self._printer.bars or not (due or told.failure):
            return
        self._said = now
        this = f"failed: {told.failure}" if told.failure else f"{told.value:.6g}"
        self._printer.note(f"evaluation {told.number} of {told.budget}: {this}, best so far {told.best:.6g}")


def _nodes(sources: Sequence[str], given: Mapping[str, Any]) -> Node:
    if not sources:
        raise InvalidInputError(
            "nothing to search", kind="no-sources", hints=("name sources, such as runs/gpt@800..1000, or a recipe",)
        )
    if len(sources) == 1 and is_recipe(sources[0]):
        root = recipe_file(sources[0])
    elif any(is_recipe(source) for source in sources):
        raise InvalidInputError("a recipe names its own sources: give either a recipe or sources", kind="usage")
    else:
        root = sources_alone(sources, "ckpt search")
    root = overlaid(root, Given(base=given["base"], output=output_of(given["output"])), "ckpt search")
    parameters = {}
    for text in given["parameters"]:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError(f"`--set {text}` must be KEY=VALUE", kind="usage")
        parameters[name] = read_yaml(value, source=f"--set {name}").plain()
    if parameters and given["driver"] is None:
        raise InvalidInputError("`--set` is for a driver that `--driver` names", kind="usage")
    said = {
        "driver": None if given["driver"] is None else {"name": given["driver"], **parameters},
        "over": None if given["layers"] is None else {"layers": given["layers"]},
        **{key: given[key] for key in ("budget", "evaluator", "holdout", "objective", "seed")},
    }
    return with_search(root, said, "ckpt search")


def _tell(printer: Printer, found: Found, url: str) -> None:
    step = found.step
    printer.document(
        {
            "target": {"url": url, "step": step},
            "num_evaluated_before": found.num_before,
            **plain(found),
            "sources": list(found.sources),
            "groups": list(found.groups),
        }
    )
    every = (found.best, *found.others)
    metrics = sorted({name for one in every for name in one.score.metrics})
    held = sorted({name for one in every if one.holdout is not None for name in one.holdout.metrics})
    columns = [Column(title="merge"), *(Column(title=name, right=True) for name in metrics)]
    columns += [Column(title=f"hold-out {name}", right=True) for name in held]
    printer.table(columns, [_row(one, metrics, held) for one in every])
    printer.text("")
    _coefficients(printer, found)
    failed = sum(bool(one.score.failure) for one in found.evaluations)
    printer.text(
        f"\nstep {step} is in {url}: the best of {texts.plural(len(found.evaluations), 'evaluation')}"
        + (f", {failed} of them failed" if failed else "")
        + (f", {found.num_before} done before" if found.num_before else "")
    )


def _row(one: Standing, metrics: Sequence[str], held: Sequence[str]) -> tuple[str, ...]:
    def number(values: Mapping[str, float] | None, name: str) -> str:
        return "failed" if not values else f"{values[name]:.6g}" if name in values else "-"

    holdout = None if one.holdout is None else one.holdout.metrics
    return (one.name, *(number(one.score.metrics, n) for n in metrics), *(number(holdout, n) for n in held))


def _coefficients(printer: Printer, found: Found) -> None:
    """The weights of the best point: a row for each source, a column for each group, or range of elements."""
    point = found.best.point
    if point.stops:
        starts = (0, *point.stops[:-1])
        names = [f"elements {a} to {b - 1}" for a, b in zip(starts, point.stops, strict=True)]
    else:
        names = [f"weight ({name})" if len(point.rows) > 1 else "weight" for name in found.groups]
    columns = [Column(title="source"), *(Column(title=name, right=True) for name in names[:_GROUPS_SHOWN])]
    rows = [
        (source, *(f"{row[i]:.4g}" for row in point.rows[:_GROUPS_SHOWN])) for i, source in enumerate(found.sources)
    ]
    more = len(names) - _GROUPS_SHOWN
    printer.table(columns, rows, footer=f"and {more} more columns: --json has all" if more > 0 else "")
