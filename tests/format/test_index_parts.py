"""Goal: a reader gets the fragments of the tensors that it asks for, whatever row groups they lie in, and reads no others.

Method: a table of many tensors in tiny row groups, every set of wanted tensors compared with a filter over the whole table.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.format import index
from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable

BLOCK = 64


def packed(counts: list[int], rows_per_group: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[TensorSpec], bytes]:
    """Tensors of one row per fragment."""
    specs = [TensorSpec(name=f"t{i:04}", role="tensor", dtype="uint8", shape=(n,)) for i, n in enumerate(counts)]
    tensor = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    offsets = np.concatenate([np.arange(n) for n in counts] or [np.empty(0)]).astype(np.int64)[:, None]
    table = index.FragmentTable(
        boxes=BoxTable(tensor=tensor, offsets=offsets, lengths=np.ones_like(offsets)),
        writer=np.zeros(len(tensor), np.int32),
        offsets=np.arange(len(tensor)),
        nbytes=np.ones(len(tensor), np.int64),
        checksums=np.arange(len(tensor), dtype=np.uint32),
        block_starts=np.arange(len(tensor) + 1),
    )
    monkeypatch.setattr(index, "ROW_GROUP_ROWS", rows_per_group)
    return specs, index.pack_fragments(table, np.ones(len(tensor), np.int32))


@given(
    counts=st.lists(st.integers(0, 9), max_size=12),
    rows_per_group=st.integers(1, 12),
    wanted=st.sets(st.integers(0, 11)),
)
def test_wanted_tensors_come_whole_and_alone(counts: list[int], rows_per_group: int, wanted: set[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        specs, data = packed(counts, rows_per_group, patch)
    ids = np.array(sorted(i for i in wanted if i < len(counts)), np.int64)
    for known in (np.array(counts, np.int64), None):
        file = index.VerifiedFile(index.file_record("f", data), lambda a, b: data[a:b], name="f")
        found = index.unpack_fragments(file, specs, ids, BLOCK, name="f", counts=known)
        expected = np.isin(np.repeat(np.arange(len(counts)), counts), ids)
        np.testing.assert_array_equal(found.checksums, np.flatnonzero(expected))


def test_other_row_groups_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [20_000] * 40
    specs, data = packed(counts, 20_000, monkeypatch)
    monkeypatch.setattr(index, "INDEX_BLOCK_BYTES", 4096)
    read: list[int] = []
    file = index.VerifiedFile(index.file_record("f", data), lambda a, b: (read.append(b - a), data[a:b])[1], name="f")
    found = index.unpack_fragments(file, specs, np.array([7]), BLOCK, name="f", counts=np.array(counts))
    assert len(found) == 20_000
    assert sum(read) < len(data) / 5
