"""All ranks go back behind damage alike, also when one alone can see it; and come past the damaged step again.

Method: two or four real ranks over gloo, each with tensors that no other one reads; the image of one is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt.commit import find
from ckpt.config import Options
from ckpt.store.open import open_store
from tests.workers.rank_group import RankGroup

pytestmark = pytest.mark.multirank

Groups = Callable[[int], RankGroup]


def flip(folder: Path, step: int, pattern: str) -> None:
    (path,) = folder.glob(f"step-{step:012d}/{pattern}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def image(rank: int) -> str:
    return f"*/{rank:05d}-of-*.safetensors"


@pytest.mark.parametrize(
    ("held", "stored", "damaged", "expected", "passed_over"),
    [
        # Steps in memory, and on the store; (tier, step, file) that are damaged; what comes back; what is passed over
        ((), (5, 7), [("store", 7, image(1))], ("store", 5), ["7 on the store: rank 1"]),
        ((), (5, 7), [("store", 7, image(0))], ("store", 5), ["7 on the store: rank 0"]),
        ((), (5, 7), [("store", 7, "manifest.json")], ("store", 5), ["7 on the store: rank 0"]),
        ((6,), (5, 7), [("store", 7, image(1))], ("memory", 6), ["7 on the store: rank 1"]),
        (
            (6, 4),
            (3, 5, 7),
            [("store", 7, image(1)), ("memory", 6, image(0)), ("store", 5, "*/fragments.parquet")],
            ("memory", 4),
            ["7 on the store: rank 1", "6 in memory: rank 0", "5 on the store: rank 0"],
        ),
    ],
)
def test_all_ranks_go_back_alike(
    rank_group: Groups,
    tmp_path: Path,
    held: tuple[int, ...],
    stored: tuple[int, ...],
    damaged: list[tuple[str, int, str]],
    expected: tuple[str, int],
    passed_over: list[str],
) -> None:
    ranks = rank_group(2)
    for name, steps in (("memory", held), ("store", stored)):
        (tmp_path / name).mkdir()
        ranks.call("tests.workers.going_back:save", str(tmp_path / name), *steps)
    for tier, step, pattern in damaged:
        flip(tmp_path / tier, step, pattern)
    found = ranks.call("tests.workers.going_back:come_back", str(tmp_path / "store"), str(tmp_path / "memory"), held)
    assert found[0] == found[1]
    assert (found[0]["step"], found[0]["is_right"], len(found[0]["chosen"])) == (expected, True, 1)
    assert len(found[0]["passed_over"]) == len(passed_over)
    for text, start in zip(found[0]["passed_over"], passed_over, strict=True):
        assert text.startswith(f"step {start}: ")


def test_damage_on_one_rank_leads_no_rank_on_where_another_is_denied(rank_group: Groups, tmp_path: Path) -> None:
    ranks, url = rank_group(2), tmp_path / "store"
    ranks.call("tests.workers.going_back:save", str(url), 5, 7)
    flip(url, 7, image(1))
    (tmp_path / "memory").mkdir()
    found = ranks.call("tests.workers.going_back:come_back", str(url), str(tmp_path / "memory"), (), 0)
    assert [one["error"] for one in found] == ["StoreError", "RankFailedError"]


def test_all_ranks_skip_the_damaged_step_and_save_the_next(rank_group: Groups, tmp_path: Path) -> None:
    ranks = rank_group(4)
    ranks.call("tests.workers.going_back:train", str(tmp_path), 2, 4)
    flip(tmp_path, 4, image(3))
    found: list[Any] = ranks.call("tests.workers.going_back:train", str(tmp_path), 3, 4, 5, 6)
    assert found == [{"start": 2, "told": {3: None, 4: "skipped", 5: 5, 6: 6}}] * 4
    assert find.steps(open_store(tmp_path, options=Options())) == [2, 4, 5, 6]
    assert [one["start"] for one in ranks.call("tests.workers.going_back:train", str(tmp_path))] == [6] * 4
