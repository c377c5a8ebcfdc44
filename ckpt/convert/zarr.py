"""Any checkpoint as a read-only Zarr v3 hierarchy.

In: a stored checkpoint. Out: `CheckpointZarr`, a `zarr.abc.store.Store`: metadata documents made from the index, and chunks read
out of the fragments when they are asked for. Needs no process group and no model. Never writes, copies or converts anything.

A tensor is an array at the path of its name (`/` makes groups, dots stay). Fragments are irregular, so the array gets a regular
grid of its own: blocks of whole rows of about `chunk_bytes`. A chunk is that box of the tensor, read and verified like any other
read, whatever fragments it lies in. docs/reference/format.md ("As Zarr") says what the attributes mean.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ckpt import config
from ckpt.config import MIB, Options
from ckpt.engine.read import run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import dtype_of
from ckpt.format.index import PARTIAL_BYTES_MIN, FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import BoxTable
from ckpt.store.open import open_store

CHUNK_BYTES = MIB
_DOCUMENT = "zarr.json"
# Zarr has no name for these dtypes: their bits are shown as unsigned integers, and `ckpt_dtype` says what they are.
_BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def zarr_store(
    url: str | os.PathLike[str],
    *,
    step: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    options: Options | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointZarr:
    """Checkpoint `step` of the run at `url` as a read-only Zarr store: `zarr.open_group(store=..., mode="r")`.

    Args:
        step: the newest complete one when None.
        chunk_bytes: about how large a chunk is. The smallest read is one chunk, rounded to checksum blocks.

    Raises NotFoundError for no such run or checkpoint; DamagedError later, when a chunk that is read is damaged.
    """
    if chunk_bytes < 1:
        raise InvalidInputError(f"chunk_bytes must be positive, found {chunk_bytes}")
    chosen = config.from_environment(options)
    store = open_store(url, options=chosen, storage_options=storage_options)
    return CheckpointZarr(StoredCheckpoint(store, "latest" if step is None else step, chosen), chunk_bytes=chunk_bytes)


class CheckpointZarr(Store):
    """The Zarr view of one checkpoint. Any thread may read. Made by `zarr_store`."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, stored: StoredCheckpoint, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(read_only=True)
        self._stored, self._chunk_bytes = stored, chunk_bytes
        self._arrays = dict(
            zip(array_paths([spec.name for spec in stored.specs]), range(len(stored.specs)), strict=True)
        )
        self._children = _children(self._arrays)
        self._fragments = _Fragments(stored)

    @property
    def supports_consolidated_metadata(self) -> bool:
        """False: the documents are made when they are asked for, so there is nothing to gather."""
        return False

    def with_read_only(self, read_only: bool = False) -> CheckpointZarr:
        """Itself once more; a checkpoint cannot be opened for writing."""
        if not read_only:
            raise ValueError("a checkpoint is read-only")
        return CheckpointZarr(self._stored, chunk_bytes=self._chunk_bytes)

    def __eq__(self, value: object) -> bool:
        return isinstance(value, CheckpointZarr) and self._identity() == value._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __str__(self) -> str:
        return f"ckpt+{self._stored.store.url}@{self._stored.step}"

    def __repr__(self) -> str:
        return f"CheckpointZarr('{self}')"

    def _identity(self) -> tuple[str, int, str, int]:
        return self._stored.store.url, self._stored.step, self._stored.manifest.attempt, self._chunk_bytes

    def close(self) -> None:
        """Let go of the store below."""
        self._stored.store.close()
        super().close()

    # ----------------------------------------------------------------------------------------------------------- reading

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        # In a thread: a read waits for the store, and zarr asks for many chunks at once on one event loop.
        data = await asyncio.to_thread(self._read, key)
        if data is None:
            return None
        start, stop = _range_of(byte_range, len(data))
        return prototype.buffer.from_bytes(data[start:stop])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        path, name = _split(key)
        return (name == _DOCUMENT and (path in self._children or path in self._arrays)) or self._chunk(key) is not None

    async def getsize(self, key: str) -> int:
        chunk = self._chunk(key)
        if chunk is not None:
            spec = self._stored.specs[chunk[0]]
            return math.prod(chunk_shape(spec, self._chunk_bytes)) * spec.itemsize
        return await super().getsize(key)

    def _read(self, key: str) -> bytes | None:
        path, name = _split(key)
        if name == _DOCUMENT:
            if path in self._arrays:
                return _json(self._array_document(self._arrays[path]))
            return _json(self._group_document(path)) if path in self._children else None
        chunk = self._chunk(key)
        return None if chunk is None else self._read_chunk(*chunk)

    def _group_document(self, path: str) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        if not path:
            found = self._stored.manifest
            attributes = {"step": found.step, "metrics": found.metrics, "metadata": found.metadata}
            attributes |= {"created": found.created, "program": found.program}
        return {"zarr_format": 3, "node_type": "group", "attributes": attributes}

    def _array_document(self, tensor: int) -> dict[str, Any]:
        spec = self._stored.specs[tensor]
        dtype, fill = shown_dtype(spec.dtype)
        codec: dict[str, Any] = {"name": "bytes"}
        if spec.itemsize > 1:
            codec["configuration"] = {"endian": "little"}
        grid = {"chunk_shape": list(chunk_shape(spec, self._chunk_bytes))}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(spec.shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": [codec],
            "attributes": {
                "ckpt_name": spec.name,
                "ckpt_dtype": spec.dtype,
                "role": spec.role,
                "aliases": list(spec.aliases),
            },
        }

    def _chunk(self, key: str) -> tuple[int, tuple[int, ...]] | None:
        """Tensor and chunk coordinates that a key names; None for a key that names no chunk."""
        parts = key.split("/")
        for num_dims in range(len(parts)):  # .../c/<i>/<j>: the `c` is as far from the end as the tensor has dims
            path = "/".join(parts[: len(parts) - num_dims - 1])
            tensor = self._arrays.get(path)
            if parts[len(parts) - num_dims - 1] != "c" or tensor is None:
                continue
            spec = self._stored.specs[tensor]
            numbers = parts[len(parts) - num_dims :]
            if len(spec.shape) == num_dims and all(_is_number(text) for text in numbers):
                where = tuple(map(int, numbers))
                grid = _grid(spec, self._chunk_bytes)
                return (tensor, where) if all(i < n for i, n in zip(where, grid, strict=True)) else None
        return None

    def _read_chunk(self, tensor: int, where: tuple[int, ...]) -> bytes:
        """The bytes of one chunk; what lies outside the tensor is zero, which is the fill value."""
        spec = self._stored.specs[tensor]
        chunk = chunk_shape(spec, self._chunk_bytes)
        memory = np.zeros((*chunk, spec.itemsize), np.uint8)
        starts = [i * n for i, n in zip(where, chunk, strict=True)]
        lengths = [min(n, size - start) for n, size, start in zip(chunk, spec.shape, starts, strict=True)]
        fragments = self._fragments.of(tensor)
        pieces = _piece(tensor, starts, lengths, memory)
        run_reads(self._stored.job(fragments, pieces, self._stored.plan(fragments, pieces)))
        return memory.tobytes()

    # ----------------------------------------------------------------------------------------------------------- listing

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for path in sorted({*self._children, *self._arrays}):
            for key in self._keys_of(path):
                if key.startswith(prefix):
                    yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        path = prefix.rstrip("/")
        if path in self._arrays:
            yield _DOCUMENT
            if 0 not in self._stored.specs[self._arrays[path]].shape:
                yield "c"
        elif path in self._children:
            yield _DOCUMENT
            for name in self._children[path]:
                yield name

    def _keys_of(self, path: str) -> Iterator[str]:
        yield f"{path}/{_DOCUMENT}" if path else _DOCUMENT
        if path in self._arrays:
            grid = _grid(self._stored.specs[self._arrays[path]], self._chunk_bytes)
            for where in itertools.product(*map(range, grid)):
                yield "/".join((path, "c", *map(str, where)))

    # ----------------------------------------------------------------------------------------------------------- refusing

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()


