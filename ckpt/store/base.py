"""What ckpt asks of a place that holds bytes by key.

In: keys (relative, `/`-separated, checked) and bytes. Out: bytes. A `Store` never interprets what it holds, never
retries a write that may have landed without saying so, and turns every failure of its back end into a `ckpt.errors`
class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ckpt.errors import InvalidInputError

Durability = Literal["fsync", "acknowledged"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a listing."""

    key: str
    nbytes: int
    modified_s: float  # seconds since the epoch by the store's clock; 0.0 where it has none


Entries = list[Entry]
Names = list[str]


class Writer(Protocol):
    """One new object, written from front to back. Invisible or incomplete until `commit` returns."""

    def write(self, data: memoryview) -> None:
        """Append `data`. It may be reused by the caller as soon as this returns."""

    # A writer may also have `write_lasting(data)`: as `write`, of data that stay as they are until `commit` or `abort` returns,
    # so that they can be sent without a copy.

    def commit(self) -> None:
        """Make the object durable under its key. Errors of earlier writes surface here at the latest."""

    def abort(self) -> None:
        """Drop what was written. May be called twice, and after a failed commit."""


class Store(Protocol):
    """Bytes by key under one root. All methods may be called from any thread.

    Errors: `NotFoundError(kind="no-object")` for an absent key, `InvalidInputError(kind="bad-key")` for a bad one,
    `DamagedError` for what is shorter than asked (`truncated`) or no plain object (`not-a-file`), and `StoreError` with
    kind `denied`, `full`, `unreachable` (the call may have landed), `io`, or `no-exclusive-create`.
    """

    @property
    def url(self) -> str:
        """Where the root is, as the user writes it, without credentials."""

    @property
    def conditional_create(self) -> bool:
        """True when `create` is atomic: of many callers exactly one wins. Probed on first use where needed."""

    @property
    def local_files(self) -> bool:
        """True when objects are files of this machine that `open_local` opens: they are then read without this class."""

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        """A descriptor of the object, open for positioned reads; the caller closes it. None where there is no such file.

        Args:
            direct: around the page cache (O_DIRECT); None where the file system refuses that.
        """

    # A store with objects in memory of this process also has `local_memory(key) -> array | None`: then that is read.

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start <= i < stop` (to the end when None). A shorter object is `DamagedError(kind="truncated")`."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` on; all of it, or `DamagedError(kind="truncated")`."""

    def size(self, key: str) -> int:
        """Bytes of the object."""

    def exists(self, key: str) -> bool:
        """True when there is an object of this very key. A folder is none."""

    def list(self, prefix: str) -> Entries:
        """All objects below `prefix` ("" or "a/b/"), at any depth, sorted by key. An absent prefix is an empty list."""

    def list_folders(self, prefix: str) -> Names:
        """Names (not keys) of the folders directly below `prefix`, sorted."""

    def open_writer(self, key: str, *, nbytes: int | None = None) -> Writer:
        """Start a new object; `nbytes` is its final size where known.

        AlreadyExistsError if the key exists (best effort). An object is written under a key of its own writer.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write a small object whole and durably, replacing what is there."""

    def create(self, key: str, data: bytes) -> None:
        """Write a small object durably unless the key exists (AlreadyExistsError).

        A refusal or a lost answer is resolved by reading back: if the key holds exactly `data`, this call won.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; absent ones are fine. Folders left empty disappear."""

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        """Remove what dead writers left below `prefix` that is no object: temporary files, open multipart uploads.

        Only what nobody has touched for `older_than_s`, by the store's clock; 0.0 takes all, and empty folders too.
        Returns how many were removed.
        """

    def close(self) -> None:
        """Let go of connections. May be called twice."""


def check_keys(keys: Iterable[str]) -> None:
    """InvalidInputError for a key that could leave the root: empty, absolute, `..`, backslash, control characters."""
    for key in keys:
        parts = key.split("/")
        odd = "\\" in key or any(ord(character) < 32 for character in key)
        if odd or any(part in ("", ".", "..") for part in parts):
            raise InvalidInputError(f"not a key inside the store: {key!r}", kind="bad-key")
