"""Two images at most, and a policy for when both are on their way; a failure in the background reaches the trainer.

Method: writes are slowed by a failpoint, so that saves pile up. The ranks' part is in tests/multirank.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.commit import find
from ckpt.errors import SaveFailedError
from ckpt.store.open import open_store


def options(**more: object) -> ckpt.Options:
    return ckpt.Options(chunk_bytes=4096, poll_start_s=0.001, **more)  # type: ignore[arg-type]


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "save.before-image:delay=0.3")


def steps_of(folder: Path) -> list[int]:
    return find.steps(open_store(folder, options=ckpt.Options()))


@pytest.mark.usefixtures("slow_writes")
@pytest.mark.parametrize("images", [1, 2])
def test_wait_saves_every_step_with_no_more_images_than_allowed(images: int, tmp_path: Path) -> None:
    state = {"w": torch.zeros(5000)}
    pending: list[ckpt.PendingSave] = []
    with ckpt.Checkpointer(tmp_path, every=1, options=options(images_max=images)) as checkpointer:
        for step in range(4):
            state["w"].fill_(step)
            pending += filter(None, [checkpointer.step(step, state)])
            assert sum(not one.done() for one in pending) <= images
    assert (steps_of(tmp_path), checkpointer.skipped) == ([0, 1, 2, 3], 0)
    for step in range(4):
        with ckpt.open(tmp_path, step=step) as stored:
            assert set(stored["w"][...].tolist()) == {float(step)}


@pytest.mark.usefixtures("slow_writes")
def test_skip_leaves_steps_out_and_counts_them(tmp_path: Path) -> None:
    state = {"w": torch.zeros(5000)}
    with ckpt.Checkpointer(tmp_path, every=1, options=options(when_busy="skip")) as checkpointer:
        pending = [checkpointer.step(step, state) for step in range(5)]
    skipped = [one.step for one in pending if one is not None and one.skipped]
    assert (steps_of(tmp_path), skipped, checkpointer.skipped) == ([0, 1], [2, 3, 4], 3)
    with pytest.raises(SaveFailedError, match="step 2 was skipped"):
        pending[2].wait()  # type: ignore[union-attr]


@pytest.mark.usefixtures("slow_writes")
def test_fail_says_which_save_is_in_the_way(tmp_path: Path) -> None:
    state = {"w": torch.zeros(5000)}
    with ckpt.Checkpointer(tmp_path, every=1, options=options(when_busy="fail", images_max=1)) as checkpointer:
        checkpointer.step(7, state)
        with pytest.raises(SaveFailedError, match="step 8 was not saved: step 7 is still on its way") as caught:
            checkpointer.step(8, state)
    assert (caught.value.kind, steps_of(tmp_path)) == ("busy", [7])


def test_a_failure_is_told_once_and_the_next_saves_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.arange(5000.0)}
    with ckpt.Checkpointer(tmp_path, every=1, options=options()) as checkpointer:
        checkpointer.step(0, state).wait()  # type: ignore[union-attr]
        monkeypatch.setenv("CKPT_FAILPOINT", "save.before-image-commit:error")
        failed = checkpointer.step(1, state)
        assert failed is not None
        with pytest.raises(ckpt.CheckpointError):
            failed.wait()
        monkeypatch.delenv("CKPT_FAILPOINT")
        with pytest.raises(SaveFailedError, match="step 1 failed"):
            checkpointer.step(2, state)  # told here; step 2 is on its way all the same
        for step in (3, 4):
            checkpointer.step(step, state)
    assert steps_of(tmp_path) == [0, 2, 3, 4]


def test_a_failure_that_nobody_asked_about_is_raised_by_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "save.in-image:error")
    checkpointer = ckpt.Checkpointer(tmp_path, every=1, options=options())
    checkpointer.step(0, {"w": torch.arange(5000.0)})
    with pytest.raises(SaveFailedError, match="step 0 failed"):
        checkpointer.close()
    checkpointer.close()
    assert steps_of(tmp_path) == []


def test_close_leaves_no_thread_and_no_shared_memory(tmp_path: Path) -> None:
    threads, shared = set(threading.enumerate()), set(os.listdir("/dev/shm"))
    with ckpt.Checkpointer(tmp_path, every=1, options=options()) as checkpointer:
        checkpointer.prepare({"w": torch.arange(5000.0)})
        checkpointer.step(0, {"w": torch.arange(5000.0)})
    assert (set(threading.enumerate()) - threads, set(os.listdir("/dev/shm")) - shared) == (set(), set())


def test_an_exception_in_the_loop_still_finishes_the_save(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ckpt.Checkpointer(tmp_path, every=1, options=options()) as checkpointer:
        checkpointer.step(3, {"w": torch.arange(5000.0)})
        raise ZeroDivisionError
    assert steps_of(tmp_path) == [3]
