"""Count what passes through a store.

In: any `Store`. Out: the same `Store`, and numbers. Never changes a call, a result or an error.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckpt.store.base import Entries, Names, Store, Writer


@dataclass(kw_only=True)
class Traffic:
    """What passed through a `CountingStore` so far."""

    bytes_read: int = 0
    bytes_written: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # by method of Store
    bytes_read_of: Counter[str] = field(default_factory=Counter)  # by key
    bytes_written_of: Counter[str] = field(default_factory=Counter)  # by key


class CountingStore:
    """A `Store` that counts. Any thread; `traffic` is exact once the calls have returned."""

    def __init__(self, store: Store) -> None:
        self.inner = store
        self.traffic = Traffic()
        self._lock = threading.Lock()

    local_files = False  # every read passes through here

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        return None

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def conditional_create(self) -> bool:
        return self.inner.conditional_create

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self.inner.read(key, start, stop)
        self._count("read", key, read=len(data))
        return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self.inner.read_into(key, start, buffer)
        self._count("read_into", key, read=buffer.nbytes)

    def size(self, key: str) -> int:
        self._count("size", key)
        return self.inner.size(key)

    def exists(self, key: str) -> bool:
        self._count("exists", key)
        return self.inner.exists(key)

    def list(self, prefix: str) -> Entries:
        self._count("list", prefix)
        return self.inner.list(prefix)

    def list_folders(self, prefix: str) -> Names:
        self._count("list_folders", prefix)
        return self.inner.list_folders(prefix)

    def open_writer(self, key: str, *, nbytes: int | None = None) -> Writer:
        self._count("open_writer", key)
        return _CountingWriter(self, key, self.inner.open_writer(key, nbytes=nbytes))

    def put(self, key: str, data: bytes) -> None:
        self.inner.put(key, data)
        self._count("put", key, written=len(data))

    def create(self, key: str, data: bytes) -> None:
        self.inner.create(key, data)
        self._count("create", key, written=len(data))

    def delete(self, keys: Sequence[str]) -> None:
        self._count("delete", "")
        self.inner.delete(keys)

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        self._count("sweep", prefix)
        return self.inner.sweep(prefix, older_than_s=older_than_s)

    def close(self) -> None:
        self.inner.close()

    def _count(self, method: str, key: str, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            traffic = self.traffic
            traffic.calls[method] += 1
            traffic.bytes_read += read
            traffic.bytes_written += written
            if read:
                traffic.bytes_read_of[key] += read
            if written:
                traffic.bytes_written_of[key] += written


class _CountingWriter:
    """A `Writer` that counts into its store."""

    def __init__(self, store: CountingStore, key: str, inner: Writer) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    def write(self, data: memoryview) -> None:
        self._inner.write(data)
        self._store._count("write", self._key, written=data.nbytes)

    def commit(self) -> None:
        self._inner.commit()
        self._store._count("commit", self._key)

    def abort(self) -> None:
        self._inner.abort()