class _Fragments:
    """Fragments by tensor, read once: all of a small index together, each tensor's part of a large one by itself."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        self._stored = stored
        self._lock = threading.Lock()
        self._all: FragmentTable | None = None
        self._known: dict[int, FragmentTable] = {}

    def of(self, tensor: int) -> FragmentTable:
        with self._lock:
            if tensor not in self._known:
                self._known[tensor] = self._find(tensor)
            return self._known[tensor]

    def _find(self, tensor: int) -> FragmentTable:
        if self._stored.manifest.fragments.nbytes > PARTIAL_BYTES_MIN:
            return self._stored.fragments(np.array([tensor]))
        if self._all is None:
            self._all = self._stored.fragments()
        first, last = np.searchsorted(self._all.boxes.tensor, [tensor, tensor + 1]).tolist()
        return _rows(self._all, first, last)


def _rows(table: FragmentTable, first: int, last: int) -> FragmentTable:
    edges = table.block_starts[first : last + 1]
    return FragmentTable(
        boxes=table.boxes.take(np.arange(first, last)),
        writer=table.writer[first:last],
        offsets=table.offsets[first:last],
        nbytes=table.nbytes[first:last],
        checksums=table.checksums[edges[0] : edges[-1]],
        block_starts=edges - edges[0],
    )


def shown_dtype(name: str) -> tuple[str, Any]:
    """Zarr's dtype and fill value for a dtype of ours."""
    dtype = dtype_of(name)
    shown = dtype.numpy or _BITS[dtype.itemsize]
    fill: Any = {"b": False, "f": 0.0, "c": [0.0, 0.0]}.get(np.dtype(shown).kind, 0)
    return shown, fill


