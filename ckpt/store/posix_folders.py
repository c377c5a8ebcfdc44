"""Reach files below a root folder without ever following a symbolic link, and make folders durable.

In: an absolute root and checked keys. Out: open folder descriptors, and `ckpt.errors` classes for `OSError`s. Never
opens data.

Every folder on the way is opened relative to the one before with O_NOFOLLOW, so a link planted anywhere below the root
is refused even when it appears between two calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

from ckpt.errors import CheckpointError, DamagedError, InvalidInputError, NotFoundError, StoreError

FOLDER_RETRIES = 32  # a folder can vanish between making and using it when another process prunes empty ones
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def split_key(key: str) -> tuple[tuple[str, ...], str]:
    """Folder names and file name of a key."""
    *folders, name = key.split("/")
    return tuple(folders), name


def error_of(error: OSError, *, url: str, key: str, verb: str) -> CheckpointError:
    """The `ckpt` error that says what `error` means for the object `key` below `url`."""
    place = f"`{key}` in {url}" if key else url
    code = error.errno
    text = f"cannot {verb} {place}: {error.strerror or error}"
    if code == errno.ENOENT:
        return NotFoundError(f"no object {place}", kind="no-object")
    if code in (errno.ELOOP, errno.ENXIO):
        return DamagedError(f"{place} is not a regular file, will not {verb} it", kind="not-a-file")
    if code == errno.ENOTDIR:
        return DamagedError(f"cannot {verb} {place}: what should be a folder is a link or a file", kind="not-a-file")
    if code == errno.ENAMETOOLONG:
        return InvalidInputError(text, kind="bad-key")
    if code in _FULL:
        hint = "free space there, raise the quota or file size limit, or save somewhere else"
        return StoreError(text, kind="full", hints=(hint,))
    if code in _DENIED:
        return StoreError(text, kind="denied", hints=("check owner, permissions and mount options of the folder",))
    if code in (errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ESTALE, errno.ENOTCONN):
        return StoreError(text, kind="unreachable")
    return StoreError(text, kind="io")


class FolderTree:
    """The folders below `root`. Any thread. Knows which folders this process has already made durable."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._durable: set[tuple[str, ...]] = set()  # folders whose entry in their parent is known to be synced
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self, folders: tuple[str, ...]) -> Iterator[int]:
        """Descriptor of an existing folder below the root; OSError when it is absent or a link."""
        fd = os.open(self._root, _FOLDER_FLAGS)  # the root itself may be a link: it is the user's word
        try:
            for name in folders:
                child = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = child
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def made(self, folders: tuple[str, ...]) -> Iterator[int]:
        """As `opened`, with missing folders made. They are durable after `sync_entries` only.

        Apart, because an empty folder may be pruned by another process while its parent is synced, which takes a while:
        the caller puts a file into it first.
        """
        self._make_root()
        fd = os.open(self._root, _FOLDER_FLAGS)
        try:
            for depth, name in enumerate(folders, start=1):
                self._make(fd, name, folders[:depth])
                child = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = child
            yield fd
        finally:
            os.close(fd)

    def sync_entries(self, folders: tuple[str, ...]) -> None:
        """Sync the entries of `folders` and its parents, as far as this process has not done so already.

        Also of folders that were there: another process may have made them and died before its sync.
        """
        for depth in range(1, len(folders) + 1):
            if folders[:depth] not in self._durable:
                with self.opened(folders[: depth - 1]) as parent:
                    os.fsync(parent)
                with self._lock:
                    self._durable.add(folders[:depth])

    def prune(self, folders: tuple[str, ...]) -> None:
        """Remove `folders` and its parents below the root as far as they are empty."""
        for depth in range(len(folders), 0, -1):
            try:
                with self.opened(folders[: depth - 1]) as parent:
                    os.rmdir(folders[depth - 1], dir_fd=parent)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return
                if error.errno != errno.ENOENT:
                    raise
            with self._lock:
                self._durable.discard(folders[:depth])

    def _make_root(self) -> None:
        if os.path.exists(self._root) and not os.path.isdir(self._root):
            raise InvalidInputError(f"{self._root} is a file, not a folder", kind="bad-url")
        missing = []
        path = self._root
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            sync_folder(os.path.dirname(folder))
        if missing:
            with self._lock:
                self._durable.clear()

    def _make(self, parent: int, name: str, folders: tuple[str, ...]) -> None:
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:
            return
        with self._lock:
            self._durable.discard(folders)


def sync_folder(path: str) -> None:
    """Make the entries of the folder `path` durable."""
    fd = os.open(path, _FOLDER_FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
