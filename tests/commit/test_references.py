"""Goal: an image that a complete step refers to is never removed, whoever forgets, collects and saves at the same time.

Method: small saves of opaque bytes whose manifests refer to one another; a whole forget and gc inside every single store call
of a save, a whole save inside every single store call of a gc, and crashes at every write of both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from ckpt.commit import find, names
from ckpt.commit.gc import collect_garbage
from ckpt.commit.publish import publish
from ckpt.commit.retention import forget, unforget
from ckpt.config import Options
from ckpt.errors import CheckpointError, NotFoundError, RankFailedError
from ckpt.format import index, manifest
from ckpt.format.manifest import FileRecord, Manifest, ReferenceRecord, WriterRecord
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.testing import WRITES, FaultyStore, SimulatedCrash
from tests.commit.conftest import OPTIONS, OpenStore, data_of

BASE, NEXT, OTHER = "attempt-base", "attempt-next", "attempt-other"


def new_store() -> Store:
    return open_store(f"memory://references-{os.urandom(6).hex()}", options=OPTIONS)


def image_of(step: int, attempt: str) -> str:
    return f"{names.attempt_folder(step, attempt)}/{names.image_name(0, 1)}"


def save(store: Store, step: int, attempt: str, refers_to: tuple[tuple[int, str], ...] = ()) -> None:
    """One rank's save, whose manifest refers to the images of these attempts."""
    store.put(image_of(step, attempt), data_of(attempt, 0))
    store.put(f"{names.attempt_folder(step, attempt)}/tensors.parquet", b"index")
    none = FileRecord(file=index.TENSORS_FILE, nbytes=0, digest="", block_bytes=1, crc32c=[])
    references = [
        ReferenceRecord(
            step=of,
            attempt=base,
            file=names.image_name(0, 1),
            nbytes=len(data_of(base, 0)),
            header_bytes=8,
            header_crc32c=0,
            used_bytes=1,
        )
        for of, base in sorted(refers_to)
    ]
    found = Manifest(
        step=step,
        attempt=attempt,
        created="",
        program="",
        world=1,
        block_bytes=1,
        num_tensors=0,
        num_fragments=0,
        tensor_bytes=0,
        tensors=none,
        fragments=none,
        objects=none,
        writers=[WriterRecord(rank=0, file=names.image_name(0, 1), nbytes=8, header_bytes=8, header_crc32c=0)],
        references=references,
    )
    publish(store, step, attempt, manifest.pack(found), options=OPTIONS)


def check_whole(store: Store) -> None:
    """Every image that a complete step holds or refers to is there, whole."""
    for step in find.steps(store):
        key = names.manifest_key(step)
        found = manifest.unpack(store.read(key), name=key)
        for at, attempt in [(step, found.attempt), *((one.step, one.attempt) for one in found.references)]:
            assert store.read(image_of(at, attempt)) == data_of(attempt, 0), (step, at)


class Hooked:
    """A store that does something else right before its call number `at`, once."""

    def __init__(self, store: Store, at: int, action: Callable[[], None]) -> None:
        self._store, self._left, self._action = store, at, action

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self._action()
            return found(*args, **options)

        return call

    @property
    def reached(self) -> bool:
        return self._left < 0


def test_images_that_a_step_refers_to_outlive_the_step_that_wrote_them(any_open: OpenStore) -> None:
    store = any_open()
    save(store, 1, BASE)
    save(store, 2, NEXT, ((1, BASE),))
    forget(store, [1])
    dry = collect_garbage(store, options=OPTIONS, dry_run=True)
    assert [kept.reason for kept in dry.plan.kept] == ["1 of its images needed by step 2"]
    collect_garbage(store, options=OPTIONS)
    check_whole(store)
    assert find.steps(store) == [2]
    assert not store.exists(f"{names.attempt_folder(1, BASE)}/tensors.parquet")
    again = collect_garbage(store, options=OPTIONS)
    assert again.plan.removals == () and len(again.plan.kept) == 1
    forget(store, [2])
    collect_garbage(store, options=OPTIONS)
    assert store.list("") == []


def test_a_step_forgotten_and_brought_back_has_its_images(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, BASE)
    save(store, 2, NEXT, ((1, BASE),))
    forget(store, [1, 2])
    unforget(store, 2)
    collect_garbage(store, options=OPTIONS)
    check_whole(store)
    with pytest.raises(NotFoundError):
        unforget(store, 1)


