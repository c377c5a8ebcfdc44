"""Goal: the committer gets all receipts, or in time an error that says who failed. Method: simulated clock, threads."""

from __future__ import annotations

import threading
import time

import pytest

from ckpt.commit import names
from ckpt.commit.receipts import collect_receipts, leave_failure, leave_receipt
from ckpt.errors import RankFailedError, StoreError
from ckpt.store.testing import FaultyStore
from tests.commit.conftest import OPTIONS, OpenStore, StepClock

ATTEMPT = "attempt-one"


def test_all_receipts_come_back_by_rank(any_open: OpenStore) -> None:
    store = any_open()
    for rank in (2, 0, 1):
        leave_receipt(store, 7, ATTEMPT, rank, 3, b"payload %d" % rank)
    found = collect_receipts(store, 7, ATTEMPT, 3, timeout_s=5, options=OPTIONS)
    assert list(found.items()) == [(0, b"payload 0"), (1, b"payload 1"), (2, b"payload 2")]


def test_receipts_of_other_attempts_worlds_and_strangers_do_not_count(posix_open: OpenStore) -> None:
    store = posix_open()
    leave_receipt(store, 7, ATTEMPT, 0, 2, b"good")
    leave_receipt(store, 7, "attempt-two", 1, 2, b"other attempt")
    leave_receipt(store, 7, ATTEMPT, 1, 3, b"other world")
    store.put(names.receipts_prefix(7, ATTEMPT) + "1-of-2.receipt", b"stranger")
    with pytest.raises(RankFailedError, match="from rank 1 of 2"):
        collect_receipts(store, 7, ATTEMPT, 2, timeout_s=3, options=OPTIONS, clock=StepClock())


def test_missing_ranks_are_named_at_the_deadline(posix_open: OpenStore) -> None:
    store, clock = posix_open(), StepClock()
    leave_receipt(store, 7, ATTEMPT, 1, 40, b"")
    with pytest.raises(RankFailedError, match=r"from ranks 0, 2, 3, .* and 23 more of 40 after 60\.0 s") as caught:
        collect_receipts(store, 7, ATTEMPT, 40, timeout_s=60, options=OPTIONS, clock=clock)
    assert caught.value.kind == "rank-missing"
    assert 60.0 <= clock.now_s - 100.0 < 60.1


def test_pauses_grow_and_stay_below_their_limit(posix_open: OpenStore) -> None:
    clock = StepClock()
    with pytest.raises(RankFailedError):
        collect_receipts(posix_open(), 7, ATTEMPT, 1, timeout_s=1.0, options=OPTIONS, clock=clock)
    assert clock.slept_s[0] == OPTIONS.poll_start_s
    assert all(earlier <= later for earlier, later in zip(clock.slept_s, clock.slept_s[1:-1], strict=False))
    assert max(clock.slept_s) == OPTIONS.poll_max_s


def test_a_failed_rank_ends_the_wait_at_once_with_its_reason(posix_open: OpenStore) -> None:
    store, clock = posix_open(), StepClock()
    leave_receipt(store, 7, ATTEMPT, 0, 3, b"")
    leave_failure(store, 7, ATTEMPT, 2, 3, StoreError("disk full on node seven", kind="full"))
    with pytest.raises(RankFailedError, match="rank 2: disk full on node seven") as caught:
        collect_receipts(store, 7, ATTEMPT, 3, timeout_s=600, options=OPTIONS, clock=clock)
    assert (caught.value.kind, clock.slept_s) == ("rank-failed", [])


def test_a_failure_record_that_cannot_be_read_is_still_a_failure(posix_open: OpenStore) -> None:
    store = posix_open()
    for rank, text in enumerate((b"{not json", b"[" * 100_000, b"3")):
        store.put(names.failure_key(7, ATTEMPT, rank, 3), text)
    with pytest.raises(RankFailedError, match="ranks 0, 1, 2"):
        collect_receipts(store, 7, ATTEMPT, 3, timeout_s=600, options=OPTIONS, clock=StepClock())


def test_a_subset_of_ranks_can_be_awaited(posix_open: OpenStore) -> None:
    store = posix_open()
    leave_receipt(store, 7, ATTEMPT, 1, 4, b"x")
    leave_receipt(store, 7, ATTEMPT, 3, 4, b"y")
    found = collect_receipts(store, 7, ATTEMPT, 4, timeout_s=5, options=OPTIONS, ranks=(1, 3))
    assert found == {1: b"x", 3: b"y"}


def test_a_prompt_rank_is_seen_promptly(posix_open: OpenStore) -> None:
    store = posix_open()
    leave_receipt(store, 7, ATTEMPT, 0, 2, b"")
    late = threading.Timer(0.3, lambda: leave_receipt(store, 7, ATTEMPT, 1, 2, b""))
    start_s = time.monotonic()
    late.start()
    collect_receipts(store, 7, ATTEMPT, 2, timeout_s=20, options=OPTIONS)
    assert time.monotonic() - start_s < 5.0
    late.join()


def test_a_store_that_fails_while_waiting_is_reported(posix_open: OpenStore) -> None:
    store = FaultyStore(posix_open(), "ok timeout", methods=frozenset({"list"}))
    with pytest.raises(StoreError, match="timeout at list"):
        collect_receipts(store, 7, ATTEMPT, 1, timeout_s=5, options=OPTIONS, clock=StepClock())
