"""Goal: a checkpoint made to deceive is refused, for the right reason, without large allocations.

Method: each case changes one thing in a valid checkpoint and makes every digest right again, so that nothing but the check in
question can refuse it. The kernel's peak of this process's memory and the sizes of reads watch the memory.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ckpt
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError, InvalidInputError, NotFoundError, VersionError
from ckpt.format import index
from ckpt.format.image import header_nbytes, parse_header
from ckpt.format.objects import decode
from ckpt.kernels import crc32c
from tests.corrupt.damaged_copies import (
    OPTIONS,
    DictStore,
    Files,
    everything,
    parts_of,
    saved,
    with_file,
    with_manifest,
)

STATE = {"m": {"a": torch.arange(8.0), "b": torch.arange(6, dtype=torch.int16).reshape(2, 3)}, "k": {"lr": 0.5}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return saved(tmp_path_factory.mktemp("hostile"), STATE)


def refused(files: Files, match: str, error: type[Exception] = DamagedError) -> None:
    """Reading `files` is refused with a message that says `match`, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            everything(files)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------- manifest

Change = Callable[[dict[str, Any]], Any]


def put(path: str, value: Any) -> Change:
    """Set a field, named by its path."""

    def change(document: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for part in folders:
            document = document[int(part)] if isinstance(document, list) else document[part]
        document[last] = value

    return change


def drop(key: str) -> Change:
    return lambda document: document.pop(key) and None


MANIFESTS: dict[str, tuple[Change, str]] = {
    "float step": (put("step", 1.0), "field `step` must be a int"),
    "true step": (put("step", True), "field `step` must be a int"),
    "other step": (put("step", 2), "is the manifest of step 2, expected 1"),
    "negative world": (put("world", -1), "field `world`"),
    "huge world": (put("world", 10**9 - 1), "1 writers, expected 999999999"),
    "world of all numbers": (put("world", 10**30), "field `world`"),
    "attempt with ..": (put("attempt", "../../../etc"), "manifest"),
    "attempt of another kind": (put("attempt", ["a"]), "field `attempt`"),
    "attempt that is not there": (put("attempt", "0123456789abcdef"), "missing from a complete checkpoint"),
    "file with ..": (put("tensors/file", "../x/tensors.parquet"), "names files that are not its own"),
    "absolute file": (put("objects/file", "/etc/passwd"), "names files that are not its own"),
    "image of another attempt": (put("writers/0/file", "../b/00000-of-00001.safetensors"), "not its own"),
    "rank of another": (put("writers/0/rank", 1), "not its own"),
    "no writers": (put("writers", []), "0 writers, expected 1"),
    "writer is a number": (put("writers", [1]), "not a JSON object"),
    "zero block_bytes": (put("block_bytes", 0), "field `block_bytes`"),
    "huge block_bytes": (put("block_bytes", 1 << 50), "field `block_bytes`"),
    "zero index block_bytes": (put("tensors/block_bytes", 0), "field `block_bytes`"),
    "no crc32c": (put("tensors/crc32c", []), "field `crc32c`"),
    "crc32c of 33 bits": (put("tensors/crc32c", [1 << 32]), "field `crc32c`"),
    "huge index file": (put("tensors/nbytes", 1 << 18), "expected 262144 bytes, found"),
    "wrong index digest": (put("tensors/digest", "sha256:0"), "expected sha256:0, found"),
    "header over the image": (put("writers/0/header_bytes", 1 << 40), "field `header_bytes`"),
    "image shorter than its fragments": (put("writers/0/nbytes", 4100), "lies outside its image"),
    "header over fragments": (put("writers/0/header_bytes", 4160), "lies outside its image"),
    "one tensor too few": (put("num_tensors", 1), "rows, expected 1"),
    "one fragment too many": (put("num_fragments", 3), "fragments are not 3"),
    "all fragments": (put("num_fragments", 1 << 60), "field `num_fragments`"),
    "metric of text": (put("metrics", {"loss": "low"}), "a metric must be a number"),
    "metrics list": (put("metrics", []), "field `metrics`"),
    "requires text": (put("requires", "x"), "not a manifest"),
    "version text": (put("version", "1"), "not a manifest"),
    "version true": (put("version", True), "not a manifest"),
    "no step": (drop("step"), "field `step`"),
    "no objects": (drop("objects"), "`objects`: not a JSON object"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(files: Files, case: str) -> None:
    change, match = MANIFESTS[case]
    refused(with_manifest(files, change), match)


@pytest.mark.parametrize("change", [put("version", 2), put("requires", ["shiny"]), put("requires", [["nested"], 1])])
def test_a_newer_format_is_refused_as_newer(files: Files, change: Change) -> None:
    refused(with_manifest(files, change), "install a newer ckpt", VersionError)


def test_fields_that_are_new_are_passed_over(files: Files) -> None:
    changed = with_manifest(files, put("shiny", {"deep": [1]}))
    assert everything(with_manifest(changed, put("writers/0/new", 1))) == everything(files)


def test_a_manifest_that_nests_repeats_or_bloats_is_refused(files: Files) -> None:
    key, _ = parts_of(files)
    text = files[key].decode()
    for hostile in (
        text.replace('"step": 1,', '"step": 1,\n "step": 1,'),
        text.replace('"note": "x"', f'"note": {"[" * 5000}{"]" * 5000}'),
        text.replace('"note": "x"', f'"note": {"9" * 5000}'),
        text.replace('"note": "x"', '"note": NaN'),
        text.replace('"step": 1,', '"step": 1e0,'),
    ):
        assert hostile != text
        refused({**files, key: hostile.encode()}, "is damaged")
    refused({**files, key: files[key].ljust((64 << 20) + 1)}, "too many for a manifest")


def test_nan_in_metadata_cannot_be_saved_and_nan_in_metrics_comes_back(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="JSON"):
        ckpt.save({"k": 1}, tmp_path / "a", step=1, metadata={"x": float("nan")})
    losses = {"a": float("nan"), "b": float("-inf"), "c": float("inf"), "d": -0.0, "e": 3}
    ckpt.save({"k": 1}, tmp_path / "b", step=1, metrics=losses)
    assert str(ckpt.open(tmp_path / "b").metrics) == str(losses)
    text = next((tmp_path / "b").glob("*/manifest.json")).read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


# ------------------------------------------------------------------------------------------------------------------- index


def table_of(files: Files, name: str) -> pa.Table:
    _, folder = parts_of(files)
    return pq.ParquetFile(io.BytesIO(files[f"{folder}/{name}"]), pre_buffer=False).read(use_threads=False)


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, store_schema=False, **options)
    return sink.getvalue()


def with_column(files: Files, name: str, column: str, values: list[Any], kind: Any = None) -> Files:
    table = table_of(files, name)
    at = table.column_names.index(column)
    array = pa.array(values, kind or table.schema.field(column).type)
    return with_file(files, name, parquet(table.set_column(at, column, array)))


# file, column, values, what the refusal says. The tensors are `m/a` f32 [8] and `m/b` i16 [2, 3]; see STATE.
COLUMNS: dict[str, tuple[str, str, list[Any], str]] = {
    "negative shape": ("tensors", "shape", [[-8], [2, 3]], "cannot be"),
    "overflowing shape": ("tensors", "shape", [[1 << 40, 1 << 40], [2, 3]], "cannot be"),
    "too many dims": ("tensors", "shape", [[1] * 33, [2, 3]], "cannot be"),
    "larger shape": ("tensors", "shape", [[9], [2, 3]], "not those of their shapes"),
    "wrong nbytes": ("tensors", "nbytes", [33, 12], "not those of their shapes"),
    "unsorted names": ("tensors", "name", ["m/b", "m/a"], "not sorted"),
    "equal names": ("tensors", "name", ["m/a", "m/a"], "not sorted"),
    "empty name": ("tensors", "name", ["", "m/b"], "is empty"),
    "long name": ("tensors", "name", ["a" * 1025, "m/b"], "longer than"),
    "NUL in a name": ("tensors", "name", ["a\0", "m/b"], "NUL"),
    "unknown dtype": ("tensors", "dtype", ["float32", "object"], "`object` cannot be stored"),
    "wrong ids": ("tensors", "id", [1, 0], "ids are not their places"),
    "too few fragments": ("tensors", "num_fragments", [0, 1], "its fragments are not 2"),
    "fragments of another": ("tensors", "num_fragments", [0, 2], "are in no fragment"),
    "negative fragments": ("tensors", "num_fragments", [3, -1], "cannot have"),
    "null name": ("tensors", "name", [None, "m/b"], "nulls"),
    "null in a shape": ("tensors", "shape", [[None], [2, 3]], "nulls"),
    "unsorted tensors": ("fragments", "tensor", [1, 0], "not sorted"),
    "unknown tensor": ("fragments", "tensor", [0, 2], "name tensors that are not there"),
    "negative tensor": ("fragments", "tensor", [-1, 0], "name tensors that are not there"),
    "missing tensor": ("fragments", "tensor", [0, 0], "another number of fragments"),
    "negative offset": ("fragments", "offsets", [[-1], [0, 0]], "lies outside its tensor"),
    "offset beyond": ("fragments", "offsets", [[1], [0, 0]], "lies outside its tensor"),
    "huge offset": ("fragments", "offsets", [[(1 << 63) - 1], [0, 0]], "lies outside its tensor"),
    "negative length": ("fragments", "lengths", [[-8], [2, 3]], "lies outside its tensor"),
    "huge length": ("fragments", "lengths", [[(1 << 63) - 1], [2, 3]], "lies outside its tensor"),
    "shorter length": ("fragments", "lengths", [[7], [2, 3]], "lies outside its tensor"),
    "fewer dims": ("fragments", "offsets", [[0], [0]], "another number of dims"),
    "more dims": ("fragments", "lengths", [[8, 1], [2, 3]], "another number of dims"),
    "writer out of range": ("fragments", "writer", [0, 1], "lies outside its image"),
    "negative writer": ("fragments", "writer", [-1, 0], "lies outside its image"),
    "in the header": ("fragments", "byte_offset", [4095, 4128], "lies outside its image"),
    "behind the image": ("fragments", "byte_offset", [1 << 62, 4128], "lies outside its image"),
    "negative place": ("fragments", "byte_offset", [-1, 4128], "lies outside"),
    "place that overflows": ("fragments", "byte_offset", [(1 << 63) - 1, 4128], "lies outside its image"),
    "other bytes": ("fragments", "byte_offset", [4097, 4128], "expected crc32c"),
    "too many bytes": ("fragments", "nbytes", [1 << 40, 12], "lies outside its tensor"),
    "no checksum": ("fragments", "checksums", [[], [1]], "lies outside its tensor or file"),
    "too many checksums": ("fragments", "checksums", [[1, 2], [1]], "lies outside its tensor or file"),
    "wrong checksum": ("fragments", "checksums", [[1], [1]], "expected crc32c"),
    "null checksums": ("fragments", "checksums", [None, [1]], "nulls"),
    "object rank": ("objects", "rank", [5, 0], "is of rank 5, expected 0 to 0"),
    "object writer": ("objects", "writer", [5, 0], "lies outside its image"),
    "object before the file": ("objects", "byte_offset", [-5, 4140], "lies outside its image"),
    "object in the header": ("objects", "byte_offset", [0, 4140], "lies outside its image"),
    "object of negative length": ("objects", "nbytes", [-1, 1024], "lies outside its image"),
    "huge object": ("objects", "nbytes", [1 << 50, 1024], "too many"),
    "object with another digest": ("objects", "digest", ["sha256:00", "sha256:11"], "expected sha256:"),
    "object that stands twice": ("objects", "name", ["k", "k"], "stands twice"),
    "unsorted objects": ("objects", "name", ["m", "k"], "not sorted"),
    "unknown kind": ("objects", "kind", ["replicated", "virus"], "kind `virus`"),
}


def test_the_untouched_table_is_read(files: Files) -> None:
    for name in ("tensors.parquet", "fragments.parquet", "objects.parquet"):
        assert everything(with_file(files, name, parquet(table_of(files, name)))) == everything(files)
    assert table_of(files, "objects.parquet")["name"].to_pylist() == ["k", "m"]


@pytest.mark.parametrize("case", COLUMNS)
def test_a_hostile_index_is_refused(files: Files, case: str) -> None:
    name, column, values, match = COLUMNS[case]
    refused(with_column(files, f"{name}.parquet", column, values), match)


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("tensor", [0.0, 1.0], pa.float64()),
        ("tensor", ["0", "1"], pa.string()),
        ("offsets", [[0.0], [0.0, 0.0]], pa.list_(pa.float64())),
        ("offsets", [0, 0], pa.int64()),
        ("checksums", [[1], [1]], pa.list_(pa.int64())),
        ("nbytes", [[32], [12]], pa.list_(pa.int64())),
    ],
)
def test_a_column_of_another_type_is_refused(files: Files, column: str, values: list[Any], kind: Any) -> None:
    refused(with_column(files, "fragments.parquet", column, values, kind), f"one column `{column}`")