def test_nothing_is_removed_while_a_manifest_cannot_be_read(posix_open: OpenStore) -> None:
    store = posix_open()
    for step in (1, 2, 3):
        save(store, step, f"attempt-{step}", ((1, "attempt-1"),) if step == 2 else ())
    damaged = store.read(names.manifest_key(2)).replace(b'"used_bytes": 1', b'"used_bytes": 2')
    store.put(names.manifest_key(2), damaged)
    forget(store, [1, 3])
    report = collect_garbage(store, options=OPTIONS)
    assert store.exists(image_of(1, "attempt-1")) and store.exists(image_of(3, "attempt-3"))
    assert {kept.step for kept in report.plan.kept} == {1, 3}
    assert "cannot be read" in report.plan.kept[1].reason


def test_a_pin_protects_until_its_attempt_is_dead(posix_open: OpenStore) -> None:
    store = posix_open()
    save(store, 1, BASE)
    with pytest.raises(SimulatedCrash):
        save(FaultyStore(store, "ok*3 crash", methods=WRITES), 2, NEXT, ((1, BASE),))  # after image, index and pin
    assert store.exists(names.pins_key(2, NEXT))
    forget(store, [1])
    collect_garbage(store, options=OPTIONS)
    assert store.exists(image_of(1, BASE))
    collect_garbage(store, options=OPTIONS, force_unfinished=True)
    assert store.list("") == []


def test_forget_and_gc_inside_any_call_of_a_save_never_leave_a_step_without_its_images() -> None:
    at, inside, outcomes = 0, True, set()
    while inside:
        store = new_store()
        save(store, 1, BASE)

        def interfere(store: Store = store) -> None:
            forget(store, [1])
            collect_garbage(store, options=OPTIONS)

        hooked = Hooked(store, at, interfere)
        try:
            save(hooked, 2, NEXT, ((1, BASE),))  # type: ignore[arg-type]
            outcomes.add("saved")
        except RankFailedError as error:
            outcomes.add(error.kind)
            assert find.steps(store) == []
        check_whole(store)
        inside, at = hooked.reached, at + 1
    assert at > 8 and outcomes == {"saved", "base-removed"}


@pytest.mark.parametrize("force", [False, True])
def test_a_save_inside_any_call_of_gc_is_refused_or_has_its_images(force: bool) -> None:
    at, inside, outcomes = 0, True, set()
    while inside:
        store = new_store()
        save(store, 1, BASE)
        save(store, 3, OTHER, ((1, BASE),))
        forget(store, [1, 3])

        def interfere(store: Store = store) -> None:
            try:
                save(store, 4, NEXT, ((1, BASE), (3, OTHER)))
                outcomes.add("saved")
            except CheckpointError as error:
                outcomes.add(error.kind)

        hooked = Hooked(store, at, interfere)
        collect_garbage(hooked, options=OPTIONS, force_unfinished=force)  # type: ignore[arg-type]
        check_whole(store)
        inside, at = hooked.reached, at + 1
    assert at > 20 and outcomes == {"saved", "base-removed"}


@pytest.mark.parametrize("kind", ["crash", "crash-after"])
def test_gc_cut_anywhere_keeps_what_is_referred_to_and_can_be_run_again(kind: str) -> None:
    cut, crashed = 0, True
    while crashed:
        store = new_store()
        save(store, 1, BASE)
        save(store, 2, OTHER, ((1, BASE),))
        save(store, 3, NEXT, ((1, BASE),))
        forget(store, [1, 2])
        try:
            collect_garbage(FaultyStore(store, f"ok*{cut} {kind}", methods=WRITES), options=OPTIONS)
            crashed = False
        except SimulatedCrash:
            cut += 1
        check_whole(store)
        for step in (1, 2):  # what can be brought back is whole as well
            try:
                unforget(store, step)
            except NotFoundError:
                continue
        check_whole(store)
        forget(store, [step for step in find.steps(store) if step != 3])
        collect_garbage(store, options=OPTIONS)
        check_whole(store)
        left = {entry.key for entry in store.list("") if not entry.key.endswith(names.ABORTED)}
        assert {key for key in left if key.startswith(names.step_folder(1))} == {image_of(1, BASE)}
        assert not [key for key in left if key.startswith(names.step_folder(2))]
    assert cut > 10


@pytest.mark.parametrize("kind", ["crash", "crash-after"])
def test_a_save_cut_anywhere_is_whole_or_not_there_after_forget_and_gc(kind: str) -> None:
    cut, crashed = 0, True
    while crashed:
        store = new_store()
        save(store, 1, BASE)
        try:
            save(FaultyStore(store, f"ok*{cut} {kind}", methods=WRITES), 2, NEXT, ((1, BASE),))
            crashed = False
        except SimulatedCrash:
            cut += 1
        forget(store, [1])
        for options in (OPTIONS, Options(gc_grace_s=1e-9, claim_ttl_s=1e-9)):
            collect_garbage(store, options=options)
            check_whole(store)
        if not find.steps(store):
            assert store.list("") == []
    assert cut >= 3
