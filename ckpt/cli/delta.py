"""`ckpt delta make|apply|show`: fine-tunes as small differences to their base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ckpt.cli import texts
from ckpt.cli.command import command
from ckpt.cli.merge import output_of
from ckpt.cli.printer import Column, Printer
from ckpt.delta import api
from ckpt.delta.methods import METHODS, method_of
from ckpt.delta.record import Delta, Kept, Stated, Task, worst
from ckpt.errors import InvalidInputError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--base", metavar="SOURCE", help="What the fine-tunes were tuned from."),
    click.option("-o", "--output", metavar="URL[@STEP]", help="The run to write into; the step is the fine-tune's."),
    click.option("--method", type=click.Choice(tuple(METHODS)), help="With `make`: how it is stored; default: exact."),
    click.option("--density", type=float, metavar="F", help="With compeft: the share of elements that is kept; default: 0.2."),
    click.option("--scale", metavar="fit|X", help="With compeft: X standard deviations per sign; default: the best fit."),
    click.option("--scope", type=click.Choice(("tensor", "model")), help="With compeft: what the share is of; default: tensor."),
    click.option("--threshold", type=float, metavar="X", help="With tall: how far a change must outweigh the rest; default: 1."),
    click.option("--optimizer", type=click.Choice(("keep", "drop")), help="With `make`: optimizer state; exact keeps it."),
    click.option("--task", metavar="N|SOURCE", help="With `apply`: which fine-tune, where there are several."),
    click.option("--memory", metavar="SIZE", help="Memory that this may take."),
)  # fmt: skip
_PARAMETERS = ("density", "scale", "scope", "threshold")
_OF_MAKE = ("method", "optimizer", *_PARAMETERS)


def _options(function: _Function) -> _Function:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command("delta")
@click.argument("action", type=click.Choice(["make", "apply", "show"]))
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@_options
def delta(printer: Printer, action: str, sources: tuple[str, ...], **given: Any) -> None:
    """Store fine-tunes as small differences to their base, and give them back.

    `make FINETUNE... --base BASE -o URL` stores them, and tells how far off each comes back. `apply DELTA --base BASE -o URL`
    gives one back, after it has made sure of the base. `show DELTA` lists what is stored of every tensor.
    """
    allowed = {
        "make": ("base", "output", "memory", *_OF_MAKE),
        "apply": ("base", "output", "memory", "task"),
        "show": (),
    }
    odd = [name for name, value in given.items() if value is not None and name not in allowed[action]]
    if odd:
        raise InvalidInputError(f"`ckpt delta {action}` takes no --{odd[0]}", kind="usage")
    if action != "make" and len(sources) != 1:
        raise InvalidInputError(f"`ckpt delta {action}` takes one delta, found {len(sources)}", kind="usage")
    if action == "show":
        _show(printer, sources[0])
        return
    for name in ("base", "output"):
        if given[name] is None:
            raise InvalidInputError(f"`ckpt delta {action}` needs --{name}", kind="usage")
    target = output_of(given["output"])
    printer.about["target"] = target["url"]
    if action == "make":
        _make(printer, sources, target, given)
    else:
        _apply(printer, sources[0], target, given)


def _make(printer: Printer, sources: tuple[str, ...], target: dict[str, Any], given: dict[str, Any]) -> None:
    scale = given["scale"]
    if scale is not None and scale != "fit":
        try:
            scale = float(scale)
        except ValueError:
            raise InvalidInputError(f"--scale must be `fit` or a number, found {scale!r}", kind="usage") from None
    given = {**given, "scale": scale}
    method = method_of(given["method"] or "exact", {name: given[name] for name in _PARAMETERS})
    with api.planned_make(
        sources,
        target["url"],
        base=given["base"],
        method=method,
        optimizer=given["optimizer"],
        step=target.get("step"),
        memory=given["memory"],
    ) as making:
        with printer.progress(f"make a delta by {method.name}", making.plan.nbytes) as bar:
            done = making.run(bar.advance)
    for note in done.notes:
        printer.note(f"note: {note}")
    found = done.delta
    printer.document(
        {
            "action": "make",
            "target": {"url": target["url"], "step": done.step},
            "attempt": done.attempt,
            **_about(found),
            "original_bytes": done.original_nbytes,
            "stored_bytes": done.stored_nbytes,
            **_error(done.worst),
            "notes": list(done.notes),
        }
    )
    share = 100 * done.stored_nbytes / done.original_nbytes if done.original_nbytes else 0.0
    printer.text(
        f"step {done.step} is in {target['url']}: {texts.plural(len(found.tasks), 'fine-tune')} by {found.method}, "
        f"{texts.size(done.stored_nbytes)} for {texts.size(done.original_nbytes)} ({share:.1f} %)"
    )
    printer.text(_told(done.worst))


def _apply(printer: Printer, source: str, target: dict[str, Any], given: dict[str, Any]) -> None:
    with api.planned_apply(
        source,
        target["url"],
        base=given["base"],
        task=given["task"],
        step=target.get("step"),
        memory=given["memory"],
    ) as applying:
        with printer.progress("apply a delta", applying.nbytes) as bar:
            done = applying.run(bar.advance)
    printer.document(
        {
            "action": "apply",
            "target": {"url": target["url"], "step": done.step},
            "attempt": done.attempt,
            "task": done.task,
            "restored_bytes": done.nbytes,
            "compared_base": done.compared_base,
            **_error(done.stated),
        }
    )
    printer.text(f"step {done.step} is in {target['url']}: {done.task}, {texts.size(done.nbytes)}")
    printer.text(_told(done.stated))


def _show(printer: Printer, source: str) -> None:
    found = api.look(source)
    kept = [(number, one) for number, task in enumerate(found.tasks, 1) for one in task.tensors]
    printer.document(
        {"action": "show", **_about(found), "tensors": [{"task": number, **_document(one)} for number, one in kept]}
    )
    columns = (
        Column(title="task", right=True),
        Column(title="tensor"),
        Column(title="how"),
        Column(title="size", right=True),
        Column(title="stored", right=True),
        Column(title="greatest error", right=True),
        Column(title="of the change", right=True),
    )
    rows = [
        (
            number,
            one.spec.name,
            one.coding if one.base is not None else "whole",
            texts.size(one.spec.nbytes),
            texts.size(one.payload.nbytes),
            f"{one.stated.max_abs:.3g}",
            f"{one.stated.of_change:.3g}",
        )
        for number, one in kept
    ]
    shared = sum(one.payload.nbytes for one in found.shared.values())
    footer = f"{texts.plural(len(found.tasks), 'fine-tune')} by {found.method}" + (
        f", and {texts.size(shared)} that they share" if shared else ""
    )
    printer.table(columns, rows, footer=footer)


def _about(found: Delta) -> dict[str, Any]:
    return {
        "method": found.method,
        "parameters": dict(found.parameters),
        "base": dict(found.base),
        "tasks": [_task(task) for task in found.tasks],
        "shared_bytes": sum(one.payload.nbytes for one in found.shared.values()),
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "source": dict(task.source),
        "num_tensors": len(task.tensors),
        "stored_bytes": sum(kept.payload.nbytes for kept in task.tensors),
        **_error(worst(task.tensors)),
    }


def _document(kept: Kept) -> dict[str, Any]:
    return {
        "name": kept.spec.name,
        "dtype": kept.spec.dtype,
        "shape": list(kept.spec.shape),
        "coding": kept.coding,
        "base": kept.base,
        "nbytes": kept.spec.nbytes,
        "stored_bytes": kept.payload.nbytes,
        "num_kept": kept.num_kept,
        "scale": kept.scale,
        "sha256": kept.sha256,
        **_error(kept.stated),
    }


def _error(stated: Stated) -> dict[str, float]:
    return {
        "max_abs_error": stated.max_abs,
        "relative_l2": stated.relative,
        "relative_l2_of_change": stated.of_change,
    }


def _told(stated: Stated) -> str:
    if not stated.l2:
        return "it comes back bit for bit"
    return (
        f"it comes back within {stated.max_abs:.3g} of every element; the error is {stated.relative:.3g} of the weights, "
        f"{stated.of_change:.3g} of their change"
    )
