"""Where every tensor of a merged checkpoint came from: the record in its manifest, and what that record says of one tensor.

In: a plan; or a manifest and the names of its tensors. Out: JSON values; or one `Origin` per tensor. Pure. The record is
described in docs/reference/recipe.md ("Lineage").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.commit.complete import PROGRAM
from ckpt.errors import DamagedError, NotFoundError
from ckpt.format.manifest import Manifest
from ckpt.merge import parameters
from ckpt.merge.outputs import subject_of
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


def lineage_of(plan: MergePlan, state: Mapping[str, Any]) -> dict[str, Any]:
    """The record. Tensors of one kind share an entry of `actions`; `of` says which, run by run in the order of the index.

    Args:
        state: that the recipe's method leaves for a later merge.
    """
    actions: dict[str, int] = {}  # as JSON, by number
    runs: list[list[int]] = []
    for tensor in plan.tensors:
        number = actions.setdefault(json.dumps(_action(plan, tensor)), len(actions))
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
        "actions": [json.loads(action) for action in actions],
        "of": runs,
        "dropped": len(plan.catalog.dropped),
        **({"state": {"method": plan.bounds[0].method.name, **state}} if state else {}),
    }


def _action(plan: MergePlan, tensor: TensorPlan) -> dict[str, Any]:
    feeds = [feed for feed in tensor.feeds if feed.role in ("x", "base")]
    masters = [feed.source for feed in feeds if feed.role == "x" and tensor.entry.masters[feed.source]]
    # A master copy is told by the word: names in full would make an entry of every tensor.
    known = subject_of(tensor.spec.name, tensor.output)
    names = [None if f.source in masters or f.spec.name == known else f.spec.name for f in feeds]
    method = plan.bounds[tensor.bound].method if tensor.bound >= 0 else None
    return {
        "policy": tensor.entry.decision.policy,
        "why": tensor.entry.decision.why,
        "method": method.name if method is not None else {"pool": "pooled", "linear": "mean"}.get(tensor.kind),
        "parameters": {} if method is None else parameters.plain(method),
        "sources": [feed.source for feed in feeds],
        "weights": None if tensor.coefficients is None else [_weight(tensor, feed.source) for feed in feeds],
        "masters": masters,
        **({"names": names} if any(names) else {}),
        **({"output": tensor.output} if tensor.output else {}),
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
                tensor=other or subject_of(name, action.get("output", 0)),
                master=source in action["masters"],
            )
            for source, weight, other in zip(action["sources"], weights, names, strict=True)
        ),
    )


def _label(record: Mapping[str, Any], source: int) -> str:
    one = record["base"] if source < 0 else record["sources"][source]
    text = one["url"] if one["kind"] == "folder" else f"{one['url']}@{one['step']}"
    return f"base: {text}" if source < 0 else text
