"""Goal: all stores keep one contract. Method: one suite over local folders, fsspec's memory, and two real S3 servers.

Whatever a store reports is checked through a back door, and the other way round.
"""

from __future__ import annotations

import threading

import pytest

from ckpt.config import MIB
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, NotFoundError
from tests.store.conftest import Place

PATTERN = bytes(range(251)) * (12 * MIB // 251 + 1)  # more than two parts of an upload; no power of two in its period


def test_put_is_seen_through_the_back_door_and_replaces(place: Place) -> None:
    place.store.put("step/a.json", b"first")
    place.store.put("step/a.json", b"second")
    assert place.backdoor_get("step/a.json") == b"second"


def test_objects_of_other_writers_are_seen_at_once(place: Place) -> None:
    assert place.store.list("") == []
    assert not place.store.exists("other/x")
    place.backdoor_put("other/x", b"1234")
    assert place.store.exists("other/x")
    assert [(entry.key, entry.nbytes) for entry in place.store.list("other/")] == [("other/x", 4)]
    place.backdoor_put("other/y", b"")
    assert [entry.key for entry in place.store.list("")] == ["other/x", "other/y"]


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 0), (0, 10), (3, 7), (3, 3), (9, 10), (4, None), (10, 10)])
def test_read_returns_exactly_the_range(place: Place, start: int, stop: int | None) -> None:
    data = b"0123456789"
    place.backdoor_put("x", data)
    assert place.store.read("x", start, stop) == data[start:stop]


def test_empty_object_reads_as_nothing(place: Place) -> None:
    place.store.put("empty", b"")
    assert (place.store.read("empty"), place.store.size("empty")) == (b"", 0)


def test_read_into_fills_the_buffer_and_nothing_else(place: Place) -> None:
    place.backdoor_put("x", PATTERN)
    buffer = bytearray(b"\xee" * (7 * MIB + 2))
    place.store.read_into("x", 12345, memoryview(buffer)[1:-1])
    assert bytes(buffer[1:-1]) == PATTERN[12345 : 12345 + 7 * MIB]
    assert (buffer[0], buffer[-1]) == (0xEE, 0xEE)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (2, 5), (4, 5), (4, 4)])
def test_an_object_shorter_than_asked_is_truncated(place: Place, start: int, stop: int) -> None:
    place.backdoor_put("short", b"abc")
    with pytest.raises(DamagedError, match="`short`.*truncated") as caught:
        place.store.read("short", start, stop)
    assert caught.value.kind == "truncated"


def test_read_into_of_a_truncated_object_names_expected_and_found(place: Place) -> None:
    place.backdoor_put("short", b"abc")
    with pytest.raises(DamagedError, match="expected at least 9 bytes, found 3"):
        place.store.read_into("short", 1, memoryview(bytearray(8)))


def test_absent_objects_are_not_found(place: Place) -> None:
    for call in (place.store.read, place.store.size):
        with pytest.raises(NotFoundError, match="`no/such`") as caught:
            call("no/such")
        assert caught.value.kind == "no-object"
    with pytest.raises(NotFoundError):
        place.store.read_into("no/such", 0, memoryview(bytearray(1)))
    assert not place.store.exists("no/such")
    assert place.store.list("no/") == []
    assert place.store.list_folders("no/") == []


def test_a_folder_is_no_object(place: Place) -> None:
    place.store.put("folder/x", b"1")
    assert not place.store.exists("folder")
    with pytest.raises(NotFoundError):
        place.store.read("folder")


@pytest.mark.parametrize("key", ["", "/x", "../x", "a/../x", "a//x", "a/./x", "a\\x", "a/\n", "a/", "\x00"])
def test_keys_that_could_leave_the_root_are_refused(place: Place, key: str) -> None:
    calls = (
        lambda: place.store.read(key),
        lambda: place.store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: place.store.size(key),
        lambda: place.store.exists(key),
        lambda: place.store.put(key, b""),
        lambda: place.store.create(key, b""),
        lambda: place.store.open_writer(key),
        lambda: place.store.delete([key]),
    )
    for call in calls:
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.kind == "bad-key"


def test_prefixes_end_with_a_slash(place: Place) -> None:
    for call in (place.store.list, place.store.list_folders, lambda prefix: place.store.sweep(prefix, older_than_s=0)):
        with pytest.raises(InvalidInputError):
            call("step")


def test_list_is_sorted_deep_and_bounded_by_the_folder(place: Place) -> None:
    for key in ("b/2", "a/1", "a/deep/er/3", "ab/4", "5"):
        place.store.put(key, key.encode())
    assert [entry.key for entry in place.store.list("")] == ["5", "a/1", "a/deep/er/3", "ab/4", "b/2"]
    assert [entry.key for entry in place.store.list("a/")] == ["a/1", "a/deep/er/3"]
    assert place.store.list_folders("") == ["a", "ab", "b"]
    assert place.store.list_folders("a/") == ["deep"]


def test_time_stamps_are_of_now_and_do_not_go_back(place: Place) -> None:
    place.store.put("old", b"")
    place.store.put("new", b"")
    stamps = {entry.key: entry.modified_s for entry in place.store.list("")}
    assert 1.6e9 < stamps["old"] <= stamps["new"]


