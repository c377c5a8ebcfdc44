"""The index of a checkpoint: which tensors there are, and where every fragment of them lies.

In: image tables and checksums of all writers. Out: three Parquet files in memory; and back: columns of the rows that are
wanted. Pure: bytes come through a `read(start, stop)` callable. The columns are described in docs/reference/format.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ckpt.config import TENSOR_DIMS_MAX
from ckpt.errors import CheckpointError, DamagedError
from ckpt.format.checksum import num_blocks, sha256
from ckpt.format.manifest import FileRecord
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import TensorSpec, global_shapes
from ckpt.kernels import crc32c_ranges
from ckpt.layout.box import BoxTable, Int64Array

TENSORS_FILE = "tensors.parquet"
FRAGMENTS_FILE = "fragments.parquet"
OBJECTS_FILE = "objects.parquet"
INDEX_BLOCK_BYTES = 1 << 18
ROW_GROUP_ROWS = 1 << 16
PARTIAL_BYTES_MIN = 1 << 21  # a smaller index file is read whole


@dataclass(frozen=True, kw_only=True)
class FragmentTable:
    """Fragments of a checkpoint, sorted by tensor and then by row-major position. `boxes.tensor` is the tensor's id."""

    boxes: BoxTable
    writer: NDArray[np.int32]  # [N] rank whose image holds the fragment
    offsets: Int64Array  # [N] bytes from the start of that file
    nbytes: Int64Array  # [N]
    checksums: NDArray[np.uint32]  # per block, fragment after fragment
    block_starts: Int64Array  # [N + 1] first block of each fragment

    def __len__(self) -> int:
        return len(self.boxes)


def pack_tensors(specs: Sequence[TensorSpec], num_fragments: Int64Array) -> bytes:
    """tensors.parquet: one row per tensor; its id is its row number."""
    names = [spec.name for spec in specs]
    table = pa.table(
        {
            "id": pa.array(range(len(specs)), pa.int32()),
            "name": pa.array(names, pa.string()),
            "role": pa.array([spec.role for spec in specs], pa.string()),
            "dtype": pa.array([spec.dtype for spec in specs], pa.string()),
            "shape": pa.array([list(spec.shape) for spec in specs], pa.list_(pa.int64())),
            "aliases": pa.array([list(spec.aliases) for spec in specs], pa.list_(pa.string())),
            "nbytes": pa.array([spec.nbytes for spec in specs], pa.int64()),
            "num_fragments": pa.array(num_fragments, pa.int64()),
        }
    )
    return _write(table, ROW_GROUP_ROWS, use_dictionary=["role", "dtype"], column_encoding=None)


def pack_objects(rows: Sequence[ObjectRow]) -> bytes:
    """objects.parquet: one row per object and rank."""
    columns = {name: [getattr(row, name) for row in rows] for name in _OBJECT_FIELDS}
    schema = pa.schema([(name, kind) for name, kind in _OBJECT_FIELDS.items()])
    return _write(pa.table(columns, schema=schema), ROW_GROUP_ROWS, use_dictionary=True, column_encoding=None)


_OBJECT_FIELDS = {
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
    table = pa.table(
        {
            "tensor": pa.array(fragments.boxes.tensor, pa.int32()),
            "offsets": _lists(fragments.boxes.offsets[dims], num_dims, pa.int64()),
            "lengths": _lists(fragments.boxes.lengths[dims], num_dims, pa.int64()),
            "writer": pa.array(fragments.writer, pa.int32()),
            "byte_offset": pa.array(fragments.offsets, pa.int64()),
            "nbytes": pa.array(fragments.nbytes, pa.int64()),
            "checksums": _lists(fragments.checksums, np.diff(fragments.block_starts), pa.uint32()),
        }
    )
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
        write_statistics=["tensor"] if "tensor" in table.column_names else False,
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


def _open(file: VerifiedFile, name: str) -> pq.ParquetFile:
    try:
        # Without read-ahead: its threads would call into `file`, and made a small index cost 3 ms instead of 0.3.
        return pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False)
    except CheckpointError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"`{name}` is damaged: not a Parquet file ({error})") from error


