"""Goal: whatever bytes and values stand in an index, a read ends in data that the index proves, or in a refusal.

Method: hypothesis changes bytes of the Parquet files, and values of their columns, and makes all digests right again, so that
the parsers themselves are exercised. Data that come back must be the saved ones: checksums stay those of the saved bytes.
"""

from __future__ import annotations

import io
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corrupt.damaged_copies import REFUSALS, Files, everything, parts_of, saved, with_file, with_manifest

STATE = {"m": {"a": torch.arange(8.0), "b": torch.arange(6, dtype=torch.int16).reshape(2, 3)}, "k": {"lr": 0.5}}
NAMES = ["tensors.parquet", "fragments.parquet", "objects.parquet"]
EXAMPLES = int(os.environ.get("CKPT_TEST_FUZZ_EXAMPLES", "120"))  # a longer run is a matter of one variable


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return saved(tmp_path_factory.mktemp("fuzz"), STATE)


def read(files: Files) -> dict[str, Any] | None:
    """What a reader gets; None for a refusal. Anything else that is raised fails the test."""
    try:
        return everything(files)
    except REFUSALS:
        return None


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_changed_bytes_of_an_index_file_never_crash_a_read(files: Files, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    body = bytearray(files[f"{parts_of(files)[1]}/{name}"])
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        body[at] = value
    read(with_file(files, name, bytes(body)))


NUMBERS = st.one_of(st.integers(-2, 10), st.sampled_from([2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 4096, 4128]))


def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_list(kind):
        return st.lists(values_of(kind.value_type), max_size=3)
    if pa.types.is_string(kind):
        return st.sampled_from(["", "m/a", "m/b", "k", "float32", "bool", "complex128", "../x", "replicated", "rank"])
    low, high = (
        (0, 2**32 - 1)
        if kind == pa.uint32()
        else (-(2**31), 2**31 - 1)
        if kind == pa.int32()
        else (-(2**63), 2**63 - 1)
    )
    return NUMBERS.filter(lambda number: low <= number <= high)


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_changed_values_of_an_index_give_the_saved_data_or_a_refusal(files: Files, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    table = pq.ParquetFile(io.BytesIO(files[f"{parts_of(files)[1]}/{name}"])).read()
    rows = table.to_pylist()
    for _ in range(data.draw(st.integers(1, 3))):
        column = data.draw(st.sampled_from([c for c in table.column_names if c not in ("checksums", "digest")]))
        row = data.draw(st.sampled_from(rows))
        row[column] = data.draw(values_of(table.schema.field(column).type))
    rows = data.draw(st.permutations(rows)) if data.draw(st.booleans()) else rows
    rows = rows[: data.draw(st.integers(0, len(rows)))] if data.draw(st.booleans()) else rows
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink, store_schema=False)
    changed = with_file(files, name, sink.getvalue())
    key = {"tensors.parquet": "num_tensors", "fragments.parquet": "num_fragments"}.get(name)
    if key is not None:
        changed = with_manifest(changed, lambda document: document.update({key: len(rows)}))
    found, expected = read(changed), everything(files)
    if found is not None:
        tensors = {bytes_ for value in expected.values() if isinstance(value, tuple) for bytes_ in value[1:]}
        assert all(value[1] in tensors for value in found.values() if isinstance(value, tuple))
