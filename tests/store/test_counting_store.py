"""Goal: the counting store counts every byte and call, the faulty store follows its script. Method: known traffic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt.config import Options
from ckpt.errors import InvalidInputError, StoreError
from ckpt.store.counting import CountingStore
from ckpt.store.open import open_store
from ckpt.store.testing import WRITES, FaultyStore, SimulatedCrash, parse_script


def test_traffic_is_counted_exactly(tmp_path: Path) -> None:
    store = CountingStore(open_store(tmp_path, options=Options()))
    writer = store.open_writer("image", nbytes=10)
    writer.write(memoryview(b"0123456"))
    writer.write(memoryview(b"789"))
    writer.commit()
    store.put("a", b"12345")
    store.create("b", b"123")
    store.read("image", 2, 6)
    store.read_into("image", 0, memoryview(bytearray(3)))
    assert store.exists("a") and store.size("a") == 5 and store.conditional_create
    store.delete(["b"])
    assert (store.traffic.bytes_written, store.traffic.bytes_read) == (18, 7)
    assert dict(store.traffic.bytes_written_of) == {"image": 10, "a": 5, "b": 3}
    assert dict(store.traffic.bytes_read_of) == {"image": 7}
    assert dict(store.traffic.calls) == {
        "open_writer": 1, "write": 2, "commit": 1, "put": 1, "create": 1, "read": 1, "read_into": 1, "exists": 1,
        "size": 1, "delete": 1,
    }  # fmt: skip
    assert [entry.key for entry in store.list("")] == ["a", "image"]
    assert store.list_folders("") == [] and store.url == os.fspath(tmp_path) and store.sweep("", older_than_s=0) == 0
    store.close()


def test_the_script_decides_what_lands_and_what_is_told(tmp_path: Path) -> None:
    inner = open_store(tmp_path, options=Options())
    store = FaultyStore(inner, "ok timeout lost-response full", methods=WRITES)
    store.put("a", b"")
    for key in ("b", "c", "d"):
        with pytest.raises(StoreError):
            store.put(key, b"")
    store.put("e", b"")
    assert [entry.key for entry in store.list("")] == ["a", "c", "e"]
    assert store.log == ["put a", "put b", "put c", "put d", "put e"]


@pytest.mark.parametrize(("word", "landed"), [("crash", False), ("crash-after", True)])
def test_after_a_crash_nothing_works(tmp_path: Path, word: str, landed: bool) -> None:
    store = FaultyStore(open_store(tmp_path, options=Options()), word)
    for call in (lambda: store.put("a", b""), lambda: store.put("b", b""), lambda: store.read("a")):
        with pytest.raises(SimulatedCrash):
            call()
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if landed else [])


@pytest.mark.parametrize("script", ["okay", "ok*x", "ok*-1"])
def test_scripts_with_typing_errors_are_refused(script: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_script(script)
