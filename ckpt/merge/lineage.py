"""Where every tensor of a merged checkpoint came from: the record in its manifest, and what that record says of one tensor.

In: a plan; or a manifest and the names of its tensors. Out: JSON values; or one `Origin` per tensor. Pure. The record is described
in docs/reference/recipe.md ("Lineage").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.commit.complete import PROGRAM
from ckpt.errors import DamagedError, NotFoundError
from ckpt.format.manifest import Manifest
from ckpt.merge import parameters
from ckpt.merge.plan import MergePlan, TensorPlan

KEY = "merge"  # of the manifest's metadata
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of one source is in a tensor."""

    source: str  # URL@STEP, or the folder; "base: ..." of the base
    weight: float | None  # of a weighted sum, over its divisor; None where a method decides element by element
    tensor: str  # what was read there
    master: bool  # a master copy of it


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where one tensor came from."""

    name: str
    policy: str
    why: str
    method: str | None
    parameters: Mapping[str, Any]
    shares: tuple[Share, ...]


def lineage_of(plan: MergePlan) -> dict[str, Any]:
    """The record. Tensors of one kind share an entry of `actions`; `of` says which, tensor by tensor in the order of the index."""
    actions: list[dict[str, Any]] = []
    runs: list[list[int]] = []
    for tensor in plan.tensors:
        action = _action(plan, tensor)
        if action not in actions:
            actions.append(action)
        number = actions.index(action)
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return {
        "version": VERSION,
        "program": PROGRAM,
        "recipe": dict(plan.recipe.document),
        "sources": [source.record() for source in plan.opened.sources],
        "base": None if plan.opened.base is None else plan.opened.base.record(),
        "actions": actions,
        "of": runs,
        "dropped": len(plan.catalog.dropped),
    }


def _action(plan: MergePlan, tensor: TensorPlan) -> dict[str, Any]:
    method = plan.bounds[tensor.bound].method if tensor.bound >= 0 else None
    coefficients = tensor.coefficients
    feeds = [
        [f.source, f.spec.name if f.spec.name != tensor.spec.name else None]
        for f in tensor.feeds
        if f.role in ("x", "base")
    ]
    masters = [f.source for f in tensor.feeds if f.role == "x" and tensor.entry.masters[f.source]]
    # What is read under another name is told by its slot: names in full would make an entry of every tensor.
    renamed = any(name is not None for source, name in feeds if source not in masters)
    return {
        "policy": tensor.entry.decision.policy,
        "why": tensor.entry.decision.why,
        "method": "mean" if method is None and coefficients is not None else None if method is None else method.name,
        "parameters": {} if method is None else parameters.plain(method),
        "sources": [source for source, _ in feeds],
        "weights": None if coefficients is None else [_weight(tensor, source) for source, _ in feeds],
        "masters": masters,
        **({"names": [name for _, name in feeds]} if renamed else {}),
    }


def _weight(tensor: TensorPlan, source: int) -> float:
    coefficients = tensor.coefficients
    assert coefficients is not None
    return (coefficients.base if source < 0 else coefficients.weights[source]) / coefficients.divisor


def explain(manifest: Manifest, names: Sequence[str]) -> list[Origin]:
    """The origin of every tensor, in the order of the index.

    NotFoundError (`not-merged`) for a checkpoint that no merge made; DamagedError for a record that cannot be.
    """
    record = manifest.metadata.get(KEY)
    if not isinstance(record, dict):
        raise NotFoundError(f"step {manifest.step} was not made by a merge", kind="not-merged")
    try:
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']}")
        numbers = [number for number, count in record["of"] for _ in range(count)]
        return [_origin(record, record["actions"][number], name) for number, name in zip(numbers, names, strict=True)]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DamagedError(f"the lineage of step {manifest.step} cannot be read: {error!r}") from None


def _origin(record: Mapping[str, Any], action: Mapping[str, Any], name: str) -> Origin:
    weights = action["weights"] or [None] * len(action["sources"])
    names = action.get("names") or [None] * len(action["sources"])
    return Origin(
        name=name,
        policy=action["policy"],
        why=action["why"],
        method=action["method"],
        parameters=action["parameters"],
        shares=tuple(
            Share(
                source=_label(record, source),
                weight=weight,
                tensor=other or name,
                master=source in action["masters"],
            )
            for source, weight, other in zip(action["sources"], weights, names, strict=True)
        ),
    )


def _label(record: Mapping[str, Any], source: int) -> str:
    one = record["base"] if source < 0 else record["sources"][source]
    text = one["url"] if one["kind"] == "folder" else f"{one['url']}@{one['step']}"
    return f"base: {text}" if source < 0 else text