@pytest.mark.parametrize("name", ["tensors.parquet", "fragments.parquet", "objects.parquet"])
def test_a_missing_column_is_refused_and_a_new_one_passed_over(files: Files, name: str) -> None:
    table = table_of(files, name)
    for column in table.column_names:
        refused(with_file(files, name, parquet(table.drop_columns([column]))), f"one column `{column}`")
    more = table.append_column("shiny", pa.array([{"x": 1}] * len(table)))
    assert everything(with_file(files, name, parquet(more))) == everything(files)


def fragments(files: Files, rows: list[dict[str, Any]]) -> Files:
    """The files with these rows in fragments.parquet."""
    table = pa.Table.from_pylist(rows, schema=table_of(files, "fragments.parquet").schema)
    changed = with_file(files, "fragments.parquet", parquet(table))
    counts = [sum(row["tensor"] == tensor for row in rows) for tensor in range(2)]
    changed = with_column(changed, "tensors.parquet", "num_fragments", counts)
    return with_manifest(changed, put("num_fragments", len(rows)))


def row_of_a(files: Files, offset: int, length: int) -> dict[str, Any]:
    """A valid fragment of `m/a`: elements from `offset` on, with its right checksum."""
    row = table_of(files, "fragments.parquet").to_pylist()[0]
    _, folder = parts_of(files)
    start = row["byte_offset"] + 4 * offset
    data = files[f"{folder}/00000-of-00001.safetensors"][start : start + 4 * length]
    change = {"offsets": [offset], "lengths": [length], "byte_offset": start, "nbytes": 4 * length}
    return {**row, **change, "checksums": [crc32c(data)]}


