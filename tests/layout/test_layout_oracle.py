"""Goal: a layout gives every rank exactly the elements that cutting the tensors directly gives it, for every rule.

Method: hypothesis draws meshes, shapes and rules; an oracle cuts tensors of element numbers with torch.chunk, following
the words of the reference and none of the code under test. Every element must be held once per replica group.
"""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Experts, Flat, Pad, Parts, Pipeline, Rule, ShardStep, Where
from tests.layout.cutting import filled, held, numbered, padded, piece

AXES = ("pp", "dp", "ep", "tp")
PATTERN = (NamePattern("layers.{layer}.**"),)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    names = draw(st.permutations(AXES))
    return Mesh(axes=tuple((name, draw(st.integers(1, 3))) for name in names[: draw(st.integers(1, 4))]))


@st.composite
def cuts(draw: st.DrawFn, mesh: Mesh, num_dims: int) -> tuple[ShardStep, ...]:
    axes = draw(st.permutations(mesh.names))[: draw(st.integers(0, len(mesh.names)))]
    return tuple(ShardStep(axis=axis, dim=draw(st.integers(0, num_dims - 1))) for axis in axes)


def expected(where: Where, tensor: torch.Tensor, mesh: Mesh, at: dict[str, int]) -> torch.Tensor:
    """The local tensor that a rank should have, cut directly."""
    for step in where.shard if tensor.dim() else ():
        num, index, dim = mesh.size(step.axis), at[step.axis], step.dim
        if where.parts is not None and where.parts.axis == step.axis:
            parts = torch.split(tensor, list(where.parts.sizes), dim=dim)
            tensor = torch.cat([piece(part, num, index, dim) for part in parts], dim=dim)
            continue
        if where.pad is not None and where.pad.axis == step.axis:
            unit = where.pad.multiple * num
            tensor = padded(tensor, math.ceil(tensor.shape[dim] / unit) * unit, dim)
        tensor = piece(tensor, num, index, dim)
    return tensor


@settings(deadline=None, max_examples=150)
@given(data=st.data(), mesh=meshes(), shape=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_every_rank_holds_what_cutting_directly_gives_it(data: st.DataObject, mesh: Mesh, shape: list[int]) -> None:
    shard = data.draw(cuts(mesh, len(shape)))
    first_cuts = {step.dim: step.axis for step in reversed(shard)}
    special = data.draw(st.sampled_from([None, *first_cuts]))
    where = Where(shard=shard)
    if special is not None and data.draw(st.booleans()):
        sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        shape[special] = sum(sizes)
        where = Where(shard=shard, parts=Parts(axis=first_cuts[special], sizes=tuple(sizes)))
    elif special is not None:
        where = Where(shard=shard, pad=Pad(axis=first_cuts[special], multiple=data.draw(st.integers(1, 3))))
    layout = Layout(mesh=mesh, rules=(Rule(match=PATTERN, where=where),))
    elements: list[int] = []
    for rank in range(mesh.world_size):
        at = dict(zip(mesh.names, mesh.coordinate(rank), strict=True))
        placement = layout.place("model/layers.0.w", shape, rank)
        assert placement is not None
        assert filled(placement, shape).tolist() == expected(where, numbered(shape), mesh, at).tolist()
        elements += held(placement, shape)
    copies = mesh.world_size // math.prod(mesh.size(step.axis) for step in shard)
    assert sorted(elements) == sorted(list(range(math.prod(shape))) * copies)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), mesh=meshes(), layers=st.integers(1, 7), experts=st.integers(1, 7))
def test_stages_and_experts_own_their_tensors_alone(data: st.DataObject, mesh: Mesh, layers: int, experts: int) -> None:
    pipeline = Pipeline(axis="pp", layers=layers) if "pp" in mesh.names else None
    where = Where(experts=Experts(axis="ep", num=experts)) if "ep" in mesh.names else Where()
    rule = Rule(match=(NamePattern("layers.{layer}.experts.{expert}.w"),), where=where)
    layout = Layout(mesh=mesh, rules=(rule,), pipeline=pipeline)
    stage_of = (
        np.concatenate([[i] * n for i, n in enumerate(map(len, np.array_split(range(layers), mesh.size("pp"))))])
        if pipeline
        else None
    )
    for layer, expert in itertools.product(range(layers), range(experts)):
        name = f"model/layers.{layer}.experts.{expert}.w"
        holders = {rank for rank in range(mesh.world_size) if layout.place(name, (2,), rank) is not None}
        wanted = set(range(mesh.world_size))
        for rank in range(mesh.world_size):
            at = dict(zip(mesh.names, mesh.coordinate(rank), strict=True))
            if stage_of is not None and at["pp"] != stage_of[layer]:
                wanted.discard(rank)
            if "ep" in mesh.names and expert not in piece(torch.arange(experts), mesh.size("ep"), at["ep"], 0):
                wanted.discard(rank)
        assert holders == wanted


