"""A folder of plain safetensors files, as Hugging Face lays models out, opened for reading like a checkpoint.

In: a store and the names of files in it. Out: `SafetensorsFolder`: tensors, and reads of any boxes of them by the reader of the
engine. Nothing is converted or copied. The files have no checksums, so what is read is not verified; headers are checked whole.
Never looks at a file that the index (`model.safetensors.index.json`) does not name, where there is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.config import HEADER_BYTES_MAX, MANIFEST_BYTES_MAX, Options
from ckpt.engine.read import ReadJob, read_bytes_max
from ckpt.errors import DamagedError, InvalidInputError, NotFoundError
from ckpt.format.dtypes import DTYPES
from ckpt.format.image import header_nbytes, parse_header
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.layout.box import BoxTable
from ckpt.plan.read import ReadPlan, plan_read
from ckpt.store.base import Store

INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
DEFAULT_KEY = "model"  # the state key that names of a folder get: `model/<name>`
_BLOCK_BYTES = 4096  # reads begin and end at multiples of this, counted from a tensor's first byte
_SAMPLE_BYTES = 65536  # of the data of each file, at both ends, that count for its digest
_DTYPE_OF_CODE = {dtype.safetensors: name for name, dtype in DTYPES.items() if dtype.safetensors is not None}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of one file."""

    name: str
    file: int
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


def is_folder_of_safetensors(store: Store) -> bool:
    """Whether there are safetensors files right below the root. An unreachable store is an error."""
    return store.exists(INDEX_FILE) or bool(_top_files(store))


def _top_files(store: Store) -> list[str]:
    return [e.key for e in store.list("") if "/" not in e.key and e.key.endswith(SUFFIX)]


class SafetensorsFolder:
    """Tensors of a folder. Headers are read at once; any thread may read data.

    Args:
        files: these alone; None: those that the index names, or all there are.
        key: what names get in front, as `model/<name>`; "" leaves them as they are.
    """

    def __init__(
        self, store: Store, options: Options, *, files: Sequence[str] | None = None, key: str = DEFAULT_KEY
    ) -> None:
        self.store, self.options = store, options
        self.files = sorted(files) if files is not None else self._named_files()
        self.sizes: list[int] = []
        digest, entries = hashlib.sha256(), []
        for number, file in enumerate(self.files):
            found, sample = self._read_header(number, file)
            entries += found
            digest.update(f"{file}\0{self.sizes[-1]}\0".encode() + sample)
        self.digest = "sha256:" + digest.hexdigest()  # of names, sizes, headers and samples of the data
        self._entries = sorted(entries, key=lambda entry: entry.name)
        self._refuse_twice()
        prefix = f"{key}/" if key else ""
        self.specs: list[TensorSpec] = [
            TensorSpec(
                name=prefix + e.name, role="param" if is_float(e.dtype) else "buffer", dtype=e.dtype, shape=e.shape
            )
            for e in self._entries
        ]

    @property
    def image_keys(self) -> list[str]:
        """The files, by number."""
        return self.files

    @property
    def read_bytes_max(self) -> int:
        """Soft bound of one read, as that of a checkpoint."""
        return read_bytes_max(self.store, self.options)

    def fragments(self, tensors: NDArray[np.integer] | None = None) -> FragmentTable:
        """One fragment per tensor (those with these ids; all when None) that has elements."""
        chosen = range(len(self.specs)) if tensors is None else sorted({int(t) for t in tensors})
        rows = [i for i in chosen if self.specs[i].nbytes]
        dims = max((len(self.specs[i].shape) for i in rows), default=1) or 1
        lengths = np.ones((len(rows), dims), np.int64)
        for row, i in enumerate(rows):
            lengths[row, : len(self.specs[i].shape)] = self.specs[i].shape
        return FragmentTable(
            boxes=BoxTable(tensor=np.array(rows, np.int32), offsets=np.zeros_like(lengths), lengths=lengths),
            writer=np.array([self._entries[i].file for i in rows], np.int32),
            offsets=np.array([self._entries[i].start for i in rows], np.int64),
            nbytes=np.array([self.specs[i].nbytes for i in rows], np.int64),
            checksums=np.empty(0, np.uint32),
            block_starts=np.zeros(len(rows) + 1, np.int64),
        )

    def plan(self, fragments: FragmentTable, pieces: PieceTable) -> ReadPlan:
        """The reads that fill `pieces` (tensor numbers are ids)."""
        return plan_read(
            fragments,
            self.specs,
            pieces,
            block_bytes=_BLOCK_BYTES,
            read_bytes_max=self.read_bytes_max,
            gap_bytes_max=self.options.read_gap_bytes_max,
        )

    def job(self, fragments: FragmentTable, pieces: PieceTable, plan: ReadPlan) -> ReadJob:
        """The work of carrying out `plan`."""
        return ReadJob(
            store=self.store,
            keys=self.files,
            plan=plan,
            fragments=fragments,
            specs=self.specs,
            pieces=pieces,
            options=self.options,
        )

    def _named_files(self) -> list[str]:
        """Of the index, or all files of the folder itself."""
        if self.store.exists(INDEX_FILE):
            return sorted(set(self._weight_map().values()))
        found = _top_files(self.store)
        if not found:
            raise NotFoundError(f"no safetensors file in {self.store.url}", kind="no-checkpoint")
        return sorted(found)

    def _weight_map(self) -> Mapping[str, str]:
        if self.store.size(INDEX_FILE) > MANIFEST_BYTES_MAX:
            raise DamagedError(f"`{INDEX_FILE}` in {self.store.url} is too large for an index")
        try:
            weight_map = json.loads(self.store.read(INDEX_FILE))["weight_map"]
            pairs = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(f"`{INDEX_FILE}` in {self.store.url} is no index: {error!r}") from None
        odd = [file for file in pairs.values() if "/" in file or not file.endswith(SUFFIX)]
        if not pairs or odd:
            raise DamagedError(f"`{INDEX_FILE}` in {self.store.url} names no files, or `{odd[0] if odd else ''}`")
        return pairs

    def _read_header(self, number: int, file: str) -> tuple[list[_Entry], bytes]:
        """The entries of a file, and what of it counts for the digest."""
        size = self.store.size(file)
        prefix = self.store.read(file, 0, min(8, size))
        length = header_nbytes(prefix, file=file, file_bytes=size)
        if length > HEADER_BYTES_MAX:
            raise DamagedError(f"`{file}` is damaged: a header of {length} bytes")
        header = self.store.read(file, 0, length)
        found = parse_header(header, file=file, file_bytes=size)
        self.sizes.append(size)
        ends = [
            self.store.read(file, length, min(length + _SAMPLE_BYTES, size)),
            self.store.read(file, max(length, size - _SAMPLE_BYTES), size),
        ]
        entries = [
            _Entry(name=name, file=number, dtype=_DTYPE_OF_CODE[code], shape=shape, start=start, stop=stop)
            for name, (code, shape, start, stop) in found.items()
        ]
        return entries, header + b"".join(ends)

    def _refuse_twice(self) -> None:
        names = [entry.name for entry in self._entries]
        twice = sorted({a for a, b in zip(names, names[1:], strict=False) if a == b})
        if twice:
            raise InvalidInputError(
                f"{len(twice)} tensors are in two files of {self.store.url}: {', '.join(twice[:10])}",
                kind="ambiguous-folder",
                hints=(f"say which files make the model in `{INDEX_FILE}`, or name one file",),
            )
