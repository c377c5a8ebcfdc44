"""Bytes by key through any fsspec file system (memory, GCS, Azure, SFTP, ...). S3 has its own store.

In: an fsspec URL and storage options. Out: a `Store`. Durable means what the back end means by an answered write. Never
caches a listing or a file system object: other writers' objects must be seen, and a forked child must not use the
connections of its parent.

fsspec has no create-if-absent that holds on every back end (its default asks and then writes), so `conditional_create`
is False here and the claim rule of ckpt/commit/claims.py applies.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import fsspec

from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, NotFoundError, StoreError
from ckpt.store.base import Entries, Entry, Names, check_keys

_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "modified", "updated", "created", "ModifiedTime")


class FsspecStore:
    """A `Store` on an fsspec file system. Any thread; a forked process makes its own file system object."""

    conditional_create = False
    local_files = False

    def __init__(self, url: str, *, options: Options, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._options = options
        self._storage_options = dict(storage_options or {})
        self._systems: dict[int, Any] = {}  # by process id
        self._root = ""
        with self._explained("", "open"):
            self._fs()

    @property
    def url(self) -> str:
        return self._url

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        return None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        _check_range(key, start, stop)
        with self._explained(key, "read"):
            if stop == start or (stop is None and start):
                size = self._size(key)
                if size < start:
                    raise self._truncated(key, start, size)
                stop = size if stop is None else stop
                if stop == start:
                    return b""
            data = bytes(self._fs().cat_file(self._path(key), start=start or None, end=stop))
            if stop is not None and len(data) < stop - start:
                raise self._truncated(key, stop, start + len(data))
            return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        view[:] = self.read(key, start, start + len(view))

    def size(self, key: str) -> int:
        with self._explained(key, "look at"):
            return self._size(key)

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Entries:
        path = self._prefix_path(prefix)
        try:
            with self._explained(prefix, "list"):
                found = self._fs().find(path, detail=True)
        except NotFoundError:
            return []
        entries = [
            Entry(key=self._key(name), nbytes=int(info["size"]), modified_s=_modified_s(info))
            for name, info in found.items()
            if info.get("type", "file") == "file" and self._key(name).startswith(prefix)
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def list_folders(self, prefix: str) -> Names:
        path = self._prefix_path(prefix)
        try:
            with self._explained(prefix, "list"):
                items = self._fs().ls(path, detail=True)
        except NotFoundError:
            return []
        return sorted(str(item["name"]).rstrip("/").rsplit("/", 1)[-1] for item in items if item["type"] == "directory")

    def open_writer(self, key: str, *, nbytes: int | None = None) -> FsspecWriter:
        if self.exists(key):
            raise AlreadyExistsError(f"`{key}` in {self._url} exists already")
        with self._explained(key, "create"):
            self._make_parent(key)
            return FsspecWriter(self, key, self._fs().open(self._path(key), "wb", block_size=self._options.part_bytes))

    def put(self, key: str, data: bytes) -> None:
        with self._explained(key, "write"):
            self._make_parent(key)
            self._fs().pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> None:
        """Not atomic here: of two callers at the same moment both may believe that they won."""
        with contextlib.suppress(NotFoundError):
            if self.read(key) != data:
                raise AlreadyExistsError(f"`{key}` in {self._url} exists already")
            return
        self.put(key, data)
        if self.read(key) != data:
            raise AlreadyExistsError(f"`{key}` in {self._url} was written by somebody else at the same time")

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with contextlib.suppress(NotFoundError), self._explained(key, "delete"):
                self._fs().rm_file(self._path(key))
            self._prune(key)

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        """Nothing to do: an unfinished write of these back ends is an object or nothing."""
        self._prefix_path(prefix)
        return 0

    def close(self) -> None:
        self._systems.clear()

    def remove_quietly(self, key: str) -> None:
        """Remove a half-written object; one that cannot be removed is left to gc."""
        with contextlib.suppress(StoreError):
            self.delete([key])

    @contextlib.contextmanager
    def _explained(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            # Back ends raise classes of their own; only Python's own mistakes (TypeError, ...) are ours and pass.
            if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                raise
            raise error_of(error, url=self._url, key=key, verb=verb) from error

    def _fs(self) -> Any:
        fs = self._systems.get(os.getpid())
        if fs is None:
            fs, self._root = fsspec.core.url_to_fs(
                self._url, skip_instance_cache=True, use_listings_cache=False, **self._storage_options
            )
            self._root = self._root.rstrip("/")
            self._systems[os.getpid()] = fs
        return fs

    def _size(self, key: str) -> int:
        info = self._fs().info(self._path(key))
        if info.get("type", "file") != "file":
            raise NotFoundError(f"no object `{key}` in {self._url}: it is a folder", kind="no-object")
        return int(info["size"])

    def _make_parent(self, key: str) -> None:
        self._fs().makedirs(self._path(key).rsplit("/", 1)[0], exist_ok=True)

    def _prune(self, key: str) -> None:
        """Remove the folders of `key` below the root as far as they are empty, on back ends that have folders."""
        parent = key.rpartition("/")[0]
        while parent:
            try:
                if self._fs().ls(self._path(parent), detail=False):
                    return
                self._fs().rmdir(self._path(parent))
            except (OSError, NotImplementedError):
                return  # not empty any more, or no folders there
            parent = parent.rpartition("/")[0]

    def _path(self, key: str) -> str:
        check_keys([key])
        return f"{self._root}/{key}"

    def _prefix_path(self, prefix: str) -> str:
        if prefix and not prefix.endswith("/"):
            raise InvalidInputError(f"a prefix is empty or ends with a slash, found {prefix!r}", kind="bad-key")
        if prefix:
            check_keys([prefix[:-1]])
        self._fs()
        return f"{self._root}/{prefix}".rstrip("/")

    def _key(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._root.lstrip("/") + "/")

    def _truncated(self, key: str, expected: int, found: int) -> DamagedError:
        text = f"`{key}` in {self._url} is truncated: expected at least {expected} bytes, found {found}"
        return DamagedError(text, kind="truncated")


class FsspecWriter:
    """A `Writer` on an open fsspec file. One thread at a time."""

    def __init__(self, store: FsspecStore, key: str, file: Any) -> None:
        self._store = store
        self._key = key
        self._file = file
        self._done = False

    def write(self, data: memoryview) -> None:
        with self._store._explained(self._key, "write"):
            self._file.write(bytes(data))  # a copy: back ends may keep what they were given

    def commit(self) -> None:
        with self._store._explained(self._key, "write"):
            self._file.close()
        self._done = True

    def abort(self) -> None:
        if self._done:
            return
        self._done = True
        if hasattr(self._file, "discard"):
            with contextlib.suppress(OSError, NotImplementedError):
                self._file.discard()
        else:
            with contextlib.suppress(OSError):
                self._file.close()
        self._store.remove_quietly(self._key)


def error_of(error: Exception, *, url: str, key: str, verb: str) -> CheckpointError:
    """The `ckpt` error that says what `error` of a back end means."""
    place = f"`{key}` in {url}" if key else url
    text = f"cannot {verb} {place}: {error or type(error).__name__}"
    code = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return NotFoundError(f"no object {place}", kind="no-object")
    if isinstance(error, FileExistsError):
        return AlreadyExistsError(f"{place} exists already")
    if isinstance(error, PermissionError):
        return StoreError(text, kind="denied", hints=("check the credentials and what they may do there",))
    if isinstance(error, TimeoutError | ConnectionError):
        return StoreError(text, kind="unreachable", hints=("check the network and the address of the store",))
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(text, kind="full")
    return StoreError(text, kind="io")


def _check_range(key: str, start: int, stop: int | None) -> None:
    if start < 0 or (stop is not None and stop < start):
        raise InvalidInputError(f"not a byte range: {start} to {stop} of `{key}`")


def _modified_s(info: Mapping[str, Any]) -> float:
    for field in _TIME_FIELDS:
        value = info.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