def test_overlapping_fragments_that_add_up_to_the_whole_are_refused(files: Files) -> None:
    last = table_of(files, "fragments.parquet").to_pylist()[1]
    good = [row_of_a(files, 0, 3), row_of_a(files, 3, 5), last]
    assert everything(fragments(files, good)) == everything(files)
    for cuts in ([(0, 4), (0, 4)], [(0, 4), (2, 4)], [(0, 6), (1, 2)], [(4, 4), (0, 4)], [(0, 8), (0, 8)]):
        rows = [row_of_a(files, offset, length) for offset, length in cuts]
        refused(fragments(files, [*rows, last]), "overlap or are not in order")
    refused(fragments(files, [row_of_a(files, 0, 4), last]), "are in no fragment")
    refused(fragments(files, [last]), "are in no fragment")
    refused(fragments(files, []), "are in no fragment")


def test_overlapping_boxes_of_two_dims_are_refused(files: Files) -> None:
    first, last = table_of(files, "fragments.parquet").to_pylist()
    part = {**last, "nbytes": 4, "lengths": [2, 1]}
    rows = [{**part, "offsets": [0, 0]}, {**part, "offsets": [0, 0]}, {**part, "offsets": [0, 1]}]
    refused(fragments(files, [first, *rows]), "overlap or are not in order")


