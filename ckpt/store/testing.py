"""A store that fails by script, for tests of what is built on stores.

In: any `Store` and a script such as `ok*3 timeout lost-response full`. Out: a `Store` whose calls succeed and fail in
this order. Never fails by chance, never changes data.

    ok              the call goes through
    timeout         nothing reaches the store, the caller is told `unreachable`
    lost-response   the call goes through, the caller is told `unreachable`
    full, denied    nothing reaches the store, the caller is told so
    crash           nothing reaches the store, the caller dies (SimulatedCrash), as does every later call
    crash-after     the call goes through, then the caller dies

Each word counts for one call; `*N` repeats it; after the last word everything goes through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ckpt.errors import InvalidInputError, StoreError
from ckpt.store.base import Entries, Names, Store, Writer

_T = TypeVar("_T")
_WORDS = ("ok", "timeout", "lost-response", "full", "denied", "crash", "crash-after")
WRITES = frozenset({"open_writer", "write", "commit", "put", "create", "delete", "sweep"})
READS = frozenset({"read", "read_into", "size", "exists", "list", "list_folders"})


class SimulatedCrash(BaseException):
    """The process is gone. Not an Exception, so that no handler of an error can run after its own death."""


class FaultyStore:
    """A `Store` that follows a script. Any thread; the order of calls is the order in which they take the lock."""

    def __init__(self, store: Store, script: str, *, methods: frozenset[str] = WRITES) -> None:
        self.inner = store
        self.log: list[str] = []  # "method key", one line for each scripted call
        self._script = parse_script(script)
        self._methods = methods
        self._dead = False
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
        return self._do("read", key, lambda: self.inner.read(key, start, stop))

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self._do("read_into", key, lambda: self.inner.read_into(key, start, buffer))

    def size(self, key: str) -> int:
        return self._do("size", key, lambda: self.inner.size(key))

    def exists(self, key: str) -> bool:
        return self._do("exists", key, lambda: self.inner.exists(key))

    def list(self, prefix: str) -> Entries:
        return self._do("list", prefix, lambda: self.inner.list(prefix))

    def list_folders(self, prefix: str) -> Names:
        return self._do("list_folders", prefix, lambda: self.inner.list_folders(prefix))

    def open_writer(self, key: str, *, nbytes: int | None = None) -> Writer:
        return self._do(
            "open_writer", key, lambda: _FaultyWriter(self, key, self.inner.open_writer(key, nbytes=nbytes))
        )

    def put(self, key: str, data: bytes) -> None:
        self._do("put", key, lambda: self.inner.put(key, data))

    def create(self, key: str, data: bytes) -> None:
        self._do("create", key, lambda: self.inner.create(key, data))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:  # one call each: a crash can come between any two
            self._do("delete", key, lambda key=key: self.inner.delete([key]))  # type: ignore[misc]

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        return self._do("sweep", prefix, lambda: self.inner.sweep(prefix, older_than_s=older_than_s))

    def close(self) -> None:
        self.inner.close()

    def _do(self, method: str, key: str, call: Callable[[], _T]) -> _T:
        word = self._next(method, key)
        text = f"scripted fault: {word} at {method} of `{key}`"
        if word == "crash":
            raise SimulatedCrash(text)
        if word in ("full", "denied"):
            raise StoreError(text, kind=word)
        if word == "timeout":
            raise StoreError(text, kind="unreachable")
        result = call()
        if word == "crash-after":
            raise SimulatedCrash(text)
        if word == "lost-response":
            raise StoreError(text, kind="unreachable")
        return result

    def _next(self, method: str, key: str) -> str:
        with self._lock:
            if self._dead:
                raise SimulatedCrash(f"{method} of `{key}` after the crash")
            if method not in self._methods:
                return "ok"
            self.log.append(f"{method} {key}")
            word = self._script.pop(0) if self._script else "ok"
            self._dead = word in ("crash", "crash-after")
            return word


class _FaultyWriter:
    """A `Writer` under the script of its store."""

    def __init__(self, store: FaultyStore, key: str, inner: Writer) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    def write(self, data: memoryview) -> None:
        self._store._do("write", self._key, lambda: self._inner.write(data))

    def commit(self) -> None:
        self._store._do("commit", self._key, self._inner.commit)

    def abort(self) -> None:
        self._inner.abort()


def parse_script(script: str) -> list[str]:
    """The words of a script, one for each call."""
    words: list[str] = []
    for part in script.split():
        word, _, count = part.partition("*")
        if word not in _WORDS or not (count or "1").isdigit():
            raise InvalidInputError(f"no such fault: {part!r}; there are {', '.join(_WORDS)}")
        words += [word] * int(count or "1")
    return words
