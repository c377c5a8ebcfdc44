"""A trainer that comes back loads its own agent's image without an index, and only when that is all that the ranks want.

Method: one rank with a real agent, in this process; a second rank's word is played. What does not fit must change nothing, and
come back the other way, which knows every layout and says what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.agent import restore, segments
from ckpt.agent.identity import memory_folder
from ckpt.agent.tier import Tier
from ckpt.config import Options
from ckpt.engine import near
from ckpt.engine.keeper import OwnImage
from ckpt.engine.near import load_near
from ckpt.engine.world import AloneWorld
from ckpt.errors import DamagedError, MismatchError, RankFailedError
from tests.agent.conftest import Make, leave
from tests.drill.job import flip

State = dict[str, Any]


def state(value: float, **more: Any) -> State:
    """Tensors of two dtypes, one empty, and objects."""
    tensors = {"w": torch.full((300, 700), float(value)), "n": torch.full((5,), int(value)), "none": torch.empty(0, 3)}
    return {"model": tensors, "rng": ckpt.RNG(), "counts": {"seen": int(value), "rate": value / 7}, **more}


def protected(make: Make) -> None:
    """Step 3 is in the memory of an agent whose trainer is gone."""
    checkpointer = make()
    checkpointer.prepare(state(0))
    pending = checkpointer.step(3, state(3))
    assert pending is not None and pending.wait(60.0).tier == "memory"
    leave(checkpointer)


def tier_of(checkpointer: ckpt.Checkpointer) -> Tier:
    assert isinstance(checkpointer._tier, Tier)
    return checkpointer._tier


def no_index(*_: object, **__: object) -> None:
    raise AssertionError("an index was made")


def test_a_trainer_loads_its_own_agents_image_without_an_index(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    protected(make)
    monkeypatch.setattr(restore, "index_files", no_index)
    torch.manual_seed(11)
    again, target = make(), state(0)
    assert again.restore(target) == 3
    assert again.restored is not None and (again.restored.tier, again.restored.passed_over) == ("memory", ())
    assert again.restored.nbytes == 300 * 700 * 4 + 5 * 8
    for name, expected in state(3)["model"].items():
        assert torch.equal(target["model"][name], expected)
    assert target["counts"] == {"seen": 3, "rate": 3 / 7}


def with_model(name: str, tensor: torch.Tensor) -> State:
    out = state(0)
    out["model"][name] = tensor
    return out


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (with_model("more", torch.zeros(3)), "`model/more`"),
        (with_model("w", torch.zeros(700, 300)), "another shape"),
        (with_model("w", torch.zeros(300, 700, dtype=torch.float64)), "dtype"),
        (state(0, other={"new": 1}), "objects not in the checkpoint"),
    ],
    ids=["more", "shape", "dtype", "object"],
)
def test_a_state_that_differs_is_refused_in_the_words_of_any_load(make: Make, target: State, error: str) -> None:
    protected(make)
    again = make()
    tier = tier_of(again)
    assert load_near(tier.own(0), target, AloneWorld(), again._run.options) is None
    with pytest.raises(MismatchError, match=error):
        again.restore(target)
    assert all(not tensor.any() for tensor in target["model"].values())


def test_a_part_of_what_was_saved_is_loaded_alone(make: Make) -> None:
    protected(make)
    target = {"model": state(0)["model"]}
    loaded = load_near(tier_of(make()).own(0), target, AloneWorld(), Options())
    assert loaded is not None and (loaded.step, loaded.index_nbytes) == (3, 0)
    assert torch.equal(target["model"]["w"], torch.full((300, 700), 3.0))


def test_damage_that_came_after_the_last_look_reaches_no_tensor(make: Make, folders: Options) -> None:
    protected(make)
    again, target = make(), state(0)
    (path,) = [p for p in segments.listing(memory_folder(folders)) if segments.peek(p).step == 3]
    header = segments.peek(path)
    own = tier_of(again).own(0)
    assert own is not None
    flip(path, header, header.image_bytes // 2, bit=5)
    with pytest.raises(DamagedError, match="`model/w` is damaged"):
        load_near(own, target, AloneWorld(), Options())
    assert not target["model"]["n"].any() or torch.equal(target["model"]["n"], state(3)["model"]["n"])


class Two:
    """A world of two; what the other rank says is made of what this one says."""

    rank, size = 0, 2

    def __init__(self, other: Callable[[NDArray[np.uint8]], bytes]) -> None:
        self._other = other

    def all_gather(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        return [data, np.frombuffer(self._other(data), np.uint8)]

    def all_to_all(self, *_: object) -> None:
        raise AssertionError("nothing is exchanged")


def said(**changes: Any) -> Callable[[NDArray[np.uint8]], bytes]:
    """What this rank told, of rank 1, and changed."""

    def answer(data: NDArray[np.uint8]) -> bytes:
        told = data.tobytes()
        if told[:1] in (b"\0", b"\1") and len(told) < 8:
            return told
        size = int.from_bytes(told[:8], "little")
        head = json.loads(told[8 : 8 + size])
        head["objects"] = [row | {"rank": 1} for row in head["objects"]]
        head = json.dumps(head | changes).encode()
        return len(head).to_bytes(8, "little") + head + told[8 + size :]

    return answer


@pytest.fixture
def own_of_two(make: Make, monkeypatch: pytest.MonkeyPatch) -> OwnImage:
    """The image of a rank that was one of two."""
    protected(make)
    own = tier_of(make()).own(0)
    assert own is not None
    unpack = near.receipt.unpack
    monkeypatch.setattr(near.receipt, "unpack", lambda *a, **k: _of_two(unpack(*a, **k)))
    return own


def _of_two(made: Any) -> Any:
    return dataclasses.replace(made, world=2)


@pytest.mark.parametrize(
    "changes", [{"fits": False, "objects": []}, {"keys": ["model"]}], ids=["does not fit there", "other keys"]
)
def test_all_ranks_take_the_other_way_when_one_must(own_of_two: OwnImage, changes: dict[str, Any]) -> None:
    target = state(0)
    assert load_near(own_of_two, target, Two(said(**changes)), Options()) is None
    assert not target["model"]["w"].any() and target["counts"]["seen"] == 0


def test_a_rank_without_an_image_says_so_and_nothing_else() -> None:
    world = Two(said(fits=True))
    assert load_near(None, state(0), world, Options()) is None


def test_what_failed_on_another_rank_fails_here(own_of_two: OwnImage) -> None:
    def other(data: NDArray[np.uint8]) -> bytes:
        return b"\1tensor `x` is damaged" if len(data) < 8 else said()(data)

    with pytest.raises(RankFailedError, match="the state is partly changed: load again; rank 1: tensor `x` is damaged"):
        load_near(own_of_two, state(0), Two(other), Options())


def test_objects_too_large_to_be_told_to_all_take_the_other_way(make: Make, tmp_path: Path) -> None:
    checkpointer, large = make(), {"model": {"w": torch.ones(3)}, "log": {"text": "x" * (2 << 20)}}
    checkpointer.prepare(large)
    pending = checkpointer.step(1, large)
    assert pending is not None
    pending.wait(60.0)
    leave(checkpointer)
    target, again = {"model": {"w": torch.zeros(3)}, "log": {"text": ""}}, make()
    assert load_near(tier_of(again).own(0), target, AloneWorld(), Options()) is None
    assert again.restore(target) == 1 and len(target["log"]["text"]) == 2 << 20