def test_a_row_group_of_very_many_rows_is_refused(files: Files) -> None:
    table = pa.table({"tensor": pa.array([0] * 200_000, pa.int32())})
    columns = {field.name: pa.nulls(200_000, field.type) for field in table_of(files, "fragments.parquet").schema}
    data = parquet(pa.table({**columns, "tensor": table["tensor"]}), row_group_size=200_000)
    changed = with_column(files, "tensors.parquet", "num_fragments", [200_000, 0])
    changed = with_manifest(with_file(changed, "fragments.parquet", data), put("num_fragments", 200_000))
    refused(changed, "a row group has more than")


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" * 4, b"PAR1" + struct.pack("<I", 1 << 31) + b"PAR1", b"\0" * 100]
)
def test_a_file_that_is_no_parquet_is_refused(files: Files, data: bytes) -> None:
    for name in ("tensors.parquet", "fragments.parquet", "objects.parquet"):
        refused(with_file(files, name, data), f"{name}` is damaged")


def test_a_read_never_asks_for_more_than_the_files_hold(files: Files) -> None:
    store = DictStore(files)
    StoredCheckpoint(store, 1, OPTIONS).fragments()
    assert max(store.reads) <= max(map(len, files.values()))


# ------------------------------------------------------------------------------------------------------------------ images


