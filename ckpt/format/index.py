"""The index of a checkpoint: which tensors there are, and where every fragment of them lies.

In: image tables and checksums of all writers. Out: three Parquet files in memory; and back: columns of the rows that are
wanted. Pure: bytes come through a `read(start, stop)` callable. The columns are described in docs/reference/format.md.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ckpt.config import INDEX_ROWS_MAX, ROW_GROUP_ROWS_MAX, TENSOR_BYTES_MAX, TENSOR_DIMS_MAX
from ckpt.errors import CheckpointError, DamagedError
from ckpt.format.checksum import DIGEST_BYTES, num_blocks, sha256
from ckpt.format.manifest import FileRecord
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import OBJECT_KINDS, TensorSpec, global_shapes
from ckpt.kernels import crc32c_ranges
from ckpt.layout.box import BoxTable, Int64Array

TENSORS_FILE = "tensors.parquet"
FRAGMENTS_FILE = "fragments.parquet"
OBJECTS_FILE = "objects.parquet"
INDEX_BLOCK_BYTES = 1 << 18
ROW_GROUP_ROWS = ROW_GROUP_ROWS_MAX
PARTIAL_BYTES_MIN = 1 << 21  # a smaller index file is read whole


@dataclass(frozen=True, kw_only=True)
class FragmentTable:
    """Fragments of a checkpoint, sorted by tensor and then by row-major position. `boxes.tensor` is the tensor's id."""

    boxes: BoxTable
    writer: NDArray[np.int32]  # [N] number of the image that holds it: of the writers, then of the references
    offsets: Int64Array  # [N] bytes from the start of that file
    nbytes: Int64Array  # [N]
    checksums: NDArray[
        np.uint32
    ]  # per block, fragment after fragment; none at all: the files are not ckpt's and have none
    block_starts: Int64Array  # [N + 1] first block of each fragment
    digests: NDArray[np.uint8] | None = None  # [N, 32] SHA-256 of each; None: not stored, or not asked for

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def are_checked(self) -> bool:
        """Whether there are checksums."""
        return len(self.checksums) > 0

    def of_tensors(self, tensors: NDArray[np.integer]) -> FragmentTable:
        """The fragments of some tensors, in the same order."""
        rows = np.flatnonzero(np.isin(self.boxes.tensor, tensors))
        counts = np.diff(self.block_starts)[rows]
        ends = np.cumsum(counts)
        within = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        return FragmentTable(
            boxes=self.boxes.take(rows),
            writer=self.writer[rows],
            offsets=self.offsets[rows],
            nbytes=self.nbytes[rows],
            checksums=self.checksums[np.repeat(self.block_starts[:-1][rows], counts) + within],
            block_starts=np.append(0, ends),
            digests=None if self.digests is None else self.digests[rows],
        )


def pack_tensors(specs: Sequence[TensorSpec], num_fragments: Int64Array) -> bytes:
    """tensors.parquet: one row per tensor; its id is its row number."""
    columns: dict[str, Any] = {
        "id": range(len(specs)),
        "name": [spec.name for spec in specs],
        "role": [spec.role for spec in specs],
        "dtype": [spec.dtype for spec in specs],
        "shape": [list(spec.shape) for spec in specs],
        "aliases": [list(spec.aliases) for spec in specs],
        "nbytes": [spec.nbytes for spec in specs],
        "num_fragments": num_fragments,
    }
    table = pa.table({name: pa.array(column, _TENSOR_FIELDS[name]) for name, column in columns.items()})
    return _write(table, ROW_GROUP_ROWS, use_dictionary=["role", "dtype"], column_encoding=None)


def pack_objects(rows: Sequence[ObjectRow]) -> bytes:
    """objects.parquet: one row per object and rank."""
    columns = {name: [getattr(row, name) for row in rows] for name in _OBJECT_FIELDS}
    schema = pa.schema([(name, kind) for name, kind in _OBJECT_FIELDS.items()])
    return _write(pa.table(columns, schema=schema), ROW_GROUP_ROWS, use_dictionary=True, column_encoding=None)