@st.composite
def flat_cases(draw: st.DrawFn) -> tuple[Mesh, Where, list[tuple[str, tuple[int, ...]]], Pipeline | None]:
    mesh = draw(meshes())
    axis = draw(st.sampled_from(mesh.names))
    num_layers = draw(st.integers(1, 4))
    pipeline = Pipeline(axis="pp", layers=num_layers) if "pp" in mesh.names and axis != "pp" else None
    taken = {axis, "pp"} if pipeline else {axis}
    free = [name for name in mesh.names if name not in taken]
    shard = tuple(ShardStep(axis=name, dim=0) for name in free if draw(st.booleans()))
    names = [f"layers.{layer}.{leaf}" for layer in range(num_layers) for leaf in ("a", "b")]
    order = tuple(draw(st.permutations(names))) if draw(st.booleans()) else ()
    shapes = [tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))) for _ in names]
    where = Where(shard=shard, flat=Flat(axis=axis, multiple=draw(st.integers(1, 4)), order=order))
    return mesh, where, list(zip(names, shapes, strict=True)), pipeline


@settings(deadline=None, max_examples=120)
@given(case=flat_cases())
def test_flat_buffers_are_the_concatenated_local_tensors_cut_evenly(
    case: tuple[Mesh, Where, list[tuple[str, tuple[int, ...]]], Pipeline | None],
) -> None:
    mesh, where, tensors, pipeline = case
    layout = Layout(mesh=mesh, rules=(Rule(match=PATTERN, where=where),), pipeline=pipeline)
    bound = layout.bind([(f"model/{name}", shape) for name, shape in tensors])
    assert where.flat is not None
    num = mesh.size(where.flat.axis)
    order = where.flat.order or sorted(name for name, _ in tensors)
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    for rank in range(mesh.world_size):
        at = dict(zip(mesh.names, mesh.coordinate(rank), strict=True))
        mine: dict[str, np.ndarray] = {}
        buffer: list[tuple[str, int]] = []
        shape_of = dict(tensors)
        for name in order:
            layer = int(name.split(".")[1])
            if pipeline is not None and pipeline.stage_of(layer, mesh.size("pp")) != at["pp"]:
                assert bound.place(f"model/{name}", rank) is None
                continue
            local = expected(Where(shard=where.shard), numbered(shape_of[name]), mesh, at)
            buffer += [(name, number) for number in local.reshape(-1).tolist()]
            placement = bound.place(f"model/{name}", rank)
            assert placement is not None and placement.flat == "flat"
            mine[name] = filled(placement, shape_of[name])
        unit = where.flat.multiple * num
        size = math.ceil(len(buffer) / unit) * unit // num
        cut = buffer[at[where.flat.axis] * size : (at[where.flat.axis] + 1) * size]
        for name, local_numbers in mine.items():
            wanted = [number if owner == name else -1 for owner, number in cut]
            assert local_numbers.tolist() == wanted + [-1] * (size - len(cut))
            counts.update((name, number) for owner, number in cut if owner == name)
    copies = {
        name: sum(bound.place(f"model/{name}", r) is not None for r in range(mesh.world_size)) for name, _ in tensors
    }
    for name, shape in tensors:
        groups = copies[name] // num // math.prod(mesh.size(step.axis) for step in where.shard)
        assert [counts[name, i] for i in range(math.prod(shape))] == [groups] * math.prod(shape)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), mesh=meshes())
def test_the_boxes_of_all_ranks_at_once_are_those_of_each_rank(data: st.DataObject, mesh: Mesh) -> None:
    """The vectorised table and the rank-by-rank one must agree, row by row."""
    axis = data.draw(st.sampled_from(mesh.names))
    pipeline = Pipeline(axis="pp", layers=3) if "pp" in mesh.names and axis != "pp" else None
    rules = [Rule(match=(NamePattern("layers.{layer}.cut"),), where=Where(shard=data.draw(cuts(mesh, 2))))]
    rules.append(
        Rule(
            match=(NamePattern("layers.{layer}.fused"),),
            where=Where(shard=(ShardStep(axis=axis, dim=1),), parts=Parts(axis=axis, sizes=(1, 4, 2))),
        )
    )
    rules.append(
        Rule(
            match=(NamePattern("head"),),
            where=Where(shard=(ShardStep(axis=axis, dim=0),), pad=Pad(axis=axis, multiple=2)),
        )
    )
    rules.append(Rule(match=(NamePattern("layers.{layer}.flat"),), where=Where(flat=Flat(axis=axis, multiple=3))))
    rules.append(Rule(match=(NamePattern("scale"),)))
    tensors: list[tuple[str, tuple[int, ...]]] = [("model/head", (7,)), ("model/scale", ())]
    for layer in range(3):
        rows = data.draw(st.integers(0, 7))
        tensors += [(f"model/layers.{layer}.cut", (rows, 5)), (f"model/layers.{layer}.fused", (2, 7))]
        tensors += [(f"model/layers.{layer}.flat", (layer + 1, 3)), (f"optimizer/layers.{layer}.cut/step", ())]
    bound = Layout(mesh=mesh, rules=tuple(rules), pipeline=pipeline).bind(tensors)
    table = bound.all_ranks()
    assert (np.diff(table.boxes.tensor.astype(np.int64) * mesh.world_size + table.rank) >= 0).all()
    for rank in range(mesh.world_size):
        mine, alone = table.boxes.take(table.rank == rank), bound.box_table(rank)
        assert rows_of(mine, tensors) == rows_of(alone, tensors)


def rows_of(boxes: object, tensors: list[tuple[str, tuple[int, ...]]]) -> list[object]:
    from ckpt.layout.box import BoxTable

    assert isinstance(boxes, BoxTable)
    numbers = boxes.tensor.tolist()
    return [(number, boxes.box(row, len(tensors[number][1]))) for row, number in enumerate(numbers)]
