"""Write one new file from front to back, around the page cache where the file system can.

In: memoryviews of any size and alignment. Out: a durable file. Never replaces a file, and never syncs a descriptor
again whose sync failed: Linux then calls the lost pages clean, and the second sync would lie.

Direct I/O takes whole blocks from block-aligned memory. Aligned input goes down as it is; the rest passes through one
aligned buffer of this writer. The last block is padded and the file then cut to its true size. A file system that
refuses direct I/O, at the start or later, is written to through the page cache; `direct` says so.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator

import numpy as np

from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, CheckpointError
from ckpt.kernels import write_at
from ckpt.store.posix_folders import FOLDER_RETRIES, FolderTree, error_of, split_key

BLOCK_BYTES = 4096  # a multiple of every logical block size in use
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class PosixWriter:
    """A `Writer` on a local file. One thread at a time; `direct` says whether the page cache is left out."""

    def __init__(self, tree: FolderTree, *, url: str, key: str, nbytes: int | None, direct: bool, options: Options):
        self._tree = tree
        self._url = url
        self._key = key
        self._folders, self._name = split_key(key)
        self._options = options
        self._staging: mmap.mmap | None = None
        self._staged = 0  # bytes waiting in the staging buffer
        self._written = 0  # bytes given to the kernel
        self._failure: CheckpointError | None = None
        self._committed = False
        self._fd = -1
        self.direct = direct
        with self._explained("create"):
            self._fd = self._open_new(direct)
            self._check_space(nbytes)

    def write(self, data: memoryview) -> None:
        """Append `data`, which may be reused afterwards."""
        if self._failure is not None:
            raise self._failure
        view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        with self._explained("write"):
            if not self.direct:
                self._flush_tail()  # left over from before direct I/O was given up
                self._write_all(view)
                return
            if not self._staged and _is_aligned(view):
                whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
                self._write_all(view[:whole])
                view = view[whole:]
            self._stage(view)

    def commit(self) -> None:
        """Make the file and its name durable. Nothing that was written is sure before this returns."""
        if self._failure is not None:
            raise self._failure
        with self._explained("write"):
            self._flush_tail()
            os.fsync(self._fd)
            self._close()
            self._tree.sync_entries(self._folders)
            with self._tree.opened(self._folders) as folder:
                os.fsync(folder)
        self._committed = True

    def abort(self) -> None:
        """Remove the file unless it is committed."""
        self._close()
        if self._committed:
            return
        self._committed = True
        with contextlib.suppress(FileNotFoundError), self._tree.opened(self._folders) as folder:
            os.unlink(self._name, dir_fd=folder)

    def _open_new(self, direct: bool) -> int:
        for attempt in range(FOLDER_RETRIES):
            try:
                with self._tree.made(self._folders) as folder:
                    return self._open_in(folder, direct)
            except FileNotFoundError:
                if attempt == FOLDER_RETRIES - 1:
                    raise
        raise AssertionError("not reached")

    def _open_in(self, folder: int, direct: bool) -> int:
        if direct:
            try:
                return os.open(self._name, _NEW_FILE | os.O_DIRECT, 0o666, dir_fd=folder)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
                # Some file systems make the file before they refuse the flag.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=folder)
        return os.open(self._name, _NEW_FILE, 0o666, dir_fd=folder)

    def _check_space(self, nbytes: int | None) -> None:
        if nbytes is None:
            return
        space = os.fstatvfs(self._fd)
        free = space.f_bavail * space.f_frsize
        if nbytes > free:
            raise OSError(errno.ENOSPC, f"no space left: {nbytes} bytes wanted, {free} bytes free")

    def _stage(self, view: memoryview) -> None:
        while len(view):
            if self._staging is None:
                self._staging = mmap.mmap(-1, self._options.chunk_bytes)  # anonymous maps are page-aligned
            count = min(len(view), self._options.chunk_bytes - self._staged)
            self._staging[self._staged : self._staged + count] = view[:count]
            self._staged += count
            view = view[count:]
            if self._staged == self._options.chunk_bytes:
                self._write_staged(self._staged)
                self._staged = 0

    def _flush_tail(self) -> None:
        if not self._staged:
            return
        assert self._staging is not None
        size = self._written + self._staged
        padded = -(-self._staged // BLOCK_BYTES) * BLOCK_BYTES if self.direct else self._staged
        self._staging[self._staged : padded] = bytes(padded - self._staged)
        self._write_staged(padded)
        if padded > self._staged:
            os.ftruncate(self._fd, size)
            self._written = size
        self._staged = 0

    def _write_staged(self, count: int) -> None:
        assert self._staging is not None
        with memoryview(self._staging) as staged, staged[:count] as part:
            self._write_all(part)

    def _write_all(self, view: memoryview) -> None:
        """All of `view` behind what is written; `direct` turns off where the system refuses a direct write."""
        options = self._options
        self.direct = write_at(
            self._fd, view, self._written, slice_bytes=options.write_slice_bytes, in_flight=options.write_in_flight
        )
        self._written += len(view)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        self._staging = None  # unmapped with its last view; a traceback may still hold one

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turn an OSError into the error that this writer raises from now on."""
        try:
            yield
        except FileExistsError:
            raise AlreadyExistsError(f"`{self._key}` in {self._url} exists already") from None
        except OSError as error:
            self._failure = error_of(error, url=self._url, key=self._key, verb=verb)
            with contextlib.suppress(OSError):  # the first error is the one to tell; gc removes what is left
                self.abort()
            raise self._failure from error


def _is_aligned(view: memoryview) -> bool:
    if not view.contiguous or not len(view):
        return False
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data) % BLOCK_BYTES == 0
