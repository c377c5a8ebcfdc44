"""`restore` goes back behind what is damaged, over both tiers, and training comes past it again.

Goal: one damaged checkpoint never stops a job that has an older one, and never costs it a save. Method: real checkpoints in a
folder, some bytes of them changed; a memory tier whose snapshots are checkpoints in another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.commit import find, retention
from ckpt.engine.restore import Restored, restore
from ckpt.engine.run import Run
from ckpt.errors import CheckpointError, DamagedError, MismatchError, StoreError, VersionError
from ckpt.state.restore import LoadTarget
from ckpt.store.open import open_store
from tests.engine import test_choose_tier
from tests.engine.test_choose_tier import Memory, damage_end, job, saved

# Small reads one after the other, so that a load that meets damage has filled some of the state.
OPTIONS = dataclasses.replace(test_choose_tier.OPTIONS, local_read_bytes_max=1 << 16, read_threads=1)
Damage = Callable[[Path], None]


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def harm(folder: Path, step: int, pattern: str = "*/*.safetensors", damage: Damage = flipped) -> None:
    """Damage the one file of a step that a pattern names."""
    (path,) = folder.glob(f"step-{step:012d}/{pattern}")
    damage(path)


def come_back(
    url: Path,
    memory: Memory | None = None,
    state: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    through: Callable[[Any], Any] = lambda store: store,
) -> Restored | None:
    run = Run(url, options=OPTIONS)
    run.store = through(run.store)
    try:
        return restore(run, memory, job(0.0) if state is None else state, None, strict=strict, rename=None)
    finally:
        run.close()


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("step-*/**/*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*/*.safetensors", flipped),
        ("*/*.safetensors", truncated),
        ("*/*.safetensors", emptied),
        ("*/*.safetensors", Path.unlink),
        ("*/tensors.parquet", flipped),
        ("*/fragments.parquet", truncated),
        ("*/objects.parquet", Path.unlink),
        ("manifest.json", flipped),
        ("manifest.json", truncated),
        ("manifest.json", emptied),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str, damage: Damage
) -> None:
    harm(saved(tmp_path, 3, 5, 7), 7, pattern, damage)
    before, state = files(tmp_path), job(0.0)
    with caplog.at_level(logging.WARNING, "ckpt"):
        done = come_back(tmp_path, state=state)
    assert done is not None and (done.step, done.tier, len(done.passed_over)) == (5, "store", 1)
    assert done.passed_over[0].startswith("step 7 on the store: ")
    assert torch.equal(state["model"]["w"], job(5.0)["model"]["w"])
    assert files(tmp_path) == before
    assert [text in caplog.text for text in (done.passed_over[0], f"ckpt verify {tmp_path}@7")] == [True, True]
    with pytest.raises(DamagedError):
        ckpt.load(job(0.0), tmp_path, options=OPTIONS)  # which is asked for the newest, and not for some


# Steps in memory and on the store, those that are damaged as `-step`; what comes back; what is passed over.
ORDER = [
    ((8,), (7,), ("memory", 8), ()),
    ((7,), (7,), ("memory", 7), ()),
    ((6,), (7,), ("store", 7), ()),
    ((6,), (-7, 5), ("memory", 6), ("7 on",)),
    ((6,), (-7, 6, 5), ("memory", 6), ("7 on",)),
    ((-6,), (-7, 6, 5), ("store", 6), ("7 on", "6 in")),
    ((-7,), (-7, 5), ("store", 5), ("7 in", "7 on")),
    ((-6, 4), (-7, -5, 3), ("memory", 4), ("7 on", "6 in", "5 on")),
    ((-8, -6), (-7, -5, 3), ("store", 3), ("8 in", "7 on", "6 in", "5 on")),
    ((4,), (-9, -7, 5), ("store", 5), ("9 on", "7 on")),
    ((), (-9, -7, 5), ("store", 5), ("9 on", "7 on")),
]


@pytest.mark.parametrize(("held", "stored", "expected", "passed_over"), ORDER)
def test_both_tiers_are_tried_newest_step_first(
    tmp_path: Path, held: tuple[int, ...], stored: tuple[int, ...], expected: tuple[str, int], passed_over: Any
) -> None:
    for name, steps in (("memory", held), ("store", stored)):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, *map(abs, steps))
        for step in steps:
            if step < 0:
                harm(tmp_path / name, -step)
    memory, state = Memory(tmp_path / "memory", *map(abs, held)), job(0.0)
    done = come_back(tmp_path / "store", memory, state)
    assert done is not None and (done.tier, done.step) == expected
    assert tuple(text[len("step ") :][:4] for text in done.passed_over) == passed_over
    assert torch.equal(state["model"]["w"], job(float(expected[1]))["model"]["w"])
    assert len(memory.choices) == 1 and (memory.choices[0] is None) == (expected[0] == "store")
    # Agents look again once for each snapshot that failed: none is tried twice, but for that.
    assert (memory.looks, memory.opened) == (sum("in" in text for text in passed_over), [])


def no_fit(url: Path) -> None:
    ckpt.save({"model": {"w": torch.zeros(3)}}, url, step=7, options=OPTIONS)


def newer(url: Path) -> None:
    path = saved(url, 7) / "step-000000000007" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 9'))


class Denied:
    """A store that lets nobody read images."""

    local_files = False

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str, *span: int) -> Any:
        if key.endswith(".safetensors"):
            raise StoreError(f"`{key}` may not be read", kind="denied")
        return self._store.read(key, *span)

    read_into = read


@pytest.mark.parametrize(("make", "kind"), [(no_fit, MismatchError), (newer, VersionError), (None, StoreError)])
def test_nothing_but_damage_leads_on(
    tmp_path: Path, make: Callable[[Path], None] | None, kind: type[CheckpointError]
) -> None:
    saved(tmp_path / "store", 5)
    state, memory = job(0.0), Memory(saved(tmp_path / "memory", 6), 6)
    if make is None:
        saved(tmp_path / "store", 7)
    else:
        make(tmp_path / "store")
    with pytest.raises(kind):
        come_back(tmp_path / "store", memory, state, through=Denied if make is None else lambda store: store)
    assert (memory.choices, bool(state["model"]["w"].any())) == ([], False)


@pytest.mark.parametrize("pattern", ["*/*.safetensors", "manifest.json"])
def test_when_nothing_whole_is_left_all_that_was_tried_is_told(tmp_path: Path, pattern: str) -> None:
    for step in (5, 7):
        harm(saved(tmp_path / "store", step), step, pattern)
    memory = Memory(saved(tmp_path / "memory", 6), 6)
    damage_end(tmp_path / "memory", 6)
    with pytest.raises(DamagedError, match=r"step 7 on the store: .*step 6 in memory: .*step 5 on the store") as caught:
        come_back(tmp_path / "store", memory)
    assert (caught.value.kind, memory.choices) == ("nothing-restored", [])


# What a failed load has left in the state


class Everything:
    """A job with one of each kind of thing that changes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(300, 300)
        self.optimizer = torch.optim.Adam(self.model.parameters(), foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.loader = ckpt.ElasticLoader(torch.arange(64), batch_size=4, dp_rank=0, dp_size=1, seed=7)
        self.batches = iter(self.loader)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "rng": ckpt.RNG(),
            "progress": {"seen": [], "best": 0.0},
        }

    def train(self) -> None:
        next(self.batches)
        self.model(torch.randn(2, 300)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state["progress"]["seen"].append(torch.rand(1).item())
        self.state["progress"]["best"] += 1.0

    def told(self) -> str:
        slots = [
            {key: value.tolist() for key, value in self.optimizer.state[p].items()} if p in self.optimizer.state else {}
            for p in self.model.parameters()
        ]
        found = {
            "model": [p.tolist() for p in self.model.parameters()],
            "slots": slots,
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
            "scheduler": self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "progress": self.state["progress"],
            "random": torch.rand(3).tolist(),  # after all else: it changes the state
        }
        return repr(found)


@pytest.mark.parametrize("trained", [0, 2])  # when the older one was saved: before the optimizer had slots, and after
@pytest.mark.parametrize("late", [False, True])  # the load fails among the tensors, or once all objects are in place
def test_of_the_newer_one_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: int, late: bool
) -> None:
    first = Everything()
    for _ in range(trained):
        first.train()
    ckpt.save(first.state, tmp_path, step=trained, options=OPTIONS)
    first.train()
    ckpt.save(first.state, tmp_path, step=trained + 1, options=OPTIONS)
    expected, found = Everything(), Everything()
    ckpt.load(expected.state, tmp_path, step=trained, options=OPTIONS)
    wanted, reached = expected.told(), list[float]()
    if late:
        install = LoadTarget.restore

        def fail_once(self: LoadTarget, *given: Any) -> None:
            install(self, *given)
            reached.append(found.state["progress"]["best"])
            if len(reached) == 1:
                raise DamagedError("found only now")

        monkeypatch.setattr(LoadTarget, "restore", fail_once)
    else:
        harm(tmp_path, trained + 1)
        probe, weight = Everything(), expected.model.weight
        probe.model.weight.data.zero_()
        with pytest.raises(DamagedError):
            ckpt.load(probe.state, tmp_path, step=trained + 1, options=OPTIONS)
        assert probe.model.weight.any() and not torch.equal(probe.model.weight, weight)  # so far it has come
    done = come_back(tmp_path, state=found.state)
    assert done is not None and done.step == trained
    assert reached == ([trained + 1.0, float(trained)] if late else [])
    assert found.told() == wanted


