"""Goal: a load by name pattern, of one state key, or of a slice reads the bytes of what it fills and leaves all else alone.

Method: save a model and an optimizer, count through a counting store what a load reads of the image.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.load import Loaded, load_state
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.view import Checkpoint
from ckpt.engine.world import AloneWorld
from ckpt.errors import InvalidInputError, MismatchError
from ckpt.store.counting import CountingStore
from ckpt.store.open import open_store

WIDTH = 256
LAYER_BYTES = WIDTH * WIDTH * 4
BLOCK = 64 * 1024


def job(value: float) -> dict[str, Any]:
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "note": {"value": value}}


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> Callable[[], tuple[StoredCheckpoint, CountingStore]]:
    ckpt.save(job(0.5), tmp_path, step=1)

    def make() -> tuple[StoredCheckpoint, CountingStore]:
        options = Options(read_gap_bytes_max=1)
        store = CountingStore(open_store(tmp_path, options=options))
        return StoredCheckpoint(store, 1, options), store

    return make


def of_image(store: CountingStore) -> int:
    return sum(n for key, n in store.traffic.bytes_read_of.items() if key.endswith(".safetensors"))


def load(opened: Any, state: dict[str, Any], **how: Any) -> tuple[Loaded, int]:
    stored, store = opened()
    stored.specs, stored.objects  # noqa: B018 - the index is read
    before = of_image(store)
    loaded = load_state(stored, state, AloneWorld(), **how)
    objects = sum(row.nbytes for row in stored.objects)
    return loaded, of_image(store) - before - objects


def test_a_pattern_reads_and_changes_only_what_it_names(opened: Any) -> None:
    target = job(0.25)
    before = {name: value.clone() for name, value in target["model"].state_dict().items()}
    loaded, nbytes = load(opened, {"model": target["model"]}, include=["model/{1,4}.**"])

    changed = [name for name, value in target["model"].state_dict().items() if not torch.equal(value, before[name])]
    assert (changed, loaded.num_tensors, loaded.wanted_nbytes) == (["1.weight", "4.weight"], 2, 2 * LAYER_BYTES)
    assert nbytes <= 2 * LAYER_BYTES


def test_the_model_alone_reads_no_optimizer_state(opened: Any) -> None:
    loaded, nbytes = load(opened, {"model": job(0.25)["model"]})

    assert (loaded.wanted_nbytes, nbytes <= 6 * LAYER_BYTES) == (6 * LAYER_BYTES, True)


def test_optimizer_slots_that_no_pattern_names_are_not_made(opened: Any) -> None:
    model = job(0.25)["model"]
    fresh = torch.optim.AdamW(model.parameters())
    load(opened, {"model": model, "optimizer": fresh}, include=["model/**"])

    assert not fresh.state


def test_objects_are_chosen_by_their_own_name(opened: Any) -> None:
    target = job(0.25)
    target["note"] = {"value": 0.0, "more": torch.zeros(0)}
    del target["note"]["more"]
    load(opened, target, include=["note"])
    assert target["note"] == {"value": 0.5}

    target["note"] = {"value": 0.0}
    load(opened, target, include=["model/0.*"])
    assert target["note"] == {"value": 0.0}


@pytest.mark.parametrize(("include", "error"), [(["model/x.*"], MismatchError), ("model/**", InvalidInputError)])
def test_a_pattern_that_names_nothing_is_refused(opened: Any, include: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="include"):
        load(opened, {"model": job(0.25)["model"]}, include=include)


def test_names_outside_the_pattern_are_neither_missing_nor_extra(opened: Any) -> None:
    weight = torch.zeros(WIDTH, WIDTH)
    loaded, _ = load(opened, {"model": {"0.weight": weight, "other": torch.zeros(3)}}, include=["model/0.weight"])
    assert (loaded.missing, loaded.extra, loaded.num_tensors) == ((), (), 1)


def test_a_slice_of_a_lazy_tensor_reads_its_rows(opened: Any) -> None:
    stored, store = opened()
    view = Checkpoint(stored)["model/2.weight"]
    assert view.shape == (WIDTH, WIDTH)
    before = of_image(store)
    rows = view[100:110]

    assert torch.equal(rows, view[...][100:110])
    stored, store = opened()
    Checkpoint(stored)["model/2.weight"][100:110]
    assert 0 < of_image(store) <= before + 2 * BLOCK
