"""How a rank's tensors lie on its meshes, as plain values that travel in its receipt.

In: parts. Out: JSON values, or None where a placement has no such form (flat ranges, annotations). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt.layout.describe import where_of_dtensor
from ckpt.state.tensors import MeshPlacement, Part


def describe_parts(parts: Sequence[Part]) -> dict[str, Any] | None:
    """`{"axes": [[name, size], ...], "cuts": [[[[axis, dim], ...], [tensor name, ...]], ...]}`; None when there is no such form.

    Axes are those of the largest mesh among the parts, in its order; a whole tensor has no cuts.
    """
    distinct = {id(part.located.on): part.located.on for part in parts}  # thousands of parts share a few
    meshes = {on for on in distinct.values() if on is not None}
    axes: list[tuple[str, int]] = []
    for mesh in sorted(meshes, key=lambda m: len(m.mesh_shape)):
        named = list(zip(_names(mesh), mesh.mesh_shape, strict=True))
        if any(axis not in named for axis in axes):
            return None  # meshes that are not parts of one mesh
        axes = named
    cuts: dict[tuple[tuple[str, int], ...], list[str]] = {}
    known: dict[tuple[int, int], tuple[tuple[str, int], ...] | None] = {}
    for part in parts:
        on, num_dims = part.located.on, len(part.spec.shape)
        if on is None:
            steps = _steps(part)
        else:
            if (id(on), num_dims) not in known:
                known[id(on), num_dims] = _steps(part)
            steps = known[id(on), num_dims]
        if steps is None:
            return None
        cuts.setdefault(steps, []).append(part.spec.name)
    return {"axes": axes, "cuts": [[list(steps), names] for steps, names in cuts.items()]}


def _names(mesh: MeshPlacement) -> list[str]:
    """Axis names; `dp` for an unnamed mesh of one dim (what FSDP2 makes), `axis0`, ... for others."""
    unnamed = ["dp"] if len(mesh.axes) == 1 else [f"axis{i}" for i in range(len(mesh.axes))]
    return [name or unnamed[i] for i, name in enumerate(mesh.axes)]


def _steps(part: Part) -> tuple[tuple[str, int], ...] | None:
    on = part.located.on
    if on is None:
        return () if part.located.is_whole or 0 in part.spec.shape else None
    found = where_of_dtensor(_names(on), on.mesh_shape, on.placements, len(part.spec.shape))
    return None if found is None else tuple((step.axis, step.dim) for step in found.shard)
