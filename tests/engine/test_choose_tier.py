"""Which tier a job comes back from when one of them fails on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.restore import restore
from ckpt.engine.run import Run
from ckpt.errors import DamagedError, StoreError
from ckpt.store.open import open_store

OPTIONS = Options(events=False, store_attempts=1)
LENGTH = 100_000


@dataclass(frozen=True, kw_only=True)
class Held:
    step: int
    recoverable: bool = True
    lost: tuple[int, ...] = ()


class Memory:
    """A memory tier whose snapshots are checkpoints in a folder."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self._folder, self._held = folder, [Held(step=step) for step in steps]
        self.choices: list[int | None] = []
        self.looks = 0
        self.opened: list[Any] = []

    def settle(self) -> None:
        pass  # nobody writes to the store

    def candidates(self) -> Sequence[Held]:
        return self._held

    def own(self, number: int) -> None:
        return None  # they are loaded as those of any layout

    def open(self, number: int) -> Any:
        store: Any = open_store(self._folder, options=OPTIONS)
        store.decoded_nbytes = 0
        close = store.close
        store.close = lambda: (self.opened.remove(store), close())
        self.opened.append(store)
        return store

    def look_again(self) -> None:
        self.looks += 1

    def chosen(self, number: int | None, *, step: int) -> None:
        self.choices.append(number)


def job(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((LENGTH,), value)}}


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        ckpt.save(job(float(step)), folder, step=step, options=OPTIONS)
    return folder


def damage_end(folder: Path, step: int) -> None:
    """One byte of the last block of every image of a step."""
    images = sorted(folder.glob(f"**/*{step}*/**/*.safetensors"))
    assert images, sorted(folder.rglob("*"))
    for path in images:
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)


class Away:
    """A store that cannot be reached."""

    def __init__(self, store: Any) -> None:
        self.url, self.close = store.url, store.close

    def __getattr__(self, name: str) -> Any:
        raise StoreError("nobody answers", kind="unreachable")


def come_back(url: Path, memory: Memory, state: dict[str, Any], *, away: bool = False) -> Any:
    run = Run(url, options=OPTIONS)
    if away:
        run.store = Away(run.store)  # type: ignore[assignment]
    try:
        return restore(run, memory, state, None, strict=True, rename=None)
    finally:
        run.close()


def test_memory_is_used_while_the_store_cannot_be_asked(tmp_path: Path) -> None:
    memory, state = Memory(saved(tmp_path / "memory", 7), 7), job(0.0)
    done = come_back(tmp_path / "store", memory, state, away=True)
    assert (done.step, done.tier, memory.choices) == (7, "memory", [0])
    assert "the store" in done.passed_over[0] and torch.equal(state["model"]["w"], job(7.0)["model"]["w"])


def test_a_store_that_cannot_be_asked_is_an_error_when_memory_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nobody answers"):
        come_back(tmp_path / "store", Memory(tmp_path / "memory"), job(0.0), away=True)


def test_a_damaged_snapshot_falls_through_to_the_store_and_is_let_go(tmp_path: Path) -> None:
    memory, state = Memory(saved(tmp_path / "memory", 7), 7), job(0.0)
    damage_end(tmp_path / "memory", 7)
    done = come_back(saved(tmp_path / "store", 5), memory, state)
    assert (done.step, done.tier, memory.choices, memory.opened) == (5, "store", [None], [])
    assert torch.equal(state["model"]["w"], job(5.0)["model"]["w"])


def test_a_state_that_was_partly_overwritten_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    memory = Memory(saved(tmp_path / "memory", 7), 7)
    damage_end(tmp_path / "memory", 7)
    (tmp_path / "store").mkdir()
    with pytest.raises(DamagedError, match="nothing could be restored, and the state may be partly overwritten"):
        come_back(tmp_path / "store", memory, job(0.0))


def test_a_job_that_begins_anew_lets_go_of_what_memory_has(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "memory")
    (tmp_path / "store").mkdir()
    assert (come_back(tmp_path / "store", memory, job(0.0)), memory.choices) == (None, [None])
