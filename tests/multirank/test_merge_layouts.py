"""One model saved on every layout by real ranks, merged as it lies.

Goal: sources may have any layouts and numbers of ranks. Method: all sources hold the oracle's values, so the mean of them is the
oracle, bit for bit. Their second moments, read in place by an elementwise method, are the oracle's too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import ckpt
from ckpt.merge.method import Constants, Elementwise, Float64Array, Needs
from ckpt.merge.tile import Tile
from tests.workers import matrix
from tests.workers import model as net
from tests.workers.layouts import LAYOUTS
from tests.workers.oracle import param_values, slot_values
from tests.workers.rank_group import RankGroup

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]


@ckpt.merge_method("second_moment")
@dataclass(frozen=True, kw_only=True)
class SecondMoment(Elementwise):
    """Adam's second moments, which must be the same in all sources; the parameter where none has one (it is frozen)."""

    @property
    def needs(self) -> Needs:
        return Needs(slots=("exp_avg_sq",))

    def apply(self, tile: Tile, constants: Constants) -> Float64Array:
        found = [tile.slot("exp_avg_sq", source) for source in range(len(tile))]
        first = found[0]
        if first is None:
            assert not any(one is not None for one in found), tile.name
            return tile.array(0)
        assert all(one is not None and (one == first).all() for one in found), tile.name
        return first


def test_sources_on_all_layouts_are_merged_as_they_lie(rank_group: Callable[[int], RankGroup], tmp_path: Path) -> None:
    sources = []
    for world in (1, 2, 4):
        per_rank = rank_group(world).call("tests.workers.matrix:save_all", str(tmp_path), timeout_s=90.0)
        assert not [text for one in per_rank for text in one.values() if text]
        sources += [f"{tmp_path}/{kind}-{world}@{matrix.STEP}" for kind in LAYOUTS[world]]
    rules = [{"match": "scale", "policy": "newest"}]  # it holds NaN on purpose
    ckpt.merge(sources, tmp_path / "merged", rules=rules, optimizer="combine")
    with ckpt.open(tmp_path / "merged") as checkpoint:
        for name, shape in net.global_shapes().items():
            found = checkpoint[f"model/{name}"][...].numpy()
            assert found.tobytes() == param_values(name, shape).tobytes(), name
    ckpt.merge(sources, tmp_path / "moments", method=SecondMoment, rules=rules)
    with ckpt.open(tmp_path / f"{LAYOUTS[1][0]}-1") as one:
        trained = [name for name in net.global_shapes() if f"optimizer/{name}/exp_avg_sq" in one]
    assert len(trained) > 10
    with ckpt.open(tmp_path / "moments") as checkpoint:
        for name in trained:
            expected = slot_values("exp_avg_sq", param_values(name, net.global_shapes()[name]))
            assert checkpoint[f"model/{name}"][...].numpy().tobytes() == expected.tobytes(), name

    for world in (1, 2, 4):
        per_rank = rank_group(world).call("tests.workers.matrix:load_model", str(tmp_path / "merged"), timeout_s=90.0)
        assert not [(rank, kind, faults) for rank, one in enumerate(per_rank) for kind, faults in one.items() if faults]
