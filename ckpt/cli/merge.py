"""`ckpt merge SOURCES... -o URL`: one checkpoint out of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import parse
from ckpt.cli.command import command
from ckpt.cli.export import export_into
from ckpt.cli.merge_plan import print_methods, print_plan
from ckpt.cli.printer import Printer
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.kernels.merge import FloatDtype
from ckpt.merge import api
from ckpt.merge.estimate import estimate, limits_for
from ckpt.merge.given import Given, overlaid, recipe_nodes
from ckpt.merge.job import find_unfinished
from ckpt.merge.nodes import read_yaml
from ckpt.merge.plan import MergePlan
from ckpt.merge.ranks import merge_on, ranks_of
from ckpt.merge.recipe import Recipe, recipe_of
from ckpt.merge.run import Merged, again, begin, carry_out, planned, recipe_again
from ckpt.store.base import Store
from ckpt.store.open import open_store

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("-o", "--output", metavar="URL[@STEP]", help="The run to write into; the step is the newest source's."),
    click.option("--method", metavar="NAME", help="How to merge; default: uniform. `--methods` lists them."),
    click.option("--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the method; may be repeated."),
    click.option("--base", metavar="SOURCE", help="What changes are counted from, for methods that need it."),
    click.option("--weights", metavar="W,W,...", help="A weight for each source, in the order in which they are named."),
    click.option("--weight-by", metavar="METRIC", help="Weigh by a metric of the manifests, or by `step` (method mwa)."),
    click.option("--penalty", type=float, metavar="P", help="How much a worse metric costs: 0 nothing, 1 drops the worst."),
    click.option("--last", type=int, metavar="N", help="Of each range, the newest N."),
    click.option("--every", type=int, metavar="N", help="Of each range, every N-th, counted back from the newest."),
    click.option("--fraction", type=float, metavar="F", help="Of each range, the steps in the last part of the way."),
    click.option("--intersect", is_flag=True, help="Merge what all sources have in common, and leave out the rest."),
    click.option("--optimizer", type=click.Choice(("drop", "newest", "combine")), help="What becomes of optimizer state."),
    click.option("--dtype", type=click.Choice(tuple(FloatDtype.__members__)), help="Of what is combined; default: as it is."),
    click.option("--nan", type=click.Choice(("error", "propagate")), help="What NaN and infinity in a source are."),
    click.option("--seed", type=int, metavar="N", help="Of random masks, and of the random streams of the result."),
    click.option("--memory", metavar="SIZE", help="Memory that all processes together may take."),
    click.option("--workers", type=int, metavar="N", help="Processes; default: 1."),
    click.option("--ray", metavar="ADDRESS", help="On a Ray cluster, --workers tasks at a time: `auto`, `local`, an address."),
    click.option("--plan", "only_plan", is_flag=True, help="Show what would be done, and do nothing."),
    click.option("--resume", metavar="URL[@STEP]", help="Go on with a merge that was killed."),
    click.option("--export", "folder", metavar="DIR", help="Also write the model as safetensors files into this folder."),
    click.option("--methods", "list_methods", is_flag=True, help="List the methods and their parameters."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the user asked for, besides the recipe."""

    workers: int
    ray: str | None
    folder: str | None
    only_plan: bool


def _options(function: _Function) -> _Function:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command("merge")
@click.argument("sources", nargs=-1, metavar="[SOURCE...|RECIPE.yaml]")
@_options
def merge(printer: Printer, sources: tuple[str, ...], **given: Any) -> None:
    """Merge checkpoints into one new checkpoint.

    A SOURCE is URL@A..B, URL@STEP, URL (its newest) or a folder of safetensors files; layouts and numbers of ranks may differ. A
    recipe says all of it in a file, and options win over it. Everything is checked before the first byte of a tensor is read.
    """
    if given["list_methods"]:
        print_methods(printer)
        return
    asked = _Asked(
        workers=given["workers"] or 0, ray=given["ray"], folder=given["folder"], only_plan=given["only_plan"]
    )
    options = config.from_environment()
    if given["resume"] is not None:
        _resume(printer, sources, given, asked, options)
        return
    recipe = _recipe(sources, given)
    if recipe.output is not None:
        printer.about["target"] = recipe.output
    with planned(recipe, options) as plan:
        workers = api.check_workers(plan, asked.workers or recipe.workers or 1)
        if asked.only_plan:
            limits = limits_for(plan, recipe.memory_bytes, workers, options)
            print_plan(printer, plan, estimate(plan, limits, workers, options))
            return
        if recipe.output is None:
            raise InvalidInputError("say where the result goes: -o URL", kind="no-output")
        store = open_store(recipe.output, options=options)
        try:
            _carry_out(printer, plan, recipe.output, store, workers, asked, options)
        finally:
            store.close()


def _carry_out(
    printer: Printer, plan: MergePlan, url: str, store: Store, workers: int, asked: _Asked, options: Options
) -> None:
    """In this process and those that it starts; or, as a rank of a job, together with the others."""
    ranks = ranks_of(os.environ)
    if ranks is not None:
        if asked.workers > 1 or asked.ray is not None:
            raise InvalidInputError("the ranks of a job are the workers: leave --workers and --ray out", kind="usage")
        done = merge_on(ranks, plan, store, options)
        if ranks.rank == 0:
            _tell(printer, plan, url, done, _export(printer, store, done, plan, asked, options))
        return
    refuse_existing(store, plan.step)
    job = begin(plan, store, options, workers=workers)
    total = estimate(plan, job.limits, workers, options)
    with printer.progress(f"merge into step {plan.step}", total.read_nbytes + total.written_nbytes) as bar:
        done = carry_out(job, api.runner_of(workers, None, asked.ray), bar.advance)
    _tell(printer, plan, url, done, _export(printer, store, done, plan, asked, options))