# Columns that a reader must find, of exactly these types; others may stand beside them.
_TENSOR_FIELDS: dict[str, pa.DataType] = {
    "id": pa.int32(),
    "name": pa.string(),
    "role": pa.string(),
    "dtype": pa.string(),
    "shape": pa.list_(pa.int64()),
    "aliases": pa.list_(pa.string()),
    "nbytes": pa.int64(),
    "num_fragments": pa.int64(),
}
_FRAGMENT_FIELDS: dict[str, pa.DataType] = {
    "tensor": pa.int32(),
    "offsets": pa.list_(pa.int64()),
    "lengths": pa.list_(pa.int64()),
    "writer": pa.int32(),
    "byte_offset": pa.int64(),
    "nbytes": pa.int64(),
    "checksums": pa.list_(pa.uint32()),
}
_DIGEST = pa.binary(DIGEST_BYTES)  # of the optional column `sha256`
_OBJECT_FIELDS: dict[str, pa.DataType] = {
    "name": pa.string(),
    "kind": pa.string(),
    "rank": pa.int32(),
    "writer": pa.int32(),
    "dp_rank": pa.int32(),
    "dp_size": pa.int32(),
    "digest": pa.string(),
    "byte_offset": pa.int64(),
    "nbytes": pa.int64(),
}


def pack_fragments(fragments: FragmentTable, num_dims: NDArray[np.int32]) -> bytes:
    """fragments.parquet: one row per fragment.

    Args:
        num_dims: [N] dims of each fragment's tensor (columns of padded dims are not stored).
    """
    dims = np.arange(fragments.boxes.num_dims)[None, :] < num_dims[:, None]
    columns: dict[str, Any] = {
        "tensor": pa.array(fragments.boxes.tensor, pa.int32()),
        "offsets": _lists(fragments.boxes.offsets[dims], num_dims, pa.int64()),
        "lengths": _lists(fragments.boxes.lengths[dims], num_dims, pa.int64()),
        "writer": pa.array(fragments.writer, pa.int32()),
        "byte_offset": pa.array(fragments.offsets, pa.int64()),
        "nbytes": pa.array(fragments.nbytes, pa.int64()),
        "checksums": _lists(fragments.checksums, np.diff(fragments.block_starts), pa.uint32()),
    }
    if fragments.digests is not None:
        digests = np.ascontiguousarray(fragments.digests)
        columns["sha256"] = pa.FixedSizeBinaryArray.from_buffers(
            _DIGEST, len(digests), [None, pa.py_buffer(digests.tobytes())]
        )
    table = pa.table(columns)
    # Delta encoding makes the regular columns of an even layout nearly free; checksums are noise and stored plain.
    encoding = {"tensor": "DELTA_BINARY_PACKED", "writer": "DELTA_BINARY_PACKED", "byte_offset": "DELTA_BINARY_PACKED"}
    encoding |= {"checksums.list.element": "PLAIN"}
    return _write(
        table,
        ROW_GROUP_ROWS,
        use_dictionary=["offsets.list.element", "lengths.list.element", "nbytes"],
        column_encoding=encoding,
    )


def _lists(values: Any, counts: Any, kind: Any) -> pa.ListArray:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def _write(table: pa.Table, row_group_rows: int, *, use_dictionary: Any, column_encoding: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        compression_level=3,
        use_dictionary=use_dictionary,
        column_encoding=column_encoding,
        write_statistics=False,  # num_fragments says more, and is read first
        store_schema=False,
    )
    return sink.getvalue()


def file_record(name: str, data: bytes) -> FileRecord:
    """How the manifest names a file of the index."""
    starts = np.arange(0, len(data), INDEX_BLOCK_BYTES)
    stops = np.minimum(starts + INDEX_BLOCK_BYTES, len(data))
    return FileRecord(
        file=name,
        nbytes=len(data),
        digest=sha256(data),
        block_bytes=INDEX_BLOCK_BYTES,
        crc32c=crc32c_ranges(data, starts, stops).tolist(),
    )


