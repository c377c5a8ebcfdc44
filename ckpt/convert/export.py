"""Write the model of a checkpoint as plain safetensors files, as Hugging Face lays them out.

In: a stored checkpoint and a folder. Out: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`; and copies of small files of another model's folder (config, tokenizer). A local folder appears
whole or not at all. Holds a few pieces of a tensor at a time; every byte that is read is verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.config import EXPORT_FILE_BYTES, EXPORT_PIECE_BYTES, EXPORT_SIDE_FILE_BYTES_MAX, Options
from ckpt.convert.safetensors import DEFAULT_KEY, INDEX_FILE, SUFFIX
from ckpt.engine.read import Progress, run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.worker import Worker
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, StoreError
from ckpt.format.dtypes import dtype_of
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.layout.box import Box, BoxTable, boxes_of_flat_range
from ckpt.plan.read import contiguous_strides
from ckpt.snapshot.images import allocate
from ckpt.store.base import Store, Writer
from ckpt.store.open import open_store
from ckpt.store.posix import PosixStore

_WEIGHTS = (SUFFIX, ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".md")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the export."""

    id: int  # in the checkpoint
    spec: TensorSpec  # there
    name: str  # in the files
    dtype: str  # in the files

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes // self.spec.itemsize * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did."""

    files: tuple[str, ...]
    num_tensors: int
    nbytes: int  # of tensors, as written
    seconds: float


def choose(
    stored: StoredCheckpoint,
    *,
    key: str = DEFAULT_KEY,
    dtype: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
) -> list[Tensor]:
    """The tensors of one state key, by the name that they get. Tied weights are written once.

    Args:
        dtype: of all floating-point tensors; None: as they are.
        rename: regular expressions over the names without the key, and what takes their place; the first that matches all of a
            name.
    """
    if dtype is not None and not kernels.is_float(dtype):
        raise InvalidInputError(f"`{dtype}` is no float dtype that an export can cast to", kind="bad-dtype")
    found = []
    for i, spec in enumerate(stored.specs):
        first, _, rest = spec.name.partition("/")
        if first != key or not rest or spec.role.startswith("optim."):
            continue
        cast = dtype is not None and kernels.is_float(spec.dtype)
        found.append(
            Tensor(id=i, spec=spec, name=_renamed(rest, rename), dtype=dtype if cast and dtype else spec.dtype)
        )
    _refuse(stored, key, found)
    return sorted(found, key=lambda tensor: (-dtype_of(tensor.dtype).itemsize, tensor.name))


