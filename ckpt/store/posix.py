"""Bytes by key in a local (or mounted) folder, durable when a call returns.

In: keys and bytes. Out: regular files. Never follows a symbolic link below the root, never reads anything but a regular
file, never shows a half-written object made by `put` or `create`: those are written under a temporary name in the same
folder, synced, and then renamed or linked, and the folder is synced. (The local file systems of fsspec and obstore
never sync.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence

from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, DamagedError, InvalidInputError, NotFoundError, StoreError
from ckpt.store.base import Entries, Entry, Names, check_keys
from ckpt.store.posix_folders import FOLDER_RETRIES, FolderTree, error_of, split_key
from ckpt.store.posix_writer import PosixWriter

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not block us
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_APPENDED_FILE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_TEMPORARY = ".tmp-"  # begins the name of every unfinished file; no key may begin so
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_RENAME_NOREPLACE = 1
_Files = list[tuple[str, os.stat_result]]


class PosixStore:
    """A `Store` on a folder. Any thread, any process; nothing is kept open between calls but what `open_local` gave."""

    conditional_create = True  # link(2) refuses to replace, on every file system that has it
    local_files = True

    def __init__(self, root: str | os.PathLike[str], *, options: Options) -> None:
        self._url = os.fspath(root)
        self._root = os.path.abspath(self._url)
        self._options = options
        self._tree = FolderTree(self._root)

    @property
    def url(self) -> str:
        return self._url

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._opened(key) as (fd, size):
            end = max(start, size) if stop is None else stop
            self._check_range(key, start, end, size)
            buffer = bytearray(end - start)
            self._fill(fd, key, start, memoryview(buffer))
            return bytes(buffer)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        with self._opened(key) as (fd, size):
            self._check_range(key, start, start + len(view), size)
            self._fill(fd, key, start, view)

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        if not direct:
            with self._opened(key) as (fd, _):
                return os.dup(fd)
        try:
            with self._opened(key, os.O_DIRECT) as (fd, _):
                return os.dup(fd)
        except (StoreError, InvalidInputError):  # EINVAL: a file system without it
            return None

    def size(self, key: str) -> int:
        with self._opened(key) as (_, size):
            return size

    def exists(self, key: str) -> bool:
        """True for a regular file; a folder, link or device of that name is no object."""
        folders, name = _parts(key)
        try:
            with self._tree.opened(folders) as folder:
                return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False  # behind a link or below a file there is no object either
            raise self._error(error, key, "look for") from error

    def list(self, prefix: str) -> Entries:
        entries: Entries = []
        self._walk(_prefix_parts(prefix), entries)
        return sorted(entries, key=lambda entry: entry.key)

    def list_folders(self, prefix: str) -> Names:
        folders, _ = self._scan(_prefix_parts(prefix))
        return folders

    def open_writer(self, key: str, *, nbytes: int | None = None) -> PosixWriter:
        _parts(key)
        options = self._options
        return PosixWriter(
            self._tree,
            url=self._url,
            key=key,
            nbytes=nbytes,
            direct=options.direct_io and (nbytes is None or nbytes >= options.chunk_bytes),
            options=options,
        )

    def put(self, key: str, data: bytes) -> None:
        with self._written_aside(key, data) as (folder, temporary, name):
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)

    def create(self, key: str, data: bytes) -> None:
        try:
            with self._written_aside(key, data) as (folder, temporary, name):
                _publish_new(folder, temporary, name)
                os.fsync(folder)
        except FileExistsError:
            # On NFS the answer to a link that landed can be lost and the repeated one refused: look who is there.
            if self.read(key) != data:
                raise AlreadyExistsError(f"`{key}` in {self._url} exists already") from None
            self._sync_folder_of(key)

    def append(self, key: str, data: bytes) -> None:
        """Add to the end of a file, made where there is none, in one write and without syncing: for logs, not for data.

        Not of `Store`: object stores cannot.
        """
        folders, name = _parts(key)
        try:
            with self._tree.made(folders) as folder:
                fd = os.open(name, _APPENDED_FILE, 0o666, dir_fd=folder)
            try:
                if os.write(fd, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise self._error(error, key, "append to") from error

    def delete(self, keys: Sequence[str]) -> None:
        touched: set[tuple[str, ...]] = set()
        for key in keys:
            folders, name = _parts(key)
            touched.add(folders)
            try:
                with self._tree.opened(folders) as folder:
                    os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._error(error, key, "delete") from error
        for folders in sorted(touched, key=lambda parts: (-len(parts), parts)):
            self._forget_folder(folders)

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        """Remove unfinished files and empty folders below `prefix` that nobody touched for `older_than_s`."""
        parts = _prefix_parts(prefix)
        if not os.path.isdir(self._root):
            return 0
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        with self._made_with_file((), temporary) as (folder, fd):
            now_s = os.fstat(fd).st_mtime  # the clock of the file server, not of this machine
            os.unlink(temporary, dir_fd=folder)
        return self._sweep(parts, older_than_s, now_s)

    def close(self) -> None:
        """Nothing is held."""

    # ---- reading

    @contextlib.contextmanager
    def _opened(self, key: str, flags: int = 0) -> Iterator[tuple[int, int]]:
        """Descriptor and size of a regular file."""
        folders, name = _parts(key)
        try:
            with self._tree.opened(folders) as folder:
                fd = os.open(name, _READ_FLAGS | flags, dir_fd=folder)
        except OSError as error:
            raise self._error(error, key, "read") from error
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise NotFoundError(f"no object `{key}` in {self._url}: it is a folder", kind="no-object")
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(f"`{key}` in {self._url} is not a regular file, will not read it", kind="not-a-file")
            yield fd, status.st_size
        finally:
            os.close(fd)

    def _fill(self, fd: int, key: str, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], start + done)
            except OSError as error:
                raise self._error(error, key, "read") from error
            if count == 0:
                raise self._truncated(key, start + len(view), start + done)
            done += count

    def _check_range(self, key: str, start: int, stop: int, size: int) -> None:
        if start < 0 or stop < start:
            raise InvalidInputError(f"not a byte range: {start} to {stop} of `{key}`")
        if stop > size:
            raise self._truncated(key, stop, size)

    def _truncated(self, key: str, expected: int, found: int) -> DamagedError:
        text = f"`{key}` in {self._url} is truncated: expected at least {expected} bytes, found {found}"
        return DamagedError(text, kind="truncated")

    def _error(self, error: OSError, key: str, verb: str) -> Exception:
        return error_of(error, url=self._url, key=key, verb=verb)

    # ---- writing

    @contextlib.contextmanager
    def _written_aside(self, key: str, data: bytes) -> Iterator[tuple[int, str, str]]:
        """Folder, temporary name and final name, with `data` durable under the temporary one.

        A FileExistsError of the body passes as it is.
        """
        folders, name = _parts(key)
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with self._made_with_file(folders, temporary) as (folder, fd):
                try:
                    _write_and_sync(fd, data)
                    self._tree.sync_entries(folders)
                    yield folder, temporary, name
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=folder)
        except FileExistsError:
            raise
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise self._error(error, key, "write") from error

    @contextlib.contextmanager
    def _made_with_file(self, folders: tuple[str, ...], name: str) -> Iterator[tuple[int, int]]:
        """Folder and a new file in it; made again when another process pruned the folder in between."""
        for attempt in range(FOLDER_RETRIES):
            with contextlib.ExitStack() as stack:
                try:
                    folder = stack.enter_context(self._tree.made(folders))
                    fd = os.open(name, _NEW_FILE, 0o666, dir_fd=folder)
                except FileNotFoundError:
                    if attempt == FOLDER_RETRIES - 1:
                        raise
                    continue
                stack.callback(os.close, fd)
                yield folder, fd
                return

    def _sync_folder_of(self, key: str) -> None:
        folders, _ = _parts(key)
        try:
            with self._tree.opened(folders) as folder:
                os.fsync(folder)
        except OSError as error:
            raise self._error(error, key, "sync") from error

    # ---- listing and removing

    def _scan(self, folders: tuple[str, ...]) -> tuple[Names, _Files]:
        """Sorted names of the folders and of the regular files in a folder; links and devices are left out."""
        subfolders: Names = []
        files: _Files = []
        try:
            with self._tree.opened(folders) as fd, os.scandir(fd) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        subfolders.append(item.name)
                    elif item.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            files.append((item.name, os.stat(item.name, dir_fd=fd, follow_symlinks=False)))
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        except OSError as error:
            raise self._error(error, "/".join(folders), "list") from error
        return sorted(subfolders), sorted(files, key=lambda file: file[0])

    def _walk(self, folders: tuple[str, ...], entries: Entries) -> None:
        subfolders, files = self._scan(folders)
        for name, status in files:
            if not name.startswith(_TEMPORARY):
                key = "/".join((*folders, name))
                entries.append(Entry(key=key, nbytes=status.st_size, modified_s=status.st_mtime))
        for name in subfolders:
            self._walk((*folders, name), entries)

    def _sweep(self, folders: tuple[str, ...], older_than_s: float, now_s: float) -> int:
        subfolders, files = self._scan(folders)
        removed = sum(self._sweep((*folders, name), older_than_s, now_s) for name in subfolders)
        try:
            with self._tree.opened(folders) as folder:
                empty = not files and not subfolders and now_s - os.fstat(folder).st_mtime >= older_than_s
                for name, status in files:
                    if name.startswith(_TEMPORARY) and now_s - status.st_mtime >= older_than_s:
                        os.unlink(name, dir_fd=folder)
                        removed += 1
        except FileNotFoundError:
            return removed  # its writer, or another gc, was faster
        except OSError as error:
            raise self._error(error, "/".join(folders), "sweep") from error
        if empty and folders:
            self._forget_folder(folders)
        return removed

    def _forget_folder(self, folders: tuple[str, ...]) -> None:
        try:
            self._tree.prune(folders)
        except OSError as error:
            raise self._error(error, "/".join(folders), "remove") from error


def _parts(key: str) -> tuple[tuple[str, ...], str]:
    check_keys([key])
    folders, name = split_key(key)
    if name.startswith(_TEMPORARY):
        raise InvalidInputError(f"a key may not begin with {_TEMPORARY!r}: {key!r}", kind="bad-key")
    return folders, name


def _prefix_parts(prefix: str) -> tuple[str, ...]:
    if not prefix:
        return ()
    if not prefix.endswith("/"):
        raise InvalidInputError(f"a prefix is empty or ends with a slash, found {prefix!r}", kind="bad-key")
    check_keys([prefix[:-1]])
    return tuple(prefix[:-1].split("/"))


def _write_and_sync(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        count = os.write(fd, view)
        if count == 0:
            raise OSError(errno.EIO, "the kernel took no bytes")
        view = view[count:]
    os.fsync(fd)


def _publish_new(folder: int, temporary: str, name: str) -> None:
    """Give a file its final name; FileExistsError when the name is taken."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_noreplace(folder, temporary, name)


def _rename_noreplace(folder: int, temporary: str, name: str) -> None:
    """For file systems without hard links. Not an atomic refusal there either: an error, never a silent replace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(folder, temporary.encode(), folder, name.encode(), _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        raise FileExistsError(code, os.strerror(code), name)
    raise StoreError(
        f"the file system can neither link nor rename without replacing ({os.strerror(code)})",
        kind="no-exclusive-create",
        hints=("save to a local disk, NFS, Lustre, GPFS or an object store",),
    )
