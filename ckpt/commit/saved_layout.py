"""The layout of a saved checkpoint, from what its ranks said of themselves.

In: one description per rank (ckpt/state/describe.py), rank by rank. Out: a layout document, or None where no layout file could
say it. Pure. What it says is checked against nothing here; the index has the truth about every byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.layout.describe import layout_of_tensors
from ckpt.layout.document import to_document
from ckpt.layout.mesh import Mesh
from ckpt.layout.rules import ShardStep, Where


def saved_layout(described: Sequence[dict[str, Any] | None], specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
    """The document. Ranks beyond one mesh are stages of a pipeline (`pp`), or replicas (`replica`) when all hold the same."""
    axes = None
    for one in described:
        if one is None or (axes is not None and one["axes"] and one["axes"] != axes):
            return None
        axes = one["axes"] or axes
    pairs = [(str(name), int(size)) for name, size in axes or []]
    block = math.prod(size for _, size in pairs)
    if len(described) % block:
        return None
    holders: dict[str, set[int]] = {}
    cuts: dict[str, tuple[ShardStep, ...]] = {}
    for said, ranks in _distinct([one["cuts"] for one in described if one is not None]):
        for steps, names in said:
            where = tuple(ShardStep(axis=axis, dim=dim) for axis, dim in steps)
            for name in names:
                if cuts.setdefault(name, where) != where:
                    return None
                holders.setdefault(name, set()).update(ranks)
    stages = len(described) // block
    outer = "pp" if any(len(ranks) < len(described) for ranks in holders.values()) else "replica"
    if stages > 1:
        pairs = [(outer, stages), *pairs]
    known = {}
    for spec in specs:
        own = {rank // block for rank in holders.get(spec.name, ())}
        if len(holders.get(spec.name, ())) != len(own) * block:
            return None  # held by a part of a mesh
        on = () if len(own) == stages else ((outer, tuple(sorted(own))),)
        known[spec.name] = (spec.shape, Where(shard=cuts[spec.name], on=on))
    try:
        return to_document(layout_of_tensors(Mesh(axes=tuple(pairs)), known))
    except InvalidInputError:
        return None


def _distinct(said: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """What ranks said, once, with the ranks that said it: a thousand ranks of one mesh say the same."""
    out: list[tuple[Any, list[int]]] = []
    for rank, one in enumerate(said):
        for other, ranks in reversed(out):
            if other == one:
                ranks.append(rank)
                break
        else:
            out.append((one, [rank]))
    return out