class VerifiedFile(io.RawIOBase):
    """A read-only file over `read(start, stop)` that checks every block against the manifest before it is used.

    One owner thread. Reads whole blocks of the record; keeps the blocks it read.
    """

    def __init__(self, record: FileRecord, read: Callable[[int, int], bytes], *, name: str) -> None:
        super().__init__()
        self._record, self._read, self._name = record, read, name
        self._blocks: dict[int, bytes] = {}
        self._position = 0
        self.read_nbytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._record.nbytes)[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        start = self._position
        stop = min(start + len(view), self._record.nbytes)
        if stop <= start:
            return 0
        size = self._record.block_bytes
        self._fetch(start // size, (stop - 1) // size)
        data = b"".join(self._blocks[block] for block in range(start // size, (stop - 1) // size + 1))
        view[: stop - start] = data[start % size : start % size + stop - start]
        self._position = stop
        return stop - start

    def _fetch(self, first: int, last: int) -> None:
        missing = [block for block in range(first, last + 1) if block not in self._blocks]
        if not missing:
            return
        size, total = self._record.block_bytes, self._record.nbytes
        low, high = missing[0] * size, min((missing[-1] + 1) * size, total)
        data = self._read(low, high)
        self.read_nbytes += high - low
        starts = np.arange(0, len(data), size)
        found = crc32c_ranges(data, starts, np.minimum(starts + size, len(data)))
        for block, start, crc in zip(range(missing[0], missing[-1] + 1), starts.tolist(), found.tolist(), strict=True):
            if block >= len(self._record.crc32c) or crc != self._record.crc32c[block]:
                expected = self._record.crc32c[block] if block < len(self._record.crc32c) else 0
                raise DamagedError(
                    f"block {block} of `{self._name}` is damaged: expected crc32c {expected:08x}, found {crc:08x}"
                )
            self._blocks[block] = data[start : start + size]


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """What Arrow says of bytes that it cannot read, as DamagedError. Errors of the store pass."""
    try:
        yield
    except CheckpointError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DamagedError(f"`{name}` is damaged: {str(error)[:500]}") from error


def _open(file: VerifiedFile, fields: Mapping[str, pa.DataType], num_rows: int | None, name: str) -> pq.ParquetFile:
    """The file, once its schema and sizes are known to be sane: a hostile footer must not choose how much is allocated."""
    with _damage(name):
        # Without read-ahead: its threads would call into `file`, and made a small index cost 3 ms instead of 0.3.
        parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        for field, kind in fields.items():
            found = schema.get_all_field_indices(field)
            if len(found) != 1 or not _same_type(schema.field(found[0]).type, kind):
                raise ValueError(f"it must have one column `{field}` of type {kind}")
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        expected = metadata.num_rows if num_rows is None else num_rows
        if not sum(groups) == metadata.num_rows == expected:
            raise ValueError(f"it has {metadata.num_rows} rows, expected {expected}")
        if expected > INDEX_ROWS_MAX:
            raise ValueError(f"it has {expected} rows, more than {INDEX_ROWS_MAX}")
        if any(not 0 <= rows <= ROW_GROUP_ROWS_MAX for rows in groups):
            raise ValueError(f"a row group has more than {ROW_GROUP_ROWS_MAX} rows")
        return parquet


def _same_type(found: pa.DataType, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):  # whatever the element is called
        return bool(pa.types.is_list(found) and found.value_type == kind.value_type)
    return bool(found == kind)


def _read(parquet: pq.ParquetFile, groups: Sequence[int], fields: Mapping[str, pa.DataType], name: str) -> pa.Table:
    """The columns of some row groups, each in one piece and without nulls."""
    with _damage(name):
        table = parquet.read_row_groups(list(groups), columns=list(fields), use_threads=False)
        table = table.select(list(fields)).combine_chunks()
        for field in fields:
            for chunk in table[field].chunks:
                if chunk.null_count or (pa.types.is_list(chunk.type) and chunk.flatten().null_count):
                    raise ValueError(f"column `{field}` has nulls")
        return table


def unpack_tensors(
    file: VerifiedFile, *, name: str, num_rows: int | None = None
) -> tuple[list[TensorSpec], Int64Array]:
    """All tensors by id, and [T] how many fragments each has. `num_rows` is what the manifest says."""
    parquet = _open(file, _TENSOR_FIELDS, num_rows, name)
    table = _read(parquet, range(parquet.num_row_groups), _TENSOR_FIELDS, name)
    with _damage(name):
        columns = [_values(table[key]) for key in ("name", "role", "dtype", "shape", "aliases")]
        sizes = _values(table["nbytes"])
    try:
        specs = [
            TensorSpec(name=n, role=r, dtype=d, shape=_checked_shape(s), aliases=tuple(a))
            for n, r, d, s, a in zip(*columns, strict=True)
        ]
    except CheckpointError as error:
        raise DamagedError(f"`{name}` is damaged: {error.message}") from error
    names = [spec.name for spec in specs]
    if names != sorted(set(names)) or _values(table["id"]) != list(range(len(specs))):
        raise DamagedError(
            f"`{name}` is damaged: its names are not sorted and distinct, or its ids are not their places"
        )
    if [spec.nbytes for spec in specs] != sizes or sum(sizes) >= TENSOR_BYTES_MAX:
        raise DamagedError(f"`{name}` is damaged: the sizes of its tensors are not those of their shapes, or cannot be")
    counts: Int64Array = table["num_fragments"].to_numpy()
    if ((counts < 0) | (counts > INDEX_ROWS_MAX)).any():
        raise DamagedError(
            f"`{name}` is damaged: a tensor cannot have {int(counts.max())} or {int(counts.min())} fragments"
        )
    return specs, counts


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column without nulls as Python values, through NumPy: `to_pylist` makes an Arrow object of each one first."""
    out: list[Any] = []
    for chunk in column.chunks:
        if not pa.types.is_list(chunk.type):
            out += chunk.to_numpy(zero_copy_only=False).tolist()
            continue
        flat = chunk.flatten().to_numpy(zero_copy_only=False).tolist()
        edges = chunk.offsets.to_numpy().astype(np.int64)
        edges = (edges - edges[:1]).tolist()
        out += [flat[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    return out


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    volume = 1
    for length in shape:
        volume *= max(length, 1)
        if length < 0 or volume >= TENSOR_BYTES_MAX or len(shape) > TENSOR_DIMS_MAX:
            raise DamagedError(f"a tensor of shape {str(shape)[:200]} cannot be")
    return tuple(shape)


def unpack_objects(file: VerifiedFile, *, name: str) -> list[ObjectRow]:
    """All object rows, sorted by name and rank."""
    parquet = _open(file, _OBJECT_FIELDS, None, name)
    table = _read(parquet, range(parquet.num_row_groups), _OBJECT_FIELDS, name)
    with _damage(name):
        rows = [ObjectRow(**row) for row in table.to_pylist()]
    keys = [(row.name, row.rank) for row in rows]
    if keys != sorted(set(keys)):
        raise DamagedError(f"`{name}` is damaged: its rows are not sorted by name and rank, or one stands twice")
    odd = [row for row in rows if row.kind not in OBJECT_KINDS]
    if odd:
        raise DamagedError(
            f"`{name}` is damaged: object `{odd[0].name[:200]}` is of kind `{odd[0].kind[:80]}`, which is none"
        )
    return rows


def unpack_fragments(
    file: VerifiedFile,
    specs: Sequence[TensorSpec],
    wanted: NDArray[np.integer] | None,
    block_bytes: int,
    *,
    name: str,
    counts: Int64Array | None = None,
    digests: bool = False,
) -> FragmentTable:
    """Fragments of the wanted tensors (ids; None: all), checked against the shapes of their tensors.

    Args:
        counts: [T] fragments of each tensor, as `unpack_tensors` gives them. Rows are sorted by tensor, so these say which row
            groups hold a wanted one, and only they are read; without them all are. (Not the statistics of Parquet: pyarrow
            ends the process over some that are damaged.)
        digests: also read the SHA-256 of each fragment, where they are stored.
    """
    keep = np.ones(len(specs), bool)
    if wanted is not None:
        keep[:] = False
        keep[wanted] = True
    parquet = _open(file, _FRAGMENT_FIELDS, None if counts is None else int(counts.sum()), name)
    groups = list(range(parquet.num_row_groups)) if counts is None else _row_groups(parquet, keep, counts)
    fields = _FRAGMENT_FIELDS | ({"sha256": _DIGEST} if digests and _has_digests(parquet) else {})
    table = _read(parquet, groups, fields, name)
    tensor = table["tensor"].to_numpy().astype(np.int32)
    if len(tensor) and (tensor.min() < 0 or tensor.max() >= len(specs) or (np.diff(tensor) < 0).any()):
        raise DamagedError(f"`{name}` is damaged: its rows are not sorted by tensor or name tensors that are not there")
    if counts is not None and (np.bincount(tensor, minlength=len(specs)) != counts)[keep].any():
        raise DamagedError(f"`{name}` is damaged: a tensor has another number of fragments than `{TENSORS_FILE}` says")
    table = table.filter(pa.array(keep[tensor])).combine_chunks() if wanted is not None else table
    return _fragments(table, specs, block_bytes, name)


def _has_digests(parquet: pq.ParquetFile) -> bool:
    """Whether the optional column is there, once and of its type."""
    schema = parquet.schema_arrow
    found = schema.get_all_field_indices("sha256")
    return len(found) == 1 and bool(schema.field(found[0]).type == _DIGEST)


def _digests(column: pa.Array) -> NDArray[np.uint8]:
    """[N, 32] out of a column without nulls."""
    out = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    first = column.offset * DIGEST_BYTES
    return out[first : first + len(column) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)


def _row_groups(parquet: pq.ParquetFile, keep: NDArray[np.bool_], counts: Int64Array) -> list[int]:
    """Row groups that hold a row of a tensor to keep."""
    rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    stops = np.cumsum(np.array(rows, np.int64))
    starts = np.append(0, np.cumsum(counts))  # first row of each tensor, and the end
    wanted = np.append(0, np.cumsum(np.where(keep, counts, 0)))  # rows to keep before that
    tensor = np.searchsorted(starts[1:], stops, "right")  # in which tensor each row group ends
    inside = np.where(np.append(keep, False)[tensor], stops - starts[tensor], 0)
    before = np.append(0, wanted[tensor] + inside)
    return [int(group) for group in np.flatnonzero(before[1:] > before[:-1])]


def _fragments(table: pa.Table, specs: Sequence[TensorSpec], block_bytes: int, name: str) -> FragmentTable:
    def column(key: str) -> Any:
        chunks = table[key].chunks
        return chunks[0] if chunks else pa.array([], table.schema.field(key).type)

    tensor = column("tensor").to_numpy(zero_copy_only=False).astype(np.int32)
    dims = np.array([len(spec.shape) for spec in specs], np.int64)
    shapes = global_shapes(specs, max(1, int(dims.max(initial=1))))
    offsets = _dense(column("offsets"), dims[tensor], shapes.shape[1], 0, name)
    lengths = _dense(column("lengths"), dims[tensor], shapes.shape[1], 1, name)
    checksums = column("checksums")
    block_starts = checksums.offsets.to_numpy().astype(np.int64)
    nbytes = column("nbytes").to_numpy(zero_copy_only=False)
    boxes = BoxTable(tensor=tensor, offsets=offsets, lengths=lengths)
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    inside = (offsets >= 0) & (lengths > 0) & (lengths <= shapes[tensor]) & (offsets <= shapes[tensor] - lengths)
    ok = inside.all(axis=1) & (boxes.volumes() * itemsizes[tensor] == nbytes) & (column("byte_offset").to_numpy() >= 0)
    ok &= np.diff(block_starts) == num_blocks(nbytes, block_bytes)
    if not ok.all():
        row = int(np.argmin(ok))
        raise DamagedError(
            f"`{name}` is damaged: a fragment of `{specs[tensor[row]].name}` lies outside its tensor or file"
        )
    return FragmentTable(
        boxes=boxes,
        writer=column("writer").to_numpy(zero_copy_only=False).astype(np.int32),
        offsets=column("byte_offset").to_numpy(zero_copy_only=False),
        nbytes=nbytes,
        checksums=checksums.flatten().to_numpy(zero_copy_only=False),
        block_starts=block_starts - (block_starts[0] if len(block_starts) else 0),
        digests=_digests(column("sha256")) if "sha256" in table.column_names else None,
    )


def _dense(lists: pa.ListArray, dims: Int64Array, num_dims: int, fill: int, name: str) -> Int64Array:
    counts = np.diff(lists.offsets.to_numpy())
    if not np.array_equal(counts, dims):
        raise DamagedError(f"`{name}` is damaged: a fragment has another number of dims than its tensor")
    out = np.full((len(counts), num_dims), fill, np.int64)
    out[np.arange(num_dims)[None, :] < counts[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return out