def image(entries: Any, *, body: int = 0, text: bytes | None = None, size: int | None = None) -> bytes:
    data = json.dumps(entries).encode() if text is None else text
    return struct.pack("<Q", len(data) if size is None else size) + data + bytes(body)


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


IMAGES: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length beyond the file": image({}, size=1 << 20),
    "length of all bits": image({}, size=(1 << 64) - 1),
    "no JSON": image(None, text=b"nothing"),
    "not UTF-8": image(None, text=b'{"\xff": 1}'),
    "a list": image([]),
    "deep": image(None, text=b"[" * 100_000),
    "huge number": image(None, text=b'{"a": ' + b"9" * 5000 + b"}"),
    "name twice": image(None, text=b'{"a": 1, "a": 1}'),
    "entry is a number": image({"a": 1}),
    "more fields": image({"a": {**entry([1], 0, 1), "x": 1}}, body=1),
    "float shape": image({"a": entry([1.0], 0, 1)}, body=1),
    "negative dim": image({"a": entry([-1, -1], 0, 1)}, body=1),
    "true dim": image({"a": entry([True], 0, 1)}, body=1),
    "overflowing shape": image({"a": entry([1 << 32, 1 << 32], 0, 0)}),
    "too many dims": image({"a": entry([1] * 40, 0, 1)}, body=1),
    "unknown dtype": image({"a": entry([1], 0, 1, "X9")}, body=1),
    "dtype is a list": image({"a": entry([1], 0, 1, ["U8"])}, body=1),
    "dtype is an object": image({"a": entry([1], 0, 1, {})}, body=1),
    "offsets backwards": image({"a": entry([1], 1, 0)}, body=1),
    "three offsets": image({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, body=1),
    "shape is text": image({"a": entry("1", 0, 1)}, body=1),
    "overlap": image({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, body=3),
    "hole": image({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, body=3),
    "behind the file": image({"a": entry([9], 0, 9)}, body=3),
    "bytes left over": image({"a": entry([1], 0, 1)}, body=3),
    "metadata is a list": image({"__metadata__": []}),
    "metadata of numbers": image({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_hostile_image_header_is_refused(case: str) -> None:
    data = IMAGES[case]
    with pytest.raises(DamagedError, match="damaged"):
        size = header_nbytes(data[:8], file="x", file_bytes=len(data))
        parse_header(data[:size], file="x", file_bytes=len(data))


def test_a_valid_image_header_is_read() -> None:
    data = image({"__metadata__": {"a": "b"}, "t": entry([2, 0], 0, 0, "F32"), "u": entry([3], 0, 3)}, body=3)
    size = header_nbytes(data[:8], file="x", file_bytes=len(data))
    assert parse_header(data[:size], file="x", file_bytes=len(data)) == {
        "t": ("F32", (2, 0), size, size),
        "u": ("U8", (3,), size, size + 3),
    }


# ----------------------------------------------------------------------------------------------------------------- objects

OBJECTS: dict[str, bytes] = {
    "no JSON": b"{",
    "not UTF-8": b'"\xff"',
    "NaN": b"NaN",
    "infinity by exponent": b"1e999",
    "huge number": b"9" * 100_000,
    "key twice": b'{"a": 1, "a": 2}',
    "deep lists": b"[" * 50_000 + b"]" * 50_000,
    "deep tuples": b'{"$type":"tuple","items":[' * 150 + b"]}" * 150,
    "unknown tag": b'{"$type":"function"}',
    "tag of a class": b'{"$type":"os","system":"x"}',
    "extra field": b'{"$type":"tuple","items":[],"x":1}',
    "array bigger than its bytes": b'{"$type":"numpy-array","dtype":"<f8","shape":[1000000000000],"base64":""}',
    "array of objects": b'{"$type":"numpy-array","dtype":"|O","shape":[1],"base64":"AAAAAAAAAAA="}',
    "negative shape": b'{"$type":"numpy-array","dtype":"<f8","shape":[-1],"base64":""}',
    "dtype bomb": b'{"$type":"numpy-array","dtype":"<U999999999","shape":[1],"base64":""}',
    "int text": b'{"$type":"int","hex":"0x"}',
    "two documents": b"1 2",
    "lone surrogate": b'"\\ud800"',
}


@pytest.mark.parametrize("case", OBJECTS)
def test_a_hostile_object_is_refused(case: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="damaged"):
            decode(OBJECTS[case], name="k")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_step_and_a_missing_run_are_told_apart(files: Files) -> None:
    for there, kind in ((files, "no-checkpoint"), ({}, "no-run")):
        with pytest.raises(NotFoundError) as caught:
            everything(there, step=9)
        assert caught.value.kind == kind


def test_no_damage_of_a_footer_with_statistics_ends_the_process(files: Files) -> None:
    """pyarrow 26 aborts when it is asked for statistics of a damaged footer, so nothing asks; the fuzz test found it."""
    data = parquet(table_of(files, "fragments.parquet"), write_statistics=["tensor"])
    specs = StoredCheckpoint(DictStore(files), 1, OPTIONS).specs
    footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    outcomes = set()
    for at in range(footer, len(data) - 8):
        for value in {0, 3, 36, data[at] ^ 1}:
            hostile = data[:at] + bytes([value]) + data[at + 1 :]
            file = index.VerifiedFile(index.file_record("f", hostile), lambda a, b, d=hostile: d[a:b], name="f")
            try:
                index.unpack_fragments(file, specs, None, 1 << 16, name="f", counts=np.array([1, 1]))
                outcomes.add("read")
            except DamagedError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_tensor_larger_than_all_images_is_refused_before_memory_is_taken(files: Files) -> None:
    rows = table_of(files, "tensors.parquet").to_pylist()
    for length in (1 << 58, 1 << 34):
        huge = {**rows[0], "shape": [length], "nbytes": 4 * length}
        table = pa.Table.from_pylist([huge, rows[1]], schema=table_of(files, "tensors.parquet").schema)
        refused(with_file(files, "tensors.parquet", parquet(table)), "in images of")
        no_fragments = with_file(
            files, "tensors.parquet", parquet(table.set_column(7, "num_fragments", pa.array([0, 1])))
        )
        only = table_of(files, "fragments.parquet").slice(1)
        changed = with_file(no_fragments, "fragments.parquet", parquet(only))
        refused(with_manifest(changed, put("num_fragments", 1)), "in images of")
