"""Replicas on real ranks whose structure changes in mid-run.

Goal: LoRA weights that appear and a layer that is unfrozen are in the very next save, bit by bit, and the save after it is even
again. Method: real ranks save and load after every step; the index says which bytes each rank wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

SCENARIO = "tests.workers.replicas:lora_is_added_and_a_layer_unfrozen"
CHANGES = (3, 6)  # steps of which the structure is new


@pytest.mark.parametrize("world", [2, 3])
def test_a_changed_structure_is_complete_at_once_and_even_after_one_save(
    world: int, rank_group: Callable[[int], RankGroup], tmp_path: Path
) -> None:
    found = rank_group(world).call(SCENARIO, str(tmp_path / "run"), False)
    assert all(one == found[0] for one in found)
    for step, held in enumerate(found[0], 1):
        mean = sum(held) / world
        assert len(held) == world
        if step not in CHANGES:
            assert max(abs(nbytes - mean) for nbytes in held) <= 0.05 * mean, (step, held)


def test_incremental_saves_of_replicas_write_what_was_trained(
    rank_group: Callable[[int], RankGroup], tmp_path: Path
) -> None:
    found = rank_group(2).call(SCENARIO, str(tmp_path / "run"), True)[0]
    layer = 512 * 512 * 4
    trained, lora = 3 * layer, 3 * 2 * 300 * 512 * 4  # each with two moments
    totals = [sum(held) for held in found]
    assert 4 * layer < totals[0] <= 4 * layer + trained
    assert trained <= totals[1] < trained + 1024
    assert trained + lora <= totals[4] < trained + lora + 1024
    assert 2 * trained + lora <= totals[7] < 2 * trained + lora + 1024