def chunk_shape(spec: TensorSpec, chunk_bytes: int) -> tuple[int, ...]:
    """Whole rows, as many as fit into `chunk_bytes`; where one row does not fit, a part of one."""
    out = []
    room = max(1, chunk_bytes // spec.itemsize)  # elements
    for dim, length in enumerate(spec.shape):
        inner = math.prod(spec.shape[dim + 1 :])
        out.append(max(1, min(length, room // max(inner, 1))))
    return tuple(out)


def _grid(spec: TensorSpec, chunk_bytes: int) -> tuple[int, ...]:
    """Chunks per dim."""
    return tuple(-(-size // n) for size, n in zip(spec.shape, chunk_shape(spec, chunk_bytes), strict=True))


def array_paths(names: Sequence[str]) -> list[str]:
    """A Zarr path for each tensor name, all different, none inside another.

    Most paths are the name itself. Parts that Zarr keeps for itself are escaped with `%`, and a tensor that has others below its
    name moves to `<name>/%self` (`a` and `a/b` become `a/%self` and `a/b`).
    """
    plain = ["/".join(_part(part) for part in name.split("/")) for name in names]
    groups = {path[:i] for path in plain for i, letter in enumerate(path) if letter == "/"}
    return [f"{path}/%self" if path in groups else path for path in plain]


def _part(part: str) -> str:
    """One part of a path. `%` in a name is `%25`, so that no two parts become equal and `%self` stays free."""
    part = part.replace("%", "%25").replace("\\", "%5C")
    if part == "":
        return "%empty"
    if part in (".", "..", _DOCUMENT):
        return part.replace(".", "%2E")
    return "%5F" + part[1:] if part.startswith("__") else part


def _children(arrays: Iterable[str]) -> dict[str, list[str]]:
    """The names below each group; the root is ""."""
    found: dict[str, set[str]] = {"": set()}
    for path in arrays:
        while path:
            group, name = _split(path)
            found.setdefault(group, set()).add(name)
            path = group
    return {group: sorted(names) for group, names in found.items()}


def _split(key: str) -> tuple[str, str]:
    """Folder and last part of a key."""
    folder, _, name = key.rpartition("/")
    return folder, name


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0") and len(text) < 20


def _piece(tensor: int, starts: Sequence[int], lengths: Sequence[int], memory: NDArray[np.uint8]) -> PieceTable:
    """One box of a tensor at the front of `memory`, whose last dim is the bytes of an element."""
    num_dims = max(len(starts), 1)
    offsets, sizes = np.zeros((1, num_dims), np.int64), np.ones((1, num_dims), np.int64)
    strides = np.zeros((1, num_dims), np.int64)
    offsets[0, : len(starts)], sizes[0, : len(starts)] = starts, lengths
    strides[0, : len(starts)] = memory.strides[:-1]
    address = memory.ctypes.data
    return PieceTable(
        boxes=BoxTable(tensor=np.array([tensor], np.int32), offsets=offsets, lengths=sizes),
        address=np.array([address], np.uint64),
        limit=np.array([address + memory.nbytes], np.uint64),
        strides=strides,
    )


def _range_of(request: ByteRequest | None, size: int) -> tuple[int, int]:
    if isinstance(request, RangeByteRequest):
        return request.start, min(request.end, size)
    if isinstance(request, OffsetByteRequest):
        return request.offset, size
    if isinstance(request, SuffixByteRequest):
        return max(0, size - request.suffix), size
    return 0, size


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
