"""How a rank's tensors lie on its meshes, as plain values that travel in its receipt.

In: specs and where their parts lie. Out: JSON values, or None where a placement has no such form (flat ranges,
annotations). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt.format.spec import TensorSpec
from ckpt.layout.describe import where_of_dtensor
from ckpt.state.tensors import MeshPlacement, Part

Lies = MeshPlacement | bool  # where a part lies: a DTensor's placements, else whether this rank holds all of it


def lies(part: Part) -> Lies:
    """Where a part lies, without its memory."""
    return part.located.on or part.located.is_whole


def describe(specs: Sequence[TensorSpec], places: Sequence[Lies]) -> dict[str, Any] | None:
    """`{"axes": [[name, size], ...], "cuts": [[[[axis, dim], ...], [tensor name, ...]], ...]}`; None when there is no such form.

    Axes are those of the largest mesh among the parts, in its order; a whole tensor has no cuts.
    """
    distinct = {id(on): on for on in places}  # thousands of parts share a few
    meshes = {on for on in distinct.values() if isinstance(on, MeshPlacement)}
    axes: list[tuple[str, int]] = []
    for mesh in sorted(meshes, key=lambda m: len(m.mesh_shape)):
        named = list(zip(_names(mesh), mesh.mesh_shape, strict=True))
        if any(axis not in named for axis in axes):
            return None  # meshes that are not parts of one mesh
        axes = named
    cuts: dict[tuple[tuple[str, int], ...], list[str]] = {}
    known: dict[tuple[int, int], tuple[tuple[str, int], ...] | None] = {}
    for spec, on in zip(specs, places, strict=True):
        steps: tuple[tuple[str, int], ...] | None
        if isinstance(on, bool):
            steps = () if on or 0 in spec.shape else None
        else:
            key = (id(on), len(spec.shape))
            if key not in known:
                known[key] = _steps(on, len(spec.shape))
            steps = known[key]
        if steps is None:
            return None
        cuts.setdefault(steps, []).append(spec.name)
    return {"axes": axes, "cuts": [[list(steps), names] for steps, names in cuts.items()]}


def _names(mesh: MeshPlacement) -> list[str]:
    """Axis names; `dp` for an unnamed mesh of one dim (what FSDP2 makes), `axis0`, ... for others."""
    unnamed = ["dp"] if len(mesh.axes) == 1 else [f"axis{i}" for i in range(len(mesh.axes))]
    return [name or unnamed[i] for i, name in enumerate(mesh.axes)]


def _steps(on: MeshPlacement, num_dims: int) -> tuple[tuple[str, int], ...] | None:
    found = where_of_dtensor(_names(on), on.mesh_shape, on.placements, num_dims)
    return None if found is None else tuple((step.axis, step.dim) for step in found.shard)
