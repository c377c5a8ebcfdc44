"""Goal: a step is one attempt, whole, or nothing; and what is reported as failed or saved is so.

Method: every cut point of the sequence, scripted faults, real races of threads and of processes, on stores with and
without conditional creation.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckpt.commit import names
from ckpt.commit.find import steps
from ckpt.commit.gc import collect_garbage
from ckpt.commit.publish import abort, await_outcome, mark_aborted, publish, refuse_existing
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, RankFailedError, StoreError
from ckpt.failpoints import FailpointError
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.testing import READS, WRITES, FaultyStore, SimulatedCrash
from tests.commit.conftest import OPTIONS, OpenStore, StepClock, check_complete, manifest_of, save
from tests.servers import S3Server

OLD, NEW = "attempt-old", "attempt-new"
ROOT = Path(__file__).parents[2]


def count_calls(store: Store, methods: frozenset[str]) -> int:
    """How many calls of these kinds a save makes."""
    counted = FaultyStore(store, "", methods=methods)
    save(counted, 1, NEW)
    return len(counted.log)


# ---- one save


def test_a_save_is_complete_and_whole(any_open: OpenStore) -> None:
    save(any_open(), 5, NEW)
    assert steps(any_open()) == [5]
    assert check_complete(any_open(), 5) == NEW


def test_a_complete_step_is_refused_before_anything_is_written(any_open: OpenStore) -> None:
    save(any_open(), 5, OLD)
    before = any_open().list("")
    with pytest.raises(AlreadyExistsError, match="step 5"):
        refuse_existing(any_open(), 5)
    with pytest.raises(AlreadyExistsError):
        save(any_open(), 5, NEW)
    assert any_open().list("") == before


def test_publish_over_another_attempt_is_refused(any_open: OpenStore) -> None:
    save(any_open(), 5, OLD)
    with pytest.raises(AlreadyExistsError):
        publish(any_open(), 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert check_complete(any_open(), 5) == OLD


def test_publish_again_by_the_same_attempt_changes_nothing(any_open: OpenStore) -> None:
    save(any_open(), 5, NEW)
    publish(any_open(), 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert check_complete(any_open(), 5) == NEW


# ---- crashes


@pytest.mark.parametrize("kind", ["crash", "crash-after"])
@pytest.mark.parametrize("where", ["posix", "weak"])
def test_a_crash_at_any_write_leaves_old_or_new_and_gc_leaves_only_complete(
    kind: str, where: str, posix_open: OpenStore, weak_open: OpenStore, request: pytest.FixtureRequest
) -> None:
    open_one = posix_open if where == "posix" else weak_open
    total = count_calls(open_store(f"memory://count-{os.urandom(6).hex()}", options=OPTIONS), WRITES) + 2
    store = open_one()
    completed = 0
    for cut in range(total):
        before = steps(store)
        step, attempt = cut + 1, f"attempt-{cut:04d}"
        try:
            save(FaultyStore(store, f"ok*{cut} {kind}"), step, attempt)
            completed += 1
        except SimulatedCrash:
            pass
        after = steps(store)
        assert after in (before, [*before, step])
        for complete in after:
            check_complete(store, complete)
    assert completed > 0, "the loop ended before the sequence did"
    assert completed < total, "no crash was simulated"
    complete = steps(store)
    collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert steps(store) == complete
    attempts = {check_complete(store, step) for step in complete}
    left = {entry.key.split("/")[1] for entry in store.list("")} - {names.MANIFEST}
    assert left == attempts


@pytest.mark.parametrize("word", ["timeout", "lost-response", "full", "denied"])
@pytest.mark.parametrize("where", ["posix", "weak"])
def test_a_fault_at_any_call_is_reported_unless_the_step_is_complete(
    word: str, where: str, posix_open: OpenStore, weak_open: OpenStore
) -> None:
    store = (posix_open if where == "posix" else weak_open)()
    total = count_calls(open_store(f"memory://count-{os.urandom(6).hex()}", options=OPTIONS), READS | WRITES)
    failures = 0
    for cut in range(total):
        step, attempt = cut + 1, f"attempt-{cut:04d}"
        try:
            save(FaultyStore(store, f"ok*{cut} {word}", methods=READS | WRITES), step, attempt)
            assert check_complete(store, step) == attempt
        except StoreError as error:
            failures += 1
            if step in steps(store):  # only ever with an answer that says that it is not known
                assert error.kind == "outcome-unknown" or word == "lost-response"
                assert check_complete(store, step) == attempt
    assert failures > total // 2


@pytest.mark.parametrize("point", ["commit.before-receipt", "commit.after-receipt", "commit.receipts-complete",
                                   "commit.before-manifest", "commit.after-manifest"])  # fmt: skip
def test_sigkill_at_each_step_leaves_the_previous_checkpoint(any_open: OpenStore, point: str, tmp_path: Path,
                                                             request: pytest.FixtureRequest) -> None:  # fmt: skip
    store = any_open()
    save(store, 1, OLD)
    environment = {**os.environ, "CKPT_FAILPOINT": f"{point}:kill", **_environment_of(request)}
    child = _child("save", store.url, "2", NEW, environment=environment)
    assert child.wait(timeout=60) == -signal.SIGKILL
    expected = [1, 2] if point == "commit.after-manifest" else [1]
    assert steps(store) == expected
    assert [check_complete(store, step) for step in expected] == [OLD, NEW][: len(expected)]
    collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert steps(store) == expected
    assert [check_complete(store, step) for step in expected] == [OLD, NEW][: len(expected)]
    assert sorted({key.key.split("/")[0] for key in store.list("")}) == [names.step_folder(step) for step in expected]


def test_an_error_between_claim_and_manifest_publishes_nothing(
    weak_open: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "commit.after-claim:error")
    with pytest.raises(FailpointError):
        save(weak_open(), 3, NEW)
    assert steps(weak_open()) == []


# ---- lost answers


def test_a_lost_answer_to_the_manifest_is_resolved_by_reading_back(posix_open: OpenStore, weak_open: OpenStore) -> None:
    for store, method in ((posix_open(), "create"), (weak_open(), "put")):
        script = "lost-response" if method == "create" else "ok lost-response"  # the first put is the claim
        faulty = FaultyStore(store, script, methods=frozenset({method}))
        publish(faulty, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
        assert steps(store) == [5]


def test_a_question_without_answer_is_reported_as_unknown_and_not_as_failed(posix_open: OpenStore) -> None:
    faulty = FaultyStore(posix_open(), "timeout", methods=frozenset({"create"}))
    with pytest.raises(StoreError, match="may be complete or not") as caught:
        publish(faulty, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert caught.value.kind == "outcome-unknown"


def test_a_store_that_goes_away_for_good_is_reported_as_unknown(posix_open: OpenStore) -> None:
    # calls of publish: read the abort mark, read the manifest, create it, read it back
    for script in ("ok*2 lost-response timeout", "ok*2 timeout timeout", "ok*3 timeout"):
        faulty = FaultyStore(posix_open(), script, methods=READS | WRITES)
        with pytest.raises(StoreError) as caught:
            publish(faulty, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
        assert caught.value.kind == "outcome-unknown", script
        posix_open().delete([names.manifest_key(5)])


def test_a_manifest_whose_folder_could_not_be_synced_is_reported_as_unknown(
    posix_open: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real_fsync = posix_open(), os.fsync
    save(store, 1, OLD)

    def failing_fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) and store.exists(names.manifest_key(2)):
            raise OSError(errno.EIO, "injected")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(StoreError) as caught:
        save(store, 2, NEW)
    assert caught.value.kind == "outcome-unknown"


# ---- races


@pytest.mark.parametrize("rounds", [3])
def test_of_eight_committers_at_most_one_publishes_and_nothing_mixes(any_open: OpenStore, rounds: int) -> None:
    conditional = any_open().conditional_create
    for step in range(1, rounds + 1):
        won: list[str] = []
        gate = threading.Barrier(8)
        threads = [
            threading.Thread(target=_race, args=(any_open, gate, step, f"attempt-{number}", won)) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        published = steps(any_open())
        assert len(won) <= 1
        assert (step in published) == (len(won) == 1)
        if conditional:
            assert len(won) == 1
        if won:
            assert check_complete(any_open(), step) == won[0]


def _race(any_open: OpenStore, gate: threading.Barrier, step: int, attempt: str, won: list[str]) -> None:
    gate.wait(timeout=30)
    try:
        save(any_open(), step, attempt)
        won.append(attempt)
    except AlreadyExistsError:
        pass


def test_of_four_processes_exactly_one_publishes_on_a_local_folder(posix_open: OpenStore) -> None:
    store = posix_open()
    store.put("gate", b"")
    children = [
        _child("save", store.url, "9", f"attempt-{number}", environment=dict(os.environ)) for number in range(4)
    ]
    codes = sorted(child.wait(timeout=60) for child in children)
    assert codes == [0, 12, 12, 12]
    check_complete(store, 9)


def test_a_live_claim_holds_the_step_and_a_dead_one_does_not(weak_open: OpenStore) -> None:
    store = weak_open()
    store.put(names.claim_key(5, OLD), b"{}")
    with pytest.raises(AlreadyExistsError, match=f"published by attempt {OLD}") as caught:
        publish(store, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert caught.value.kind == "held"
    assert [entry.key for entry in store.list(names.claims_prefix(5))] == [names.claim_key(5, OLD)]
    time.sleep(0.3)
    publish(store, 5, NEW, manifest_of(NEW, 5), options=Options(claim_ttl_s=0.2))
    assert steps(store) == [5]


def test_a_claim_of_an_aborted_attempt_is_dead(weak_open: OpenStore) -> None:
    store = weak_open()
    store.put(names.claim_key(5, OLD), b"{}")
    mark_aborted(store, 5, OLD, "gave up")
    publish(store, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert steps(store) == [5]


def test_a_committer_that_slept_with_its_claim_does_not_publish(
    weak_open: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = StepClock()
    monkeypatch.setattr("ckpt.commit.publish.failpoints.hit", lambda name: clock.sleep(500.0))
    with pytest.raises(StoreError) as caught:
        publish(weak_open(), 5, NEW, manifest_of(NEW, 5), options=OPTIONS, clock=clock)
    assert caught.value.kind == "claim-stale"
    assert steps(weak_open()) == []
    assert weak_open().list("") == []


# ---- the other ranks


def test_outcome_is_success_once_the_manifest_names_this_attempt(any_open: OpenStore) -> None:
    later = threading.Timer(0.2, lambda: publish(any_open(), 5, NEW, manifest_of(NEW, 5), options=OPTIONS))
    later.start()
    await_outcome(any_open(), 5, NEW, timeout_s=30, options=OPTIONS)
    later.join()


def test_outcome_of_an_aborted_attempt_is_its_reason(any_open: OpenStore) -> None:
    abort(any_open(), 5, NEW, "rank 3: disk full")
    with pytest.raises(RankFailedError, match="rank 3: disk full") as caught:
        await_outcome(any_open(), 5, NEW, timeout_s=30, options=OPTIONS)
    assert caught.value.kind == "aborted"


def test_outcome_when_another_attempt_won(posix_open: OpenStore) -> None:
    save(posix_open(), 5, OLD)
    with pytest.raises(AlreadyExistsError):
        await_outcome(posix_open(), 5, NEW, timeout_s=30, options=OPTIONS)


def test_outcome_is_unknown_at_the_deadline(posix_open: OpenStore) -> None:
    clock = StepClock()
    with pytest.raises(RankFailedError, match="committer is missing") as caught:
        await_outcome(posix_open(), 5, NEW, timeout_s=45, options=OPTIONS, clock=clock)
    assert caught.value.kind == "outcome-unknown"
    assert 45.0 <= clock.now_s - 100.0 < 45.1


def test_outcome_of_a_manifest_that_cannot_be_read_is_damage(posix_open: OpenStore) -> None:
    posix_open().put(names.manifest_key(5), b"{}")
    with pytest.raises(DamagedError):
        await_outcome(posix_open(), 5, NEW, timeout_s=1, options=OPTIONS)


# ---- aborts


def test_an_aborted_attempt_is_never_published(any_open: OpenStore) -> None:
    abort(any_open(), 5, NEW, "enough")
    abort(any_open(), 5, NEW, "again")
    with pytest.raises(RankFailedError, match="enough"):
        publish(any_open(), 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert steps(any_open()) == []


def test_a_published_attempt_cannot_be_aborted(posix_open: OpenStore) -> None:
    save(posix_open(), 5, NEW)
    with pytest.raises(AlreadyExistsError):
        abort(posix_open(), 5, NEW, "too late")
    assert check_complete(posix_open(), 5) == NEW


def test_a_committer_overtaken_by_gc_takes_its_manifest_back(
    posix_open: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = posix_open()

    def gc_comes_first(name: str) -> None:
        if name == "commit.before-manifest":  # after the committer's last look
            mark_aborted(store, 5, NEW, "removed by gc")

    monkeypatch.setattr("ckpt.commit.publish.failpoints.hit", gc_comes_first)
    with pytest.raises(RankFailedError, match="removed by gc"):
        publish(store, 5, NEW, manifest_of(NEW, 5), options=OPTIONS)
    assert steps(store) == []


# ---- stores that refuse


def test_wrong_credentials_are_named_and_nothing_is_published(rclone_s3: S3Server) -> None:
    options = {**rclone_s3.storage_options, "secret": "wrong"}
    store = open_store(rclone_s3.url(f"run-{os.urandom(6).hex()}"), options=OPTIONS, storage_options=options)
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
        save(store, 5, NEW)
    assert caught.value.kind == "denied"


def test_an_unreachable_server_is_reported_in_bounded_time() -> None:
    options = Options(store_attempts=2, connect_timeout_s=1.0, read_timeout_s=1.0)
    access = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}
    store = open_store("s3://bucket/run", options=options, storage_options=access)
    start_s = time.monotonic()
    with pytest.raises(StoreError) as caught:
        save(store, 5, NEW)
    assert caught.value.kind == "unreachable"
    assert time.monotonic() - start_s < 20.0


# ---- child processes


def _environment_of(request: pytest.FixtureRequest) -> dict[str, str]:
    name = request.node.callspec.params.get("any_open")
    if name == "posix":
        return {}
    server: S3Server = request.getfixturevalue(f"{name}_s3")
    return server.environment


def _child(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen([sys.executable, "-m", "tests.commit.saver", *arguments], env=environment, cwd=ROOT)


def test_errors_that_the_protocol_raises_survive_pickling_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RankFailedError("x", kind="aborted", hints=("y",))))
    assert (type(error), error.kind, error.hints) == (RankFailedError, "aborted", ("y",))
    assert isinstance(error, CheckpointError)