def _resume(printer: Printer, sources: Sequence[str], given: dict[str, Any], asked: _Asked, options: Options) -> None:
    odd = [name for name, value in given.items() if value and name not in ("resume", "workers", "ray", "folder")]
    if sources or odd:
        raise InvalidInputError(
            "--resume goes on with what was begun: only --workers, --ray and --export may be given with it",
            kind="usage",
        )
    address = parse(given["resume"])
    step = address.one() if address.steps is not None else None
    if step == "latest":
        raise InvalidInputError("a merge that is to be gone on with has no `latest`: name its step", kind="bad-address")
    printer.about["target"] = address.url
    store = open_store(address.url, options=options)
    try:
        found = find_unfinished(store, step)
        with planned(recipe_again(found.recipe), options, image_bytes=found.image_bytes) as plan:
            workers = api.check_workers(plan, asked.workers or 1)
            job = again(found, plan, store, options)
            total = estimate(plan, job.limits, workers, options)
            with printer.progress(f"merge into step {plan.step}", total.read_nbytes + total.written_nbytes) as bar:
                done = carry_out(job, api.runner_of(workers, None, asked.ray), bar.advance)
            _tell(printer, plan, address.url, done, _export(printer, store, done, plan, asked, options))
    finally:
        store.close()


def _recipe(sources: Sequence[str], given: dict[str, Any]) -> Recipe:
    """The recipe that arguments and options make together."""
    if not sources:
        raise InvalidInputError(
            "nothing to merge", kind="no-sources", hints=("name sources, such as runs/gpt@800..1000, or a recipe",)
        )
    if len(sources) == 1 and api.is_recipe(sources[0]):
        root = api.recipe_file(sources[0])
    elif any(api.is_recipe(source) for source in sources):
        raise InvalidInputError("a recipe names its own sources: give either a recipe or sources", kind="usage")
    else:
        root = recipe_nodes(sources, "ckpt merge")
    method, parameters = _method(given)
    asked = Given(
        method=method,
        parameters=parameters,
        weights=None if given["weights"] is None else [_number(part) for part in given["weights"].split(",")],
        base=given["base"],
        selection={key: given[key] for key in ("last", "every", "fraction") if given[key] is not None},
        state={"optimizer": given["optimizer"]},
        numerics={"dtype": given["dtype"], "nan": given["nan"]},
        random={"seed": given["seed"]},
        limits={"memory": given["memory"], "workers": given["workers"]},
        output=output_option(given["output"]),
        intersect=given["intersect"],
    )
    return recipe_of(overlaid(root, asked, "ckpt merge"))


def _method(given: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Name and parameters of the method that the options say; None: that of the recipe."""
    parameters: dict[str, Any] = {}
    if given["weight_by"] is not None:
        parameters["by"] = given["weight_by"]
    if given["penalty"] is not None:
        parameters["penalty"] = given["penalty"]
    for text in given["parameters"]:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError(f"`--set {text}` must be KEY=VALUE", kind="usage")
        parameters[name] = read_yaml(value, source=f"--set {name}").plain()
    return given["method"] or ("mwa" if given["weight_by"] is not None else None), parameters


def output_option(text: str | None) -> dict[str, Any]:
    """`output` of a recipe, as `-o URL[@STEP]` says it."""
    if text is None:
        return {}
    address = parse(text)
    if address.steps is None:
        return {"url": address.url}
    step = address.one()
    if step == "latest":
        raise InvalidInputError("the step of a result is a number: -o URL@STEP", kind="bad-address")
    return {"url": address.url, "step": step}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(f"--weights must be numbers, found {text!r}", kind="usage") from None


def _export(
    printer: Printer, store: Store, done: Merged, plan: MergePlan, asked: _Asked, options: Options
) -> dict[str, Any] | None:
    """The model as safetensors files, with the small files of the first source that is a folder."""
    if asked.folder is None:
        return None
    folders = [source for source in sorted(plan.opened.sources, key=lambda s: s.place) if source.is_folder]
    stored = StoredCheckpoint(store, done.step, options)
    key = folders[0].key if folders else "model"
    url = folders[0].url if folders else None
    return export_into(printer, stored, asked.folder, key=key, config_from=url, options=options)


def _tell(printer: Printer, plan: MergePlan, url: str, done: Merged, exported: dict[str, Any] | None) -> None:
    for note in plan.notes:
        printer.note(f"note: {note}")
    printer.document(
        {
            "sources": [source.record() for source in plan.opened.sources],
            "target": {"url": url, "step": done.step},
            "attempt": done.attempt,
            "method": plan.recipe.combine.method,
            "num_images": done.num_images,
            "num_tensors": len(plan.tensors),
            "num_dropped": len(plan.catalog.dropped),
            "tasks_done_before": done.num_done_before,
            "read_bytes": done.read_nbytes,
            "written_bytes": done.written_nbytes,
            "seconds": round(done.seconds, 3),
            "notes": list(plan.notes),
            "export": exported,
        }
    )
    printer.text(
        f"step {done.step} is in {url}: {texts.plural(len(plan.opened.sources), 'source')} merged by "
        f"{plan.recipe.combine.method}, {texts.size(done.written_nbytes)} written, {texts.size(done.read_nbytes)} read, "
        f"{texts.duration(done.seconds)}"
    )
    if exported is not None:
        printer.text(f"the model is in {exported['folder']}: {texts.plural(len(exported['files']), 'file')}")
