"""Goal: gc removes what nothing needs and never anything else, wherever it is cut.

Method: all cut points, aged time stamps, a save that comes between plan and act.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ckpt.commit import names
from ckpt.commit.find import StepContents, contents, steps
from ckpt.commit.gc import collect_garbage, make_plan
from ckpt.commit.publish import abort, publish
from ckpt.commit.receipts import leave_receipt
from ckpt.commit.retention import forget
from ckpt.config import Options
from ckpt.errors import RankFailedError
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.testing import WRITES, FaultyStore, SimulatedCrash
from tests.commit.conftest import OPTIONS, OpenStore, check_complete, manifest_of, save

GRACE_S = OPTIONS.gc_grace_s


def fill(store: Store) -> None:
    """One run with everything in it: complete, forgotten, aborted and half-done attempts, and strangers."""
    save(store, 1, "attempt-kept")
    save(store, 2, "attempt-forgotten")
    forget(store, [2])
    leave_receipt(store, 3, "attempt-aborted", 0, 2, b"")
    store.put(f"{names.attempt_folder(3, 'attempt-aborted')}/00000-of-00002.safetensors", b"x" * 100)
    abort(store, 3, "attempt-aborted", "disk full")
    leave_receipt(store, 1, "attempt-loser", 0, 2, b"")
    leave_receipt(store, 4, "attempt-running", 0, 2, b"")
    store.put("notes.txt", b"foreign")
    store.put("step-000000000004/readme", b"foreign")


KEPT = {"attempt-kept", "attempt-loser", "attempt-running"}


def attempts_left(store: Store) -> set[str]:
    return {part for entry in store.list("") for part in entry.key.split("/")[1:2] if part.startswith("attempt")}


def test_gc_removes_the_dead_and_keeps_what_may_be_running(any_open: OpenStore) -> None:
    store = any_open()
    fill(store)
    report = collect_garbage(store, options=OPTIONS)
    assert attempts_left(store) == KEPT
    assert {removal.attempt: removal.reason for removal in report.plan.removals} == {
        "attempt-forgotten": "forgotten",
        "attempt-aborted": "aborted",
    }
    assert {kept.attempt for kept in report.plan.kept} == {"attempt-loser", "attempt-running"}
    assert report.nbytes > 100
    assert check_complete(store, 1) == "attempt-kept"
    assert store.exists("notes.txt") and store.exists("step-000000000004/readme")
    assert not store.exists(names.forgotten_key(2))
    assert store.list(".ckpt-gc/") == []


def test_dry_run_changes_nothing(posix_open: OpenStore) -> None:
    store = posix_open()
    fill(store)
    before = store.list("")
    report = collect_garbage(store, options=OPTIONS, dry_run=True, force_unfinished=True)
    assert store.list("") == before
    assert len(report.plan.removals) == 4


def test_force_takes_unfinished_attempts_but_never_published_ones(any_open: OpenStore) -> None:
    store = any_open()
    fill(store)
    collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert attempts_left(store) == {"attempt-kept"}
    assert check_complete(store, 1) == "attempt-kept"


def test_gc_of_nothing_makes_nothing(tmp_path: Path) -> None:
    collect_garbage(open_store(tmp_path / "no" / "run", options=OPTIONS), options=OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_age_is_measured_by_the_clock_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, options=OPTIONS)
    leave_receipt(store, 1, "attempt-young", 0, 2, b"")
    leave_receipt(store, 2, "attempt-old", 0, 2, b"")
    old = tmp_path / names.receipt_key(2, "attempt-old", 0, 2)
    stamp = old.stat().st_mtime - GRACE_S - 10
    os.utime(old, (stamp, stamp))
    monkeypatch.setattr("time.time", lambda: 4e9)  # a local clock that is decades ahead
    collect_garbage(store, options=OPTIONS)
    assert attempts_left(store) == {"attempt-young"}


def test_a_store_without_times_keeps_unpublished_attempts(posix_open: OpenStore) -> None:
    store = posix_open()
    fill(store)
    plan = make_plan([contents(store, step) for step in (1, 2, 3, 4)], now_s=0.0, options=Options(gc_grace_s=1e-9))
    assert {removal.attempt for removal in plan.removals} == {"attempt-forgotten", "attempt-aborted"}


def test_a_manifest_that_cannot_be_read_protects_its_step(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, "attempt-whose")
    abort(store, 1, "attempt-other", "no")
    store.put(names.manifest_key(1), b"damaged")
    collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert attempts_left(store) == {"attempt-whose", "attempt-other"}


@pytest.mark.parametrize("kind", ["crash", "crash-after"])
def test_gc_cut_anywhere_never_leaves_a_checkpoint_without_data_and_can_be_run_again(kind: str) -> None:
    cut, crashed = 0, True
    while crashed:
        store = open_store(f"memory://gc-{os.urandom(6).hex()}", options=OPTIONS)
        fill(store)
        faulty = FaultyStore(store, f"ok*{cut} {kind}", methods=WRITES)
        try:
            collect_garbage(faulty, options=OPTIONS)
            crashed = False
        except SimulatedCrash:
            cut += 1
        assert check_complete(store, 1) == "attempt-kept"
        assert steps(store) == [1]
        collect_garbage(store, options=OPTIONS)
        assert attempts_left(store) == KEPT
        assert not store.exists(names.forgotten_key(2))
        assert store.list(".ckpt-gc/") == []
    assert cut > 10


def test_an_attempt_published_after_the_plan_is_spared(posix_open: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = posix_open()
    save(store, 5, "attempt-slow")
    manifest = store.read(names.manifest_key(5))
    store.delete([names.manifest_key(5)])
    done: list[str] = []

    def publish_now(name: str) -> None:
        if name == "gc.after-verdict" and not done:
            done.append(name)
            store.create(names.manifest_key(5), manifest)

    monkeypatch.setattr("ckpt.commit.gc.failpoints.hit", publish_now)
    report = collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert report.spared == ("attempt-slow",)
    assert check_complete(store, 5) == "attempt-slow"
    assert not store.exists(names.aborted_key(5, "attempt-slow"))


def test_a_save_overtaken_by_a_forced_gc_fails_and_says_so(
    posix_open: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = posix_open()
    leave_receipt(store, 5, "attempt-slow", 0, 1, b"")

    def die(name: str) -> None:
        raise SimulatedCrash(name)

    monkeypatch.setattr("ckpt.commit.gc.failpoints.hit", die)
    with pytest.raises(SimulatedCrash):
        collect_garbage(store, options=OPTIONS, force_unfinished=True)
    with pytest.raises(RankFailedError, match="removed by gc"):
        publish(store, 5, "attempt-slow", manifest_of("attempt-slow", 5), options=OPTIONS)


def test_dead_claims_go_and_live_ones_stay(weak_open: OpenStore) -> None:
    store = weak_open()
    leave_receipt(store, 5, "attempt-one", 0, 1, b"")
    store.put(names.claim_key(5, "attempt-one"), b"{}")
    collect_garbage(store, options=OPTIONS)
    assert store.exists(names.claim_key(5, "attempt-one"))
    collect_garbage(store, options=Options(claim_ttl_s=1e-6))
    assert not store.exists(names.claim_key(5, "attempt-one"))


def test_temporary_files_and_empty_folders_of_the_dead_go(tmp_path: Path) -> None:
    store = open_store(tmp_path, options=OPTIONS)
    save(store, 1, "attempt-kept")
    temporary = tmp_path / names.step_folder(1) / ".tmp-0123456789abcdef"
    temporary.write_bytes(b"half a manifest")
    (tmp_path / names.attempt_folder(2, "attempt-empty") / "receipts").mkdir(parents=True)
    collect_garbage(store, options=OPTIONS)
    assert temporary.exists()  # it may be a live writer's
    report = collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert report.num_swept == 1
    assert not temporary.exists()
    assert [path.name for path in tmp_path.iterdir()] == [names.step_folder(1)]


def test_the_plan_is_pure_and_the_same_every_time(posix_open: OpenStore) -> None:
    store = posix_open()
    fill(store)
    found: list[StepContents] = [contents(store, step) for step in (1, 2, 3, 4)]
    plans = [make_plan(found, now_s=1e10, options=OPTIONS) for _ in range(2)]
    assert plans[0] == plans[1]
    assert [removal.attempt for removal in plans[0].removals] == [
        "attempt-loser",
        "attempt-forgotten",
        "attempt-aborted",
        "attempt-running",
    ]
    assert json.dumps(plans[0].leftovers) == "[]"
