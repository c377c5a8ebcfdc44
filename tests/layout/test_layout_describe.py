"""Goal: a running job's placements come back as a layout file of a few lines that says exactly the same.

Method: placements of a small transformer under TP x FSDP2, and drawn ones, described and then placed again.
"""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import InvalidInputError
from ckpt.layout.describe import layout_of_tensors, where_of_dtensor
from ckpt.layout.files import write_layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.placement import DimPlacement, Replicate, Shard, StridedShard, dtensor_placement
from ckpt.layout.rules import ShardStep, Where

MESH = Mesh(axes=(("dp", 2), ("tp", 2)))
ROWS = Where(shard=(ShardStep(axis="tp", dim=0), ShardStep(axis="dp", dim=0)))
COLUMNS = Where(shard=(ShardStep(axis="dp", dim=0), ShardStep(axis="tp", dim=1)))


def test_a_transformer_is_a_few_rules() -> None:
    known: dict[str, tuple[tuple[int, ...], Where]] = {"model/embedding.weight": ((16, 4), ROWS)}
    for i in range(12):
        for leaf, where in (("wq", ROWS), ("wk", ROWS), ("wo", COLUMNS)):
            known[f"model/layers.{i}.{leaf}.weight"] = ((8, 4), where)
            known[f"optimizer/layers.{i}.{leaf}.weight/exp_avg"] = ((8, 4), where)
            known[f"optimizer/layers.{i}.{leaf}.weight/step"] = ((), Where())
    layout = layout_of_tensors(MESH, known)
    texts = sorted((pattern.text, rule.where) for rule in layout.rules for pattern in rule.match)
    assert texts == [
        ("embedding.weight", ROWS),
        ("layers.*.wk.weight", ROWS),
        ("layers.*.wo.weight", COLUMNS),
        ("layers.*.wq.weight", ROWS),
    ]
    assert len(write_layout(layout).splitlines()) < 25


def test_state_that_lies_apart_from_its_parameter_has_a_rule_of_its_own() -> None:
    known = {
        "model/w": ((8, 4), Where()),
        "optimizer/w/exp_avg": ((8, 4), ROWS),
        "model/layers.0.w": ((8, 4), ROWS),
        "model/layers.1.w": ((8, 4), COLUMNS),
        "ema/w": ((8, 4), COLUMNS),
    }
    layout = layout_of_tensors(MESH, known)
    assert {name: layout.assign(name).where for name in known} == {name: where for name, (_, where) in known.items()}


def test_a_name_that_no_pattern_can_say_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        layout_of_tensors(MESH, {"model/{a": ((2,), ROWS), "model/b": ((2, 2), COLUMNS)})


def test_tensors_that_all_lie_alike_are_one_rule_whatever_their_names() -> None:
    layout = layout_of_tensors(MESH, {f"model/{{t{i}": ((8, 4), ROWS) for i in range(50)})
    assert [(rule.match[0].text, rule.where) for rule in layout.rules] == [("**", ROWS)]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), mesh=st.tuples(*[st.integers(1, 3)] * 3), shape=st.tuples(*[st.integers(0, 9)] * 2))
def test_a_described_dtensor_lies_where_it_lay(
    data: st.DataObject, mesh: tuple[int, int, int], shape: tuple[int, int]
) -> None:
    kinds = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, st.integers(0, 1)),
        st.builds(StridedShard, st.integers(0, 1), st.sampled_from([1, mesh[1], mesh[2], mesh[1] * mesh[2]])),
    )
    placements: list[DimPlacement] = [data.draw(kinds) for _ in mesh]
    where = where_of_dtensor("abc", mesh, placements, 2)
    if where is None:
        assert any(isinstance(item, StridedShard) for item in placements)
        return
    layout = layout_of_tensors(Mesh(axes=tuple(zip("abc", mesh, strict=True))), {"model/w": (shape, where)})
    for rank, at in enumerate(itertools.product(*(range(n) for n in mesh))):
        assert layout.place("model/w", shape, rank) == dtensor_placement(shape, mesh, at, placements)
    assert math.prod(mesh) == layout.mesh.world_size