def test_what_only_the_newer_one_had_is_not_mixed_into_the_older_one(tmp_path: Path) -> None:
    """Not strict: a tensor that the older one lacks would keep what the failed load has written into it."""
    saved(tmp_path, 5)
    ckpt.save({"model": {"w": torch.ones(200_000), "a": torch.ones(9)}}, tmp_path, step=7, options=OPTIONS)
    harm(tmp_path, 7)
    mixed = {"model": {"w": torch.zeros(100_000), "a": torch.zeros(9)}}
    with pytest.raises(MismatchError):  # `w` has another shape: that is no damage
        come_back(tmp_path, state=mixed, strict=False)
    ckpt.save({"model": {"w": torch.ones(100_000), "a": torch.ones(9)}}, tmp_path, step=9, options=OPTIONS)
    retention.forget(open_store(tmp_path, options=OPTIONS), [7])
    harm(tmp_path, 9)
    with pytest.raises(DamagedError, match="step 5 on the store lacks `model/a`") as caught:
        come_back(tmp_path, state=mixed, strict=False)
    assert caught.value.kind == "nothing-restored"
    new = {"model": {"w": torch.zeros(100_000), "new": torch.zeros(9)}}  # which neither has
    done = come_back(tmp_path, state=new, strict=False)
    assert done is not None and done.step == 5 and not new["model"]["new"].any()