def _renamed(name: str, rename: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rename:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def _refuse(stored: StoredCheckpoint, key: str, found: Sequence[Tensor]) -> None:
    if not found:
        keys = sorted({spec.name.partition("/")[0] for spec in stored.specs})
        raise InvalidInputError(
            f"step {stored.step} has no model under the state key `{key}`",
            kind="no-tensors",
            hints=(f"state keys there: {', '.join(keys)}; name one with `--key`",),
        )
    names = sorted(tensor.name for tensor in found)
    twice = sorted({a for a, b in zip(names, names[1:], strict=False) if a == b})
    if twice:
        raise InvalidInputError(f"rename rules give several tensors one name: {', '.join(twice[:10])}")
    odd = [tensor for tensor in found if dtype_of(tensor.dtype).safetensors is None]
    if odd:
        raise InvalidInputError(f"`{odd[0].spec.name}` is of dtype {odd[0].dtype}, which safetensors files cannot hold")


def export_safetensors(
    stored: StoredCheckpoint,
    folder: str,
    tensors: Sequence[Tensor],
    *,
    options: Options,
    file_bytes: int = EXPORT_FILE_BYTES,
    config_from: str | None = None,
    stem: str = "model",
    more: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write `tensors` (of `choose`) into a folder that is not there yet, or is empty. AlreadyExistsError otherwise.

    Args:
        file_bytes: of one file, about; a larger tensor makes a larger file.
        config_from: a folder whose small files (config, tokenizer) are copied.
        stem: what names of files begin with.
        more: small files to write beside, by name.
        progress: called with the bytes done; each byte is read once and written once.
    """
    start = time.perf_counter()
    groups = _groups(tensors, file_bytes)
    names = _file_names(stem, len(groups))
    side = {**(_side_files(config_from, options) if config_from is not None else {}), **(more or {})}
    with _appearing(folder, options) as into, _Pump(stored, options, progress) as pump:
        for name, group in zip(names, groups, strict=True):
            pump.write(into, name, group)
        for name, data in side.items():
            into.put(name, data)
        if len(names) > 1:
            into.put(INDEX_FILE, _index(names, groups))
    return Exported(
        files=tuple([*names, *sorted(side), *([INDEX_FILE] if len(names) > 1 else [])]),
        num_tensors=len(tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        seconds=time.perf_counter() - start,
    )


def _groups(tensors: Sequence[Tensor], file_bytes: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if held and held + tensor.nbytes > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    return groups


def _file_names(stem: str, num: int) -> list[str]:
    return [f"{stem}{SUFFIX}"] if num == 1 else [f"{stem}-{i + 1:05d}-of-{num:05d}{SUFFIX}" for i in range(num)]


def _index(names: Sequence[str], groups: Sequence[Sequence[Tensor]]) -> bytes:
    weight_map = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
    total = sum(tensor.nbytes for group in groups for tensor in group)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def _header(group: Sequence[Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in group:
        entries[tensor.name] = {
            "dtype": dtype_of(tensor.dtype).safetensors,
            "shape": list(tensor.spec.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return struct.pack("<Q", -(-len(text) // 8) * 8) + text.ljust(-(-len(text) // 8) * 8)


def _side_files(url: str, options: Options) -> dict[str, bytes]:
    """Small files of a model's folder that are no weights."""
    store = open_store(url, options=options)
    try:
        found = {}
        for entry in store.list(""):
            if "/" in entry.key or entry.key == INDEX_FILE or entry.key.endswith(_WEIGHTS):
                continue
            if entry.key.endswith(_SIDE_FILES) and entry.nbytes <= EXPORT_SIDE_FILE_BYTES_MAX:
                found[entry.key] = store.read(entry.key)
        return found
    finally:
        store.close()


@contextlib.contextmanager
def _appearing(folder: str, options: Options) -> Iterator[Store]:
    """A store to write into. On a local disk a folder beside the target, which takes its name at the end."""
    final = open_store(folder, options=options)
    if final.list(""):
        raise AlreadyExistsError(f"`{folder}` is not empty", kind="already-exists")
    if not isinstance(final, PosixStore):
        yield final
        final.close()
        return
    path = os.path.abspath(folder.removeprefix("file://"))
    aside = os.path.join(os.path.dirname(path), f".tmp-export-{secrets.token_hex(8)}")
    into = PosixStore(aside, options=options)
    try:
        yield into
        if os.path.isdir(path):
            os.rmdir(path)  # it was empty
        os.rename(aside, path)
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise StoreError(f"`{folder}` cannot be made: {error.strerror}", kind="io") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Pump:
    """Reads pieces of tensors and writes them, one while the other. Used by one thread."""

    def __init__(self, stored: StoredCheckpoint, options: Options, progress: Progress | None) -> None:
        self._stored, self._options, self._progress = stored, options, progress
        self._worker = Worker("ckpt-export-write", 0)
        self._raw = allocate(EXPORT_PIECE_BYTES)
        self._out = [allocate(EXPORT_PIECE_BYTES), allocate(EXPORT_PIECE_BYTES)]
        self._writes: list[Future[None] | None] = [None, None]

    def __enter__(self) -> _Pump:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def write(self, into: Store, name: str, group: Sequence[Tensor]) -> None:
        """One file, durable at the end."""
        header = _header(group)
        fragments = self._stored.fragments(np.array([tensor.id for tensor in group]))
        writer = into.open_writer(name, nbytes=len(header) + sum(tensor.nbytes for tensor in group))
        try:
            writer.write(memoryview(header))
            turn = 0
            for tensor in group:
                for box in _pieces_of(tensor):
                    self._piece(fragments, tensor, box, turn, writer)
                    turn = 1 - turn
            self._finish()
            writer.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._finish()
            writer.abort()
            raise

    def _piece(self, fragments: Any, tensor: Tensor, box: Box, turn: int, writer: Writer) -> None:
        write, self._writes[turn] = self._writes[turn], None
        if write is not None:
            write.result()
        nbytes = box.volume * tensor.spec.itemsize
        cast = tensor.dtype != tensor.spec.dtype
        raw = (self._raw if cast else self._out[turn])[:nbytes]
        self._read(fragments, tensor, box, raw)
        data = raw
        if cast:
            data = self._out[turn][: box.volume * dtype_of(tensor.dtype).itemsize]
            source = kernels.Elements(data=raw, dtype=tensor.spec.dtype)
            kernels.combine([source], [1.0], data, tensor.dtype, threads=self._options.copy_threads)
        self._writes[turn] = self._worker.submit(lambda: writer.write(data.data))
        if self._progress is not None:
            self._progress(nbytes + len(data))

    def _read(self, fragments: Any, tensor: Tensor, box: Box, raw: NDArray[np.uint8]) -> None:
        boxes = BoxTable.build([(tensor.id, box)])
        address = int(raw.ctypes.data)
        pieces = PieceTable(
            boxes=boxes,
            address=np.array([address], np.uint64),
            limit=np.array([address + len(raw)], np.uint64),
            strides=contiguous_strides(boxes.lengths, np.array([tensor.spec.itemsize], np.int64)),
        )
        run_reads(self._stored.job(fragments, pieces, self._stored.plan(fragments, pieces)))

    def _finish(self) -> None:
        for turn, write in enumerate(self._writes):
            self._writes[turn] = None
            if write is not None:
                write.result()


def _pieces_of(tensor: Tensor) -> Iterator[Box]:
    """Runs of elements that fit into a buffer, read and cast."""
    widest = max(tensor.spec.itemsize, dtype_of(tensor.dtype).itemsize)
    step = EXPORT_PIECE_BYTES // widest
    volume = tensor.spec.nbytes // tensor.spec.itemsize
    for start in range(0, volume, step):
        yield from boxes_of_flat_range(tensor.spec.shape, start, min(start + step, volume))
