"""What `ckpt merge --plan` and `--methods` print.

In: a plan and its figures, or the registry of methods. Out: a document, tables.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from ckpt.cli import texts
from ckpt.cli.printer import Column, Printer
from ckpt.merge import parameters, registry
from ckpt.merge.estimate import Estimate
from ckpt.merge.method import Linear, Matrix
from ckpt.merge.plan import MergePlan, TensorPlan

_SHOWN_MAX = 20  # tensors of one kind by name, in a table


def print_plan(printer: Printer, plan: MergePlan, figures: Estimate) -> None:
    """The whole plan."""
    document = _document(plan, figures)
    printer.document(document)
    columns = (Column(title="source"), Column(title="metrics"), *(Column(title=t, right=True) for t in _titles(plan)))
    printer.table(columns, [_source_row(plan, number) for number in range(len(plan.opened.sources))])
    printer.text("")
    columns = (
        Column(title="tensors", right=True),
        Column(title="size", right=True),
        Column(title="become"),
        Column(title="why"),
    )
    printer.table(
        columns, [(a["num_tensors"], texts.size(a["nbytes"]), a["text"], a["why"]) for a in document["actions"]]
    )
    printer.text("")
    facts = (
        ("result", f"step {plan.step}" + (f" of {plan.recipe.output}" if plan.recipe.output else "")),
        ("method", f"{plan.recipe.combine.method}, {texts.plural(figures.passes, 'pass')}".replace("passs", "passes")),
        ("reads", texts.size(figures.read_nbytes)),
        ("writes", f"{texts.size(figures.written_nbytes)} in {texts.plural(figures.num_images, 'image')}"),
        ("memory", f"{texts.size(figures.peak_bytes)} at most" + _matrix_text(figures)),
        *(("note", note) for note in plan.notes),
    )
    printer.text("\n".join(f"{name + ':':<8} {value}" for name, value in facts))
    if plan.catalog.dropped:
        printer.text("")
        shown = [*plan.catalog.dropped[:_SHOWN_MAX]]
        more = len(plan.catalog.dropped) - len(shown)
        footer = f"and {more} more" if more > 0 else ""
        printer.table((Column(title="left out"), Column(title="why")), shown, footer=footer)


def _matrix_text(figures: Estimate) -> str:
    return f", {texts.size(figures.matrix_bytes)} of it for the largest matrix" if figures.matrix_bytes else ""


def _shares(plan: MergePlan) -> list[tuple[tuple[float, ...], int]]:
    """Different weights of sources over tensors, and how many tensors have each."""
    counts = Counter(
        t.coefficients.shares
        for t in plan.tensors
        if t.kind == "linear" and t.coefficients is not None and t.bound >= 0
    )
    return sorted(counts.items(), key=lambda item: -item[1])


def _titles(plan: MergePlan) -> list[str]:
    found = _shares(plan)
    return ["weight"] if len(found) < 2 else [f"weight ({texts.plural(count, 'tensor')})" for _, count in found[:3]]


def _source_row(plan: MergePlan, number: int) -> tuple[str, ...]:
    source = plan.opened.sources[number]
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in sorted(source.metrics.items())[:3])
    weights = [f"{shares[number]:.6g}" for shares, _ in _shares(plan)[:3]] or [f"{source.weight:.6g}"]
    return (source.label, metrics or "-", *weights)


def _document(plan: MergePlan, figures: Estimate) -> dict[str, Any]:
    return {
        "plan": {
            "sources": [source.record() for source in plan.opened.sources],
            "base": None if plan.opened.base is None else plan.opened.base.record(),
            "step": plan.step,
            "method": plan.recipe.combine.method,
            "parameters": parameters.plain(plan.bounds[0].method),
            "weights": [{"weights": list(shares), "num_tensors": count} for shares, count in _shares(plan)],
            "passes": figures.passes,
            "read_bytes": figures.read_nbytes,
            "written_bytes": figures.written_nbytes,
            "peak_memory_bytes": figures.peak_bytes,
            "matrix_memory_bytes": figures.matrix_bytes,
            "num_images": figures.num_images,
            "dropped": [{"name": name, "why": why} for name, why in plan.catalog.dropped],
            "notes": list(plan.notes),
        },
        "actions": _actions(plan),
    }


def _actions(plan: MergePlan) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        groups.setdefault((_become(plan, tensor), tensor.entry.decision.why), []).append(tensor)
    return [
        {
            "text": text,
            "why": why,
            "policy": found[0].entry.decision.policy,
            "num_tensors": len(found),
            "nbytes": sum(tensor.spec.nbytes for tensor in found),
            "example": found[0].spec.name,
        }
        for (text, why), found in sorted(groups.items(), key=lambda item: -sum(t.spec.nbytes for t in item[1]))
    ]


def _become(plan: MergePlan, tensor: TensorPlan) -> str:
    if tensor.kind in ("linear", "element"):
        return "mean" if tensor.bound < 0 else plan.bounds[tensor.bound].method.name
    texts_of = {"same": "copied, compared", "pool": "pooled", "reset": "reset"}
    return texts_of.get(tensor.kind, f"copied from the {tensor.entry.decision.policy}")


def print_methods(printer: Printer) -> None:
    """All methods, with their parameters."""
    found: list[dict[str, Any]] = []
    for name in registry.known():
        cls = registry.find(name)
        kind = "linear" if issubclass(cls, Linear) else "matrix" if issubclass(cls, Matrix) else "elementwise"
        about = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        taken = [{"name": n, "type": t, "default": d} for n, t, d in parameters.described(cls)]
        found.append({"name": name, "kind": kind, "about": about, "parameters": taken})
    printer.document({"methods": found})
    columns = (
        Column(title="method"),
        Column(title="kind"),
        Column(title="parameter"),
        Column(title="type"),
        Column(title="default"),
    )
    rows: list[tuple[str, ...]] = []
    for one in found:
        options: list[dict[str, str]] = one["parameters"] or [{"name": "-", "type": "", "default": ""}]
        for number, option in enumerate(options):
            head = (one["name"], one["kind"]) if number == 0 else ("", "")
            rows.append((*head, option["name"], option["type"], option["default"]))
    printer.table(columns, rows)
