"""The layout that a job has, told from where its tensors lie: few rules with patterns instead of one per tensor.

In: placements by tensor name, as DTensors have them. Out: `Where` records and a `Layout`. Pure. Never says more than it
was told: the layout gives every named tensor exactly its own placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt.errors import InvalidInputError
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.layout.placement import DimPlacement, shard_order
from ckpt.layout.rules import Rule, ShardStep, Where

Known = Mapping[str, tuple[tuple[int, ...], Where]]  # tensor name to (global shape, how it lies)


def where_of_dtensor(
    axes: Sequence[str], mesh_shape: Sequence[int], placements: Sequence[DimPlacement], num_dims: int
) -> Where | None:
    """The rule form of a DTensor's placements; None for strided shards that are no nested cuts, which no rule says.

    Args:
        axes: name of each mesh dim.
        mesh_shape: ranks along each mesh dim.
        placements: one per mesh dim, their dims counted from 0.
        num_dims: of the tensor.
    """
    steps: list[ShardStep] = []
    for dim in range(num_dims):
        order = shard_order(dim, mesh_shape, placements)
        if order is None:
            return None
        steps += [ShardStep(axis=axes[mesh_dim], dim=dim) for mesh_dim in order]
    return Where(shard=tuple(steps))


def layout_of_tensors(mesh: Mesh, known: Known) -> Layout:
    """A layout that gives every named tensor its own placement, in few rules.

    Layers that all lie alike are folded into one pattern with `*`; optimizer state that lies like its parameter needs
    no rule. A tensor whose name no pattern can say (it holds `*` or braces) is an InvalidInputError.
    """
    if len({where for _, where in known.values()}) == 1:
        (where,) = {where for _, where in known.values()}
        return Layout(mesh=mesh, rules=_rules({"**": where}))
    own = {name: where for name, (shape, where) in known.items() if not _follows(name, shape, where, known)}
    folded = Layout(mesh=mesh, rules=_rules(_folded(own)))
    if _says(folded, known):
        return folded
    plain = Layout(mesh=mesh, rules=_rules(own))
    if not _says(plain, known):
        raise InvalidInputError("these tensor names cannot be written as a layout: they hold `*`, `{` or `}`")
    return plain


def _says(layout: Layout, known: Known) -> bool:
    try:
        bound = layout.bind((name, shape) for name, (shape, _) in known.items())
    except InvalidInputError:
        return False
    pairs = zip(known.values(), bound.assignments, strict=True)
    return all(shape == () or found.where == where for (shape, where), found in pairs)


def _follows(name: str, shape: tuple[int, ...], where: Where, known: Known) -> bool:
    """True for optimizer state that lies as its parameter's rule will say."""
    parsed = TensorName.parse(name)
    param = known.get(f"model/{parsed.path}") if parsed.slot is not None else None
    return param is not None and (shape == () or (shape, where) == param)


def _folded(own: Mapping[str, Where]) -> dict[str, Where]:
    """Names that differ in numbers alone and lie alike, as one pattern."""
    groups: dict[str, dict[str, Where]] = {}
    for name, where in own.items():
        template = "/".join(
            ".".join("*" if component.isdecimal() else component for component in part.split("."))
            for part in name.split("/")
        )
        groups.setdefault(template, {})[name] = where
    out: dict[str, Where] = {}
    for template, members in groups.items():
        alike = len(set(members.values())) == 1 and len(members) > 1
        out.update({template: next(iter(members.values()))} if alike else members)
    return out


def _rules(own: Mapping[str, Where]) -> tuple[Rule, ...]:
    """One rule per placement. A parameter's pattern is its path, so that its optimizer state follows."""
    groups: dict[Where, list[str]] = {}
    for name, where in own.items():
        parsed = TensorName.parse(name)
        groups.setdefault(where, []).append(parsed.path if parsed.key == "model" and parsed.slot is None else name)
    return tuple(
        Rule(match=tuple(NamePattern(text) for text in sorted(texts)), where=where) for where, texts in groups.items()
    )
