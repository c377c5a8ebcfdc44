"""A tiny checkpoint in memory, and what reading a changed one gives.

Goal: try many changes a second. Method: a `Store` over a dict; a read loads every tensor and every object of the checkpoint
through the same code as `ckpt.load`, into bytes that can be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.view import Checkpoint
from ckpt.errors import DamagedError, NotFoundError, VersionError
from ckpt.format import index
from ckpt.store.base import Entry

Files = dict[str, bytes]
OPTIONS = Options(read_threads=1)
# What a reader may say of bytes that are not what was written. Anything else is a bug.
REFUSALS = (DamagedError, VersionError, NotFoundError)


@dataclass
class DictStore:
    """Only reads; as strict about ranges as the real stores."""

    files: Files
    url: str = "memory"
    conditional_create: bool = True
    local_files: bool = False
    reads: list[int] = field(default_factory=list)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key not in self.files:
            raise NotFoundError(f"no object `{key}`", kind="no-object")
        data = self.files[key]
        stop = len(data) if stop is None else stop
        assert 0 <= start <= stop
        if stop > len(data):
            raise DamagedError(f"`{key}` is truncated", kind="truncated")
        self.reads.append(stop - start)
        return data[start:stop]

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read(key, start, start + len(buffer))

    def size(self, key: str) -> int:
        return len(self.read(key))

    def exists(self, key: str) -> bool:
        return key in self.files

    def list(self, prefix: str) -> list[Entry]:
        return [
            Entry(key=k, nbytes=len(v), modified_s=0.0) for k, v in sorted(self.files.items()) if k.startswith(prefix)
        ]

    def list_folders(self, prefix: str) -> list[str]:
        return sorted({k.removeprefix(prefix).split("/")[0] for k in self.files if "/" in k.removeprefix(prefix)})

    def close(self) -> None:
        pass


def saved(folder: Path, state: dict[str, Any], step: int = 1) -> Files:
    """The files of a checkpoint of `state`, by key."""
    ckpt.save(state, folder, step=step, metrics={"loss": 2.5}, metadata={"note": "x"})
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("step-*/**/*"))
        if path.is_file()
    }


def everything(files: Files, step: int = 1) -> dict[str, Any]:
    """All that a reader gets out of a checkpoint."""
    return contents(Checkpoint(StoredCheckpoint(DictStore(files), step, OPTIONS)))


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """All tensors, objects and notes of a checkpoint."""
    out: dict[str, Any] = {
        "step": checkpoint.step,
        "metrics": checkpoint.metrics,
        "metadata": checkpoint.manifest.metadata,
    }
    for name, rank in checkpoint.objects():
        out[f"{name}@{rank}"] = checkpoint.read_object(name, rank=rank)
    for name, view in checkpoint.items():
        value = view[...]
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        out[name] = (view.spec, data)
    return out


class OpenedOnce:
    """A checkpoint whose index is read once, while its images change: quick enough to try every byte of an image."""

    def __init__(self, files: Files, step: int = 1) -> None:
        self.store = DictStore(dict(files))
        stored = StoredCheckpoint(self.store, step, OPTIONS)
        table = stored.fragments()
        stored.fragments = lambda tensors=None: table  # type: ignore[method-assign]
        self.checkpoint = Checkpoint(stored)

    def outcome(self, key: str, data: bytes) -> Any:
        """As `outcome`, with other bytes under `key`."""
        old, self.store.files[key] = self.store.files[key], data
        try:
            return contents(self.checkpoint)
        except REFUSALS as error:
            return type(error)
        finally:
            self.store.files[key] = old


def outcome(files: Files, step: int = 1) -> Any:
    """`everything`, or the class of the refusal. Any other exception is left to fail the test."""
    try:
        return everything(files, step)
    except REFUSALS as error:
        assert error.message and len(error.message) < 4000
        return type(error)


def parts_of(files: Files) -> tuple[str, str]:
    """Key of the manifest, and the attempt's folder."""
    key = next(key for key in files if key.endswith("manifest.json"))
    return key, next(key for key in files if key.endswith(".safetensors")).rpartition("/")[0]


def with_manifest(files: Files, change: Callable[[dict[str, Any]], Any], *, compact: bool = False) -> Files:
    """The files with a changed manifest whose digest is right, as a hostile writer would make it."""
    key, _ = parts_of(files)
    document = json.loads(files[key])
    del document["digest"]
    document = change(document) or document
    text = json.dumps(document, indent=None if compact else 1).encode()
    body = text if compact else text + b"\n"
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    return {**files, key: body.removesuffix(b"\n}\n") + b',\n "digest": "%s"\n}\n' % digest.encode()}


def with_file(files: Files, name: str, data: bytes) -> Files:
    """The files with another index file, and a manifest that vouches for it."""
    _, folder = parts_of(files)
    record = vars(index.file_record(name, data))
    changed = {**files, f"{folder}/{name}": data}
    return with_manifest(changed, lambda document: document.update({name.removesuffix(".parquet"): record}))


@contextlib.contextmanager
def memory_growth_at_most(nbytes: int) -> Iterator[None]:
    """Fail when this process needs more than `nbytes` of memory beyond what it holds now, even for a moment.

    The peak of the kernel, not `tracemalloc`: that one cannot see what Arrow takes, and CPython 3.11 crashes when it stops while
    a thread of Arrow lets go of a Python file (`traceback_new` in _tracemalloc.c, seen in a core).
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    yield
    grown = _status_bytes("VmHWM") - before
    assert grown <= nbytes, f"memory grew by {grown} bytes, at most {nbytes} are allowed"


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