def unpack_tensors(file: VerifiedFile, *, name: str) -> tuple[list[TensorSpec], Int64Array]:
    """All tensors by id, and [T] how many fragments each has."""
    table = _open(file, name).read(use_threads=False)
    columns = {key: table[key].to_pylist() for key in ("name", "role", "dtype", "shape", "aliases")}
    try:
        specs = [
            TensorSpec(name=n, role=r, dtype=d, shape=_checked_shape(s), aliases=tuple(a))
            for n, r, d, s, a in zip(*columns.values(), strict=True)
        ]
    except CheckpointError as error:
        raise DamagedError(f"`{name}` is damaged: {error.message}") from error
    names = [spec.name for spec in specs]
    if names != sorted(set(names)):
        raise DamagedError(f"`{name}` is damaged: its names are not sorted and distinct")
    return specs, table["num_fragments"].to_numpy()


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    volume = 1
    for length in shape:
        volume *= max(length, 1)
        if length < 0 or volume >= 2**62 or len(shape) > TENSOR_DIMS_MAX:
            raise DamagedError(f"a tensor of shape {shape} cannot be")
    return tuple(shape)


def unpack_objects(file: VerifiedFile, *, name: str) -> list[ObjectRow]:
    """All object rows."""
    table = _open(file, name).read(use_threads=False)
    absent = [column for column in _OBJECT_FIELDS if column not in table.column_names]
    if absent:
        raise DamagedError(f"`{name}` is damaged: it has no column `{absent[0]}`")
    return [ObjectRow(**row) for row in table.select(list(_OBJECT_FIELDS)).to_pylist()]


def unpack_fragments(
    file: VerifiedFile,
    specs: Sequence[TensorSpec],
    wanted: NDArray[np.integer] | None,
    block_bytes: int,
    *,
    name: str,
) -> FragmentTable:
    """Fragments of the wanted tensors (ids; None: all), checked against the shapes of their tensors.

    Reads only the row groups that hold a wanted tensor.
    """
    parquet = _open(file, name)
    keep = np.ones(len(specs), bool)
    if wanted is not None:
        keep[:] = False
        keep[wanted] = True
    groups = _row_groups(parquet, keep)
    try:
        table = parquet.read_row_groups(groups, use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"`{name}` is damaged: {error}") from error
    tensor = table["tensor"].to_numpy().astype(np.int32)
    if len(tensor) and (tensor.min() < 0 or tensor.max() >= len(specs) or (np.diff(tensor) < 0).any()):
        raise DamagedError(f"`{name}` is damaged: its rows are not sorted by tensor or name tensors that are not there")
    table = table.filter(pa.array(keep[tensor])).combine_chunks() if wanted is not None else table
    return _fragments(table, specs, block_bytes, name)


def _row_groups(parquet: pq.ParquetFile, keep: NDArray[np.bool_]) -> list[int]:
    groups = []
    column = parquet.schema_arrow.get_field_index("tensor")
    before = np.append(0, np.cumsum(keep))
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(column).statistics
        low, high = (0, len(keep) - 1) if statistics is None else (statistics.min, statistics.max)
        if before[min(high, len(keep) - 1) + 1] > before[max(low, 0)]:
            groups.append(group)
    return groups


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
    )


def _dense(lists: pa.ListArray, dims: Int64Array, num_dims: int, fill: int, name: str) -> Int64Array:
    counts = np.diff(lists.offsets.to_numpy())
    if not np.array_equal(counts, dims):
        raise DamagedError(f"`{name}` is damaged: a fragment has another number of dims than its tensor")
    out = np.full((len(counts), num_dims), fill, np.int64)
    out[np.arange(num_dims)[None, :] < counts[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return out
