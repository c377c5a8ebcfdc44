"""Goal: a policy keeps what it says and never the last checkpoint goes; forgetting is safe to cut anywhere.

Method: a brute-force oracle for the policies, all cut points for forget and unforget.
"""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.commit import names
from ckpt.commit.find import steps
from ckpt.commit.gc import collect_garbage
from ckpt.commit.publish import mark_aborted
from ckpt.commit.retention import Policy, StepRecord, decide, forget, unforget
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from ckpt.store.open import open_store
from ckpt.store.testing import WRITES, FaultyStore, SimulatedCrash
from tests.commit.conftest import OPTIONS, OpenStore, check_complete, save


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([1.0, 2.0, 3.0, math.nan, None])), unique_by=lambda r: r[0]),
    st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.sampled_from(["min", "max"]),
)  # fmt: skip
def test_a_step_stays_exactly_when_a_rule_keeps_it(
    rows: list[tuple[int, float | None]], last: int, every: int, best: int, mode: str
) -> None:
    records = [StepRecord(step=s, metrics={} if loss is None else {"loss": loss}) for s, loss in rows]
    policy = Policy(last=last, every=every, best=best, metric="loss", mode=mode)  # type: ignore[arg-type]
    verdicts = decide(records, policy)

    def better(other: tuple[int, float], mine: tuple[int, float]) -> bool:
        if other[1] != mine[1]:
            return other[1] < mine[1] if mode == "min" else other[1] > mine[1]
        return other[0] > mine[0]

    valued = [(s, loss) for s, loss in rows if loss is not None and not math.isnan(loss)]
    expected = {s for s, _ in rows if s % every == 0 or sum(other > s for other, _ in rows) < last}
    expected |= {mine[0] for mine in valued if sum(better(other, mine) for other in valued) < best}
    assert [verdict.step for verdict in verdicts] == sorted(s for s, _ in rows)
    assert {verdict.step for verdict in verdicts if verdict.keep} == expected


def test_the_newest_and_named_steps_always_stay() -> None:
    records = [StepRecord(step=step) for step in (1, 2, 3, 4)]
    verdicts = decide(records, Policy(every=1000, steps=(2,)))
    assert [(verdict.step, verdict.keep, verdict.reason) for verdict in verdicts] == [
        (1, False, "no rule keeps it"),
        (2, True, "named"),
        (3, False, "no rule keeps it"),
        (4, True, "the newest"),
    ]


@pytest.mark.parametrize("rules", [{}, {"last": 0}, {"every": -1}, {"best": 1}, {"metric": "loss"}])
def test_policies_that_make_no_sense_are_refused(rules: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Policy(**rules)  # type: ignore[arg-type]


def test_a_forgotten_step_is_invisible_and_comes_back_whole(any_open: OpenStore) -> None:
    store = any_open()
    save(store, 1, "attempt-1")
    save(store, 2, "attempt-2")
    forget(store, [1])
    assert steps(store) == [2]
    unforget(store, 1)
    assert steps(store) == [1, 2]
    assert check_complete(store, 1) == "attempt-1"
    assert not store.exists(names.forgotten_key(1))


def test_forgetting_what_is_not_there_is_an_error(posix_open: OpenStore) -> None:
    for call in (lambda: forget(posix_open(), [4]), lambda: unforget(posix_open(), 4)):
        with pytest.raises(NotFoundError):
            call()


def test_a_step_saved_again_after_forget_is_not_replaced_by_unforget(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, "attempt-1")
    forget(store, [1])
    save(store, 1, "attempt-2")
    with pytest.raises(AlreadyExistsError):
        unforget(store, 1)
    assert check_complete(store, 1) == "attempt-2"


@pytest.mark.parametrize("kind", ["crash", "crash-after"])
def test_a_crash_inside_forget_or_unforget_loses_nothing(kind: str) -> None:
    for cut in range(4):
        store = open_store(f"memory://retention-{os.urandom(6).hex()}", options=OPTIONS)
        save(store, 1, "attempt-1")
        faulty = FaultyStore(store, f"ok*{cut} {kind}", methods=WRITES)
        try:
            forget(faulty, [1])
            unforget(faulty, 1)
        except SimulatedCrash:
            pass
        if steps(store) == []:
            unforget(store, 1)
        assert check_complete(store, 1) == "attempt-1"
        collect_garbage(store, options=OPTIONS)
        assert check_complete(store, 1) == "attempt-1"
        assert not store.exists(names.forgotten_key(1))


def test_unforget_gives_way_to_a_gc_that_has_begun(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, "attempt-1")
    forget(store, [1])
    mark_aborted(store, 1, "attempt-1", "removed by gc")
    with pytest.raises(NotFoundError, match="being removed"):
        unforget(store, 1)
    assert steps(store) == []
    collect_garbage(store, options=Options())
    assert store.list("") == []