def test_list_gives_every_object_when_there_are_many(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.store.s3.PAGE_KEYS", 10)
    keys = [f"many/{number:05d}" for number in range(25)]
    threads = [threading.Thread(target=lambda part=part: [place.store.put(key, b"") for key in part]) for part in
               (keys[0::4], keys[1::4], keys[2::4], keys[3::4])]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.key for entry in place.store.list("many/")] == keys


def test_create_makes_an_object_once(place: Place) -> None:
    place.store.create("m.json", b"mine")
    with pytest.raises(AlreadyExistsError, match=r"m\.json"):
        place.store.create("m.json", b"theirs")
    assert place.backdoor_get("m.json") == b"mine"


def test_create_of_the_very_same_bytes_counts_as_won(place: Place) -> None:
    place.store.create("m.json", b"mine")
    place.store.create("m.json", b"mine")
    assert place.backdoor_get("m.json") == b"mine"


def test_conditional_create_is_what_the_store_really_does(place: Place) -> None:
    assert place.store.conditional_create == (place.kind in ("posix", "moto"))
    assert place.store.list("") == []  # the probe leaves nothing


def test_of_eight_creators_exactly_one_wins_where_creation_is_conditional(place: Place) -> None:
    if not place.store.conditional_create:
        pytest.skip(f"{place.kind} cannot create conditionally; tests/commit covers the claim rule")
    for number in range(3):
        won, lost, stores = [], [], [place.open() for _ in range(8)]
        gate = threading.Barrier(8)

        def race(
            index: int,
            store: object,
            key: str = f"race-{number}",
            won=won,
            lost=lost,
            gate=gate,  # type: ignore[no-untyped-def]
        ) -> None:
            gate.wait(timeout=20)
            try:
                store.create(key, b"%d" % index)  # type: ignore[attr-defined]
                won.append(index)
            except AlreadyExistsError:
                lost.append(index)

        threads = [threading.Thread(target=race, args=(index, store)) for index, store in enumerate(stores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for store in stores:
            store.close()
        assert (len(won), len(lost)) == (1, 7)
        assert place.backdoor_get(f"race-{number}") == b"%d" % won[0]


@pytest.mark.parametrize("nbytes", [0, 1, 4096, MIB, MIB + 1, 5 * MIB, 12 * MIB - 3])
@pytest.mark.parametrize("piece", [4 * MIB, 100_003])
def test_a_writer_stores_what_it_was_given(place: Place, nbytes: int, piece: int) -> None:
    buffer = bytearray(piece)
    writer = place.store.open_writer("data/image", nbytes=nbytes)
    for start in range(0, nbytes, piece):
        part = PATTERN[start : min(start + piece, nbytes)]
        buffer[: len(part)] = part
        writer.write(memoryview(buffer)[: len(part)])
        buffer[:] = b"\xee" * piece  # the caller may reuse its buffer as soon as `write` returns
    writer.commit()
    assert place.backdoor_get("data/image") == PATTERN[:nbytes]
    assert place.store.size("data/image") == nbytes


def test_an_aborted_writer_leaves_no_object(place: Place) -> None:
    for nbytes in (10, 11 * MIB):
        writer = place.store.open_writer("data/image")
        writer.write(memoryview(PATTERN)[:nbytes])
        writer.abort()
        writer.abort()
        assert place.store.list("") == []


def test_abort_after_commit_keeps_the_object(place: Place) -> None:
    writer = place.store.open_writer("data/image")
    writer.write(memoryview(b"done"))
    writer.commit()
    writer.abort()
    assert place.backdoor_get("data/image") == b"done"


def test_a_writer_never_starts_on_an_existing_object(place: Place) -> None:
    place.backdoor_put("data/image", b"theirs")
    with pytest.raises(AlreadyExistsError):
        place.store.open_writer("data/image")
    assert place.backdoor_get("data/image") == b"theirs"


def test_delete_removes_these_objects_only_and_takes_absent_ones(place: Place) -> None:
    for key in ("a/1", "a/2", "a/b/3", "c"):
        place.store.put(key, b"x")
    place.store.delete(["a/1", "a/b/3", "no/such"])
    place.store.delete([])
    assert [entry.key for entry in place.store.list("")] == ["a/2", "c"]
    assert place.store.list_folders("a/") == []


def test_names_of_a_run_with_odd_letters_survive(place: Place) -> None:
    keys = ["a b/ü+%2F&=.json", "q?x#y"] if place.kind != "rclone" else ["a b/ü+&=.json"]
    for key in keys:
        place.store.put(key, key.encode())
    assert [entry.key for entry in place.store.list("")] == sorted(keys)
    assert [place.store.read(key) for key in keys] == [key.encode() for key in keys]


def test_close_may_be_called_twice(place: Place) -> None:
    store = place.open()
    store.put("x", b"1")
    store.close()
    store.close()


def test_errors_and_urls_show_no_secret(place: Place) -> None:
    assert "secret" not in place.store.url
    try:
        place.store.read("no/such")
    except CheckpointError as error:
        assert "secret" not in str(error)
