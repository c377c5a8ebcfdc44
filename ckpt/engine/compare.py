"""What differs between two stored checkpoints: tensors and objects.

In: two stored checkpoints, of one run or of two. Out: `Difference`. Tensors that are cut alike are compared by their block
checksums, without a read; the others by their values, a bounded piece at a time. Never writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.format.index import FragmentTable
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import Box, BoxTable, boxes_of_flat_range
from ckpt.plan.read import contiguous_strides

PIECE_BYTES = 64 * 1024 * 1024  # of each checkpoint, read and compared at once


@dataclass(frozen=True, kw_only=True)
class Reshaped:
    """A tensor of another dtype or shape."""

    name: str
    before: TensorSpec
    after: TensorSpec


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Names, sorted. `changed`: same dtype and shape, other values."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[Reshaped, ...]
    changed: tuple[str, ...]
    num_same: int
    objects_added: tuple[str, ...]
    objects_removed: tuple[str, ...]
    objects_changed: tuple[str, ...]

    @property
    def any(self) -> bool:
        """True when anything differs."""
        tensors = self.added or self.removed or self.reshaped or self.changed
        return bool(tensors or self.objects_added or self.objects_removed or self.objects_changed)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which tensors can be told apart by checksums, and which have to be read. Made from the two indexes."""

    before: StoredCheckpoint
    after: StoredCheckpoint
    differing: tuple[str, ...]  # by checksums
    to_read: tuple[str, ...]

    @property
    def read_nbytes(self) -> int:
        """Bytes to be read of both checkpoints, without rounding to blocks."""
        wanted = set(self.to_read)
        return 2 * sum(spec.nbytes for spec in self.before.specs if spec.name in wanted)


def plan_comparison(before: StoredCheckpoint, after: StoredCheckpoint) -> Comparison:
    """Compare what the two indexes say; reads no tensor."""
    ids_before = {spec.name: i for i, spec in enumerate(before.specs)}
    ids_after = {spec.name: i for i, spec in enumerate(after.specs)}
    common = [
        name
        for name in sorted(ids_before.keys() & ids_after.keys())
        if _form(before.specs[ids_before[name]]) == _form(after.specs[ids_after[name]])
    ]
    tables = before.fragments(), after.fragments()
    same_blocks = before.manifest.block_bytes == after.manifest.block_bytes
    edges = [
        np.searchsorted(t.boxes.tensor, np.arange(len(s.specs) + 1))
        for t, s in zip(tables, (before, after), strict=True)
    ]
    differing, to_read = [], []
    for name in common:
        rows = [
            slice(int(e[i]), int(e[i + 1])) for e, i in zip(edges, (ids_before[name], ids_after[name]), strict=True)
        ]
        if not same_blocks or not _cut_alike(tables, rows, len(before.specs[ids_before[name]].shape)):
            to_read.append(name)
        elif not np.array_equal(_checksums(tables[0], rows[0]), _checksums(tables[1], rows[1])):
            differing.append(name)
    return Comparison(before=before, after=after, differing=tuple(differing), to_read=tuple(to_read))


def compare(comparison: Comparison, *, progress: Progress | None = None) -> Difference:
    """Read what has to be read, and put everything together."""
    before, after = comparison.before, comparison.after
    specs_before = {spec.name: spec for spec in before.specs}
    specs_after = {spec.name: spec for spec in after.specs}
    common = sorted(specs_before.keys() & specs_after.keys())
    reshaped = [name for name in common if _form(specs_before[name]) != _form(specs_after[name])]
    changed = [*comparison.differing, *(n for n in comparison.to_read if _values_differ(before, after, n, progress))]
    objects_before, objects_after = _payloads(before.objects), _payloads(after.objects)
    both = objects_before.keys() & objects_after.keys()
    return Difference(
        added=tuple(sorted(specs_after.keys() - specs_before.keys())),
        removed=tuple(sorted(specs_before.keys() - specs_after.keys())),
        reshaped=tuple(Reshaped(name=n, before=specs_before[n], after=specs_after[n]) for n in reshaped),
        changed=tuple(sorted(changed)),
        num_same=len(common) - len(reshaped) - len(changed),
        objects_added=tuple(sorted(objects_after.keys() - objects_before.keys())),
        objects_removed=tuple(sorted(objects_before.keys() - objects_after.keys())),
        objects_changed=tuple(sorted(n for n in both if _objects_differ(objects_before[n], objects_after[n]))),
    )


def _form(spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return spec.dtype, spec.shape


def _cut_alike(tables: tuple[FragmentTable, FragmentTable], rows: Sequence[slice], num_dims: int) -> bool:
    (a, b), (i, j) = (table.boxes for table in tables), rows
    pairs = ((a.offsets[i, :num_dims], b.offsets[j, :num_dims]), (a.lengths[i, :num_dims], b.lengths[j, :num_dims]))
    return i.stop - i.start == j.stop - j.start and all(np.array_equal(x, y) for x, y in pairs)


def _checksums(table: FragmentTable, rows: slice) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return table.checksums[int(table.block_starts[rows.start]) : int(table.block_starts[rows.stop])]


def _values_differ(before: StoredCheckpoint, after: StoredCheckpoint, name: str, progress: Progress | None) -> bool:
    spec = next(spec for spec in before.specs if spec.name == name)
    size, step = math.prod(spec.shape), max(1, PIECE_BYTES // spec.itemsize)
    for start in range(0, size, step):
        for box in boxes_of_flat_range(spec.shape, start, min(start + step, size)):
            if _read(before, name, box, progress) != _read(after, name, box, progress):
                return True
    return False


def _read(stored: StoredCheckpoint, name: str, box: Box, progress: Progress | None) -> bytearray:
    number = next(i for i, spec in enumerate(stored.specs) if spec.name == name)
    boxes = BoxTable.build([(number, box)])
    memory = bytearray(box.volume * stored.specs[number].itemsize)
    view = np.frombuffer(memory, np.uint8)
    itemsize = np.array([stored.specs[number].itemsize], np.int64)
    pieces = PieceTable(
        boxes=boxes,
        address=np.array([view.ctypes.data], np.uint64),
        limit=np.array([view.ctypes.data + len(memory)], np.uint64),
        strides=contiguous_strides(boxes.lengths, itemsize),
    )
    stored.read_pieces(pieces)
    if progress is not None:
        progress(len(memory))
    return memory


def _payloads(rows: Sequence[ObjectRow]) -> dict[str, dict[int, str]]:
    """Digest by rank, by name."""
    out: dict[str, dict[int, str]] = {}
    for row in rows:
        out.setdefault(row.name, {})[row.rank] = row.digest
    return out


def _objects_differ(before: dict[int, str], after: dict[int, str]) -> bool:
    """Rank by rank where the ranks are the same, else by what there is of different payloads."""
    if before.keys() == after.keys():
        return before != after
    return set(before.values()) != set(after.values())
