"""Goal: a read of local files says the same of damage as a read through a store's `read_into`, and damaged bytes reach nobody.

Method: damage, truncate or remove an image of a saved checkpoint; read once natively and once through a counting store.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.view import Checkpoint
from ckpt.errors import DamagedError
from ckpt.store.counting import CountingStore
from ckpt.store.open import open_store

SIZE = 300_000


def image_of(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.rglob("*.safetensors"))


def saved(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    state = {name: torch.randn(SIZE) for name in ("a", "b", "c")}
    ckpt.save({"model": state}, folder, step=1)
    return state


def flip(image: pathlib.Path) -> None:
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 0x10
    image.write_bytes(data)


def cut(image: pathlib.Path) -> None:
    image.write_bytes(image.read_bytes()[:-SIZE])


def link(image: pathlib.Path) -> None:
    image.rename(image.with_suffix(".moved"))
    image.symlink_to(image.with_suffix(".moved"))


@pytest.mark.parametrize("harm", [flip, cut, link, pathlib.Path.unlink])
@pytest.mark.parametrize("direct_io", [True, False])
def test_damage_is_told_in_the_words_of_the_store(
    tmp_path: pathlib.Path, harm: Callable[[pathlib.Path], None], direct_io: bool
) -> None:
    saved(tmp_path)
    harm(image_of(tmp_path))
    options = Options(direct_io=direct_io, read_threads=1)
    said = []
    for wrap in (lambda store: store, CountingStore):
        stored = StoredCheckpoint(wrap(open_store(tmp_path, options=options)), 1, options)
        with pytest.raises(DamagedError) as caught:
            for name in ("a", "b", "c"):
                Checkpoint(stored)[f"model/{name}"][...]
        said.append(str(caught.value))

    assert "is damaged: bytes [" in said[0] and said[0] == said[1]


@pytest.mark.parametrize("direct_io", [True, False])
def test_no_byte_of_a_damaged_block_reaches_the_target(tmp_path: pathlib.Path, direct_io: bool) -> None:
    state = saved(tmp_path)
    flip(image_of(tmp_path))
    target = {name: torch.full((SIZE,), -1.0) for name in state}
    with pytest.raises(DamagedError):
        ckpt.load({"model": target}, tmp_path, options=Options(direct_io=direct_io))

    wrong = {n: int(((target[n] != tensor) & (target[n] != -1.0)).sum()) for n, tensor in state.items()}
    assert wrong == {"a": 0, "b": 0, "c": 0}


def test_progress_adds_up_to_what_is_read(tmp_path: pathlib.Path) -> None:
    saved(tmp_path)
    done: list[int] = []
    loaded = ckpt.load({"model": {n: torch.empty(SIZE) for n in "abc"}}, tmp_path, progress=done.append)

    assert sum(done) == loaded.read_nbytes
