"""Goal: a checkpoint is what has a manifest, and nothing else. Method: runs with partial, foreign and damaged parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt.commit import names
from ckpt.commit.find import attempts, contents, latest, resolve, steps
from ckpt.commit.publish import abort
from ckpt.commit.receipts import leave_receipt
from ckpt.commit.retention import forget
from ckpt.errors import InvalidInputError, NotFoundError
from tests.commit.conftest import OPTIONS, OpenStore, save


def test_only_steps_with_a_manifest_are_listed(any_open: OpenStore) -> None:
    store = any_open()
    for step in (30, 5, 100):
        save(store, step, f"attempt-{step}")
    leave_receipt(store, 200, "attempt-partial", 0, 2, b"")
    store.put("notes.txt", b"foreign")
    store.put("step-7/manifest.json", b"not twelve digits")
    store.put("logs/events", b"foreign")
    assert steps(store) == [5, 30, 100]
    assert latest(store) == 100
    assert (resolve(store, "latest"), resolve(store, 30)) == (100, 30)


def test_no_run_and_no_checkpoint_are_told_apart(any_open: OpenStore) -> None:
    store = any_open()
    assert (steps(store), latest(store)) == ([], None)
    with pytest.raises(NotFoundError) as nothing:
        resolve(store, "latest")
    assert (nothing.value.kind, nothing.value.exit_code) == ("no-run", 10)
    leave_receipt(store, 200, "attempt-partial", 0, 2, b"")
    with pytest.raises(NotFoundError, match="no step is complete") as partial:
        resolve(store, "latest")
    assert (partial.value.kind, partial.value.exit_code) == ("no-checkpoint", 11)
    save(store, 3, "attempt-3")
    with pytest.raises(NotFoundError, match="complete steps: 3") as absent:
        resolve(store, 4)
    assert absent.value.kind == "no-checkpoint"


def test_a_foreign_folder_is_no_run_and_no_error(tmp_path: Path) -> None:
    from ckpt.store.open import open_store

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "manifest.json").write_text("{}")
    (tmp_path / "step-000000000001").symlink_to(tmp_path / "src")
    os.mkfifo(tmp_path / "step-000000000002")
    store = open_store(tmp_path, options=OPTIONS)
    assert (steps(store), attempts(store)) == ([], [])
    with pytest.raises(NotFoundError) as caught:
        resolve(store, 1)
    assert caught.value.kind == "no-run"


@pytest.mark.parametrize("step", [True, "1", 1.0, None])
def test_a_step_is_a_number_or_latest(posix_open: OpenStore, step: object) -> None:
    with pytest.raises(InvalidInputError):
        resolve(posix_open(), step)  # type: ignore[arg-type]


def test_attempts_tell_their_state_and_size(any_open: OpenStore) -> None:
    store = any_open()
    save(store, 1, "attempt-done")
    leave_receipt(store, 1, "attempt-late", 0, 2, b"12345")
    leave_receipt(store, 2, "attempt-dead", 0, 2, b"")
    abort(store, 2, "attempt-dead", "why not")
    save(store, 3, "attempt-gone")
    forget(store, [3])
    found = {attempt.attempt: attempt for attempt in attempts(store)}
    assert {name: attempt.state for name, attempt in found.items()} == {
        "attempt-done": "complete",
        "attempt-late": "unpublished",
        "attempt-dead": "aborted",
        "attempt-gone": "forgotten",
    }
    assert found["attempt-late"].nbytes == 5
    assert all(attempt.modified_s > 1.6e9 for attempt in found.values())


def test_contents_keep_foreign_keys_apart(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, "attempt-done")
    for key in ("readme.txt", "short/x", "claims/oddly-named.txt"):
        store.put(f"{names.step_folder(1)}/{key}", b"")
    assert [key.partition("/")[2] for key in contents(store, 1).foreign] == [
        "claims/oddly-named.txt",
        "readme.txt",
        "short/x",
    ]


def test_a_damaged_manifest_still_marks_the_step_as_there(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, "attempt-done")
    store.put(names.manifest_key(1), b"\x00" * 100)
    assert steps(store) == [1]
    assert contents(store, 1).complete == ""
