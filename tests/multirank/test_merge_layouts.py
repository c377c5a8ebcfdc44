"""One model saved on every layout by real ranks, merged as it lies.

Goal: sources may have any layouts and numbers of ranks. Method: all sources hold the oracle's values, so the mean of them is the
oracle, bit for bit; and the result loads onto ranks again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt
from tests.workers import matrix
from tests.workers import model as net
from tests.workers.layouts import LAYOUTS
from tests.workers.oracle import param_values
from tests.workers.rank_group import RankGroup

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]


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

    for world in (1, 2, 4):
        per_rank = rank_group(world).call("tests.workers.matrix:load_model", str(tmp_path / "merged"), timeout_s=90.0)
        assert not [(rank, kind, faults) for rank, one in enumerate(per_rank) for kind, faults in one.items() if faults]