# Training comes past the step again


def train(
    url: Path, *steps: int, meanwhile: Callable[[], None] = lambda: None, **given: Any
) -> tuple[int | None, list[int]]:
    """Restore, then these steps; what was restored, and the steps that were skipped."""
    state, skipped = job(0.0), []
    with ckpt.Checkpointer(url, **{"every": 2, "options": OPTIONS, **given}) as checkpointer:
        start = checkpointer.restore(state)
        meanwhile()
        for step in steps:
            state["model"]["w"].fill_(float(step))
            pending = checkpointer.step(step, state)
            if pending is not None and pending.skipped:
                skipped.append(step)
            elif pending is not None:
                pending.wait(60.0)
    return start, skipped


def complete(url: Path) -> list[int]:
    return find.steps(open_store(url, options=OPTIONS))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("pattern", ["*/*.safetensors", "manifest.json"])
def test_the_save_of_the_damaged_step_is_made_one_step_later(tmp_path: Path, background: bool, pattern: str) -> None:
    train(tmp_path, 1, 2, 3, 4)
    harm(tmp_path, 4, pattern)
    before = {name: digest for name, digest in files(tmp_path).items() if "0004/" in name}
    assert train(tmp_path, 3, 4, 5, 6, 7, background=background) == (2, [4])
    assert complete(tmp_path) == [2, 4, 5, 6]
    assert {name: digest for name, digest in files(tmp_path).items() if "0004/" in name} == before
    state = job(0.0)
    assert ckpt.load(state, tmp_path, step=5, options=OPTIONS).step == 5
    assert torch.equal(state["model"]["w"], job(5.0)["model"]["w"])


def test_a_damaged_step_that_is_forgotten_is_saved_again(tmp_path: Path) -> None:
    train(tmp_path, 2, 4)
    harm(tmp_path, 4)
    forget = lambda: retention.forget(open_store(tmp_path, options=OPTIONS), [4])  # noqa: E731
    assert train(tmp_path, 3, 4, 5, 6, meanwhile=forget) == (2, [])
    assert (complete(tmp_path), train(tmp_path)) == ([2, 4, 6], (6, []))


def test_a_last_step_that_cannot_be_saved_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 2, 4)
    harm(tmp_path, 4)
    assert train(tmp_path, 3, 4) == (2, [4])
    assert "the last save was not made" in caplog.text


def test_a_damaged_checkpoint_is_none_of_the_last_that_are_kept(tmp_path: Path) -> None:
    train(tmp_path, 2, 4, 6)
    harm(tmp_path, 6)
    assert train(tmp_path, 5, 6, 7, keep_last=2) == (4, [6])
    assert complete(tmp_path) == [4, 6, 7]
    assert train(tmp_path, 8, keep_last=2) == (7, [])
    assert complete(tmp_path) == [7, 8]


def test_an_incremental_save_refers_to_nothing_that_is_damaged(tmp_path: Path) -> None:
    """Where only bytes of an image were flipped, the index still says that what training comes to again is there."""

    def train(*steps: int) -> int | None:
        state = {"frozen": torch.zeros(200_000)}
        with ckpt.Checkpointer(tmp_path, every=2, incremental=True, options=OPTIONS) as checkpointer:
            start = checkpointer.restore(state)
            for step in steps:
                state["frozen"].fill_(float(min(step, 4)))
                checkpointer.step(step, state)
        return start

    train(2, 4)
    harm(tmp_path, 4)
    assert (train(6, 8), train()) == (2, 8)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("step-*/*/*.safetensors"))]
    assert sizes[2] == sizes[1] > 10 * sizes[3]  # all of it once; then it is referred to again
