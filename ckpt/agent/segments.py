"""Shared memory with a name: files in a tmpfs that outlive the process that made them.

In: identities, sizes. Out: segments with a header (header.py) and a payload. One agent owns a segment: it alone changes the
header, and it holds a lock on the file while it lives. A trainer gets a descriptor of its own and maps the payload. What a dead
agent left is adopted by the next one of the same run and rank, and removed by anybody's once its lease is over. Never touches
what a living process or another user holds. Sizes are looked at before every map: a shortened file would kill with SIGBUS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.agent import header as headers
from ckpt.agent.header import HEADER_BYTES, Header, State
from ckpt.agent.identity import Identity, check_private, make_private
from ckpt.agent.owner import Owner, boot_id, since_boot_ns
from ckpt.config import AGENT_POPULATE_BYTES
from ckpt.errors import BudgetError, CheckpointError, DamagedError, NotFoundError
from ckpt.kernels import crc32c

PAGE_BYTES = mmap.PAGESIZE
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{5,9})-[0-9a-f]{8}\.seg")
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO must not hold us
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which the mmap module does not name
_YOUNG_S = 60.0  # a file without a header that is younger may just be made


class Segment:
    """A segment that this process owns. One thread at a time; the payload is written by others."""

    def __init__(self, path: Path, fd: int, header: Header) -> None:
        self.path, self._fd, self._header = path, fd, header
        _check_size(fd, path, header.capacity_bytes)
        self._map = mmap.mmap(fd, HEADER_BYTES + header.capacity_bytes)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core file is no place for weights
        self.populate_s = 0.0

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    def header(self) -> Header:
        """As it was written last."""
        return self._header

    def update(self, **changes: object) -> Header:
        """Change fields of the header. A crash meanwhile leaves the old one or the new one."""
        changes = {"sequence": self._header.sequence + 1, "alive_ns": since_boot_ns(), **changes}
        header = dataclasses.replace(self._header, **changes)  # type: ignore[arg-type]
        place = headers.place_of(header.sequence)
        self._map[place : place + headers.PACKED_BYTES] = headers.pack(header)
        self._header = header
        return header

    def populate(self) -> float:
        """Touch every page for the first time, so that no copy has to; seconds. BudgetError when memory runs out."""
        start = time.perf_counter()
        for low in range(0, len(self._map), AGENT_POPULATE_BYTES):
            nbytes = min(AGENT_POPULATE_BYTES, len(self._map) - low)
            _allocate(self._fd, low, nbytes, self.path)
            _touch(self._map, low, nbytes)
        self.populate_s = time.perf_counter() - start
        return self.populate_s

    def begin(self, *, generation: int, step: int, attempt: str, epoch: int, world: int) -> Header:
        """A trainer is about to write an image. What was there no longer counts."""
        return self.update(
            state=State.WRITING,
            generation=generation,
            step=step,
            attempt=attempt,
            epoch=epoch,
            world=world,
            image_bytes=0,
            image_crc=None,
        )

    def seal(self, image_bytes: int, image_crc: int | None = None) -> Header:
        """The image is complete. Its checksum is taken here if it is not given."""
        crc = self.crc(image_bytes) if image_crc is None else image_crc
        return self.update(state=State.SEALED, image_bytes=image_bytes, image_crc=crc)

    def empty(self) -> Header:
        """Forget the image."""
        return self.update(state=State.EMPTY, step=-1, attempt="", image_bytes=0, image_crc=None)

    def crc(self, image_bytes: int | None = None) -> int:
        """CRC-32C of the image as it is now."""
        nbytes = self._header.image_bytes if image_bytes is None else image_bytes
        _check_size(self._fd, self.path, self._header.capacity_bytes)
        with memoryview(self._map) as whole, whole[HEADER_BYTES : HEADER_BYTES + nbytes] as image:
            return crc32c(image)

    @contextmanager
    def image(self) -> Iterator[memoryview]:
        """The bytes of the image, read-only, in the shared pages themselves. Released at the end of the block."""
        _check_size(self._fd, self.path, self._header.capacity_bytes)
        with memoryview(self._map) as whole, whole[HEADER_BYTES : HEADER_BYTES + self._header.image_bytes] as image:
            with image.toreadonly() as view:
                yield view

    def payload(self) -> memoryview:
        """All bytes behind the header, writable, in the shared pages themselves. They stay mapped while the view lives."""
        _check_size(self._fd, self.path, self._header.capacity_bytes)
        return memoryview(self._map)[HEADER_BYTES:]

    @property
    def is_whole(self) -> bool:
        """Whether there is an image and its checksum is right."""
        return self._header.is_complete and self._header.image_crc == self.crc()

    def open_again(self) -> int:
        """A descriptor to pass to the trainer: not the one that holds the lock. The caller closes it."""
        fd = os.open(self.path, _OPEN)
        if os.fstat(fd).st_ino != os.fstat(self._fd).st_ino:
            os.close(fd)
            raise DamagedError(f"segment `{self.path}` was replaced by another file", kind="replaced")
        return fd

    def unlink(self) -> None:
        """Remove the name and let go of the memory; who has it mapped keeps it."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of it and leave the file to the next agent. May be called twice."""
        if self._fd >= 0:
            with contextlib.suppress(BufferError):  # a stream to a peer still looks at it; the pages go with that
                self._map.close()
            os.close(self._fd)
            self._fd = -1


def create(folder: Path, identity: Identity, capacity_bytes: int) -> Segment:
    """A new segment, EMPTY, its size up to a whole page, its pages not yet touched. Makes the folder if it is missing."""
    capacity_bytes = max(PAGE_BYTES, -(-capacity_bytes // PAGE_BYTES) * PAGE_BYTES)
    path = folder / f"{identity.run_id.hex}-{identity.rank:05d}-{secrets.token_hex(4)}.seg"
    fd = _create(folder, path)
    try:
        os.ftruncate(fd, HEADER_BYTES + capacity_bytes)
        header = Header(
            state=State.EMPTY,
            sequence=0,
            run_id=identity.run_id,
            rank=identity.rank,
            world=identity.world,
            incarnation=identity.incarnation,
            epoch=0,
            owner=Owner.current(),
            alive_ns=since_boot_ns(),
            generation=0,
            step=-1,
            attempt="",
            capacity_bytes=capacity_bytes,
            image_bytes=0,
        )
        _allocate(fd, 0, HEADER_BYTES, path)
        segment = Segment(path, fd, header)
        segment.update()
        return segment
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(fd)
        raise


def peek(path: Path) -> Header:
    """The header of any segment of this user. NotFoundError, DamagedError or VersionError when there is none to read."""
    fd = _open(path, os.O_RDONLY)
    try:
        return _read_header(fd, path)
    finally:
        os.close(fd)


def adopt(path: Path, identity: Identity) -> Segment:
    """Become the owner of what a dead agent left. An image that a trainer was writing, or that is damaged, is given up.

    Raises:
        NotFoundError: `held`: somebody lives who holds it; or it is gone.
        DamagedError: it has no header, another size than the header says, or another run or rank.
    """
    fd = _open(path, os.O_RDWR)
    try:
        _lock(fd, path)
        header = _read_header(fd, path)
        if not header.belongs_to(identity):
            raise DamagedError(f"segment `{path}` is of run {header.run_id}, rank {header.rank}", kind="other-run")
        segment = Segment(path, fd, header)
    except BaseException:
        os.close(fd)
        raise
    segment.update(owner=Owner.current(), incarnation=identity.incarnation)
    if segment.header.state is not State.EMPTY and not segment.is_whole:
        segment.empty()
    return segment


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A segment that no living process holds."""

    path: Path
    header: Header | None  # None: there is none that could be read
    nbytes: int

    def is_over(self, lease_s: float) -> bool:
        """Whether its agent is dead for longer than the lease: nobody comes back for it."""
        if self.header is None or self.header.owner.boot_id != boot_id():
            return True
        return since_boot_ns() - self.header.alive_ns > lease_s * 1e9


def listing(folder: Path) -> list[Path]:
    """The segments in the folder, by name; none when there is no folder."""
    try:
        check_private(folder)
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []


def leftovers(folder: Path) -> list[Leftover]:
    """What dead agents of this user left, of any run."""
    return [found for path in listing(folder) if (found := _leftover(path, _YOUNG_S)) is not None]


def living(folder: Path, identity: Identity) -> list[Header]:
    """Headers of segments of this run and rank that another living agent holds."""
    out = []
    for path in listing(folder):
        try:
            header = peek(path)
        except CheckpointError:
            continue
        if header.belongs_to(identity) and _is_held(path):
            out.append(header)
    return out


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep did."""

    adopted: list[Segment]
    removed: list[Leftover]
    given_up: list[str]  # names of segments of this rank that could not be adopted, with the reason


def sweep(
    folder: Path, identity: Identity | None, *, lease_s: float, tell: Callable[[str], None] = lambda _: None
) -> Swept:
    """Adopt what a dead agent of the same run and rank left; remove what nobody will come back for. Locks nothing that lives.

    Args:
        identity: adopts; None: only removes. The caller holds the lock of this run and rank.
        tell: what could not be looked at.
    """
    adopted: list[Segment] = []
    removed: list[Leftover] = []
    given_up: list[str] = []
    for path in listing(folder):
        mine = identity is not None and _is_named_for(path, identity)
        left = _leftover(path, grace_s=0.0 if mine else _YOUNG_S)
        if left is None:
            continue
        try:
            if mine and identity is not None:
                adopted.append(adopt(left.path, identity))
            elif left.is_over(lease_s) and remove(left):
                removed.append(left)
        except NotFoundError:
            continue  # somebody was quicker
        except DamagedError as error:
            given_up.append(f"{left.path.name}: {error.message}")
            remove(left)
        except CheckpointError as error:  # of a newer program, say: not ours to judge
            tell(f"{left.path.name}: {error.message}")
    return Swept(adopted=adopted, removed=removed, given_up=given_up)


def _create(folder: Path, path: Path) -> int:
    """The empty file, locked. The folder may go away between the two calls, when its last agent ends."""
    while True:
        make_private(folder)
        try:
            fd = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd


def _open(path: Path, mode: int) -> int:
    """A regular file of this user with one name, never one that a link points to."""
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"segment `{path}` is gone", kind="no-segment") from None
    except OSError as error:
        raise DamagedError(f"segment `{path}` cannot be opened: {error.strerror}", kind="unsafe-segment") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077 or found.st_nlink > 1:
        os.close(fd)
        raise DamagedError(
            f"segment `{path}` is not a file of this user alone: mode {found.st_mode:o}, user {found.st_uid}",
            kind="unsafe-segment",
        )
    return fd


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotFoundError(f"segment `{path}` is held by a living agent", kind="held") from None
    if os.fstat(fd).st_nlink == 0:
        raise NotFoundError(f"segment `{path}` is gone", kind="no-segment")


def _is_held(path: Path) -> bool:
    """Whether a living process has it locked; wherever that runs, in another pid namespace, too."""
    try:
        fd = _open(path, os.O_RDONLY)
    except CheckpointError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _read_header(fd: int, path: Path) -> Header:
    nbytes = os.fstat(fd).st_size
    for last in (False, False, True):  # its owner may be writing both copies, one after the other, while we read
        try:
            header = headers.unpack(os.pread(fd, HEADER_BYTES, 0))
        except DamagedError:
            if last:
                raise DamagedError(f"segment `{path}` has no whole header", kind="no-header") from None
            continue
        break
    if nbytes != HEADER_BYTES + header.capacity_bytes:
        raise _wrong_size(path, nbytes, header.capacity_bytes)
    return header


def _is_named_for(path: Path, identity: Identity) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and (match[1], int(match[2])) == (identity.run_id.hex, identity.rank)


def _leftover(path: Path, grace_s: float) -> Leftover | None:
    """None for what lives, what is just being made, and what is not ours."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or _is_held(path):
        return None
    try:
        header = peek(path)
    except NotFoundError:
        return None
    except CheckpointError as error:
        is_young = time.time() - found.st_mtime < grace_s
        return (
            None
            if is_young or error.kind == "newer-segment"
            else Leftover(path=path, header=None, nbytes=found.st_size)
        )
    if header.owner.is_alive and header.owner != Owner.current():
        return None
    return Leftover(path=path, header=header, nbytes=found.st_size)


def remove(left: Leftover) -> bool:
    """Remove a leftover, unless somebody has adopted it meanwhile."""
    try:
        fd = _open(left.path, os.O_RDWR)
    except CheckpointError:
        return False
    try:
        _lock(fd, left.path)
        left.path.unlink(missing_ok=True)
        return True
    except NotFoundError:
        return False
    finally:
        os.close(fd)


def _check_size(fd: int, path: Path, capacity_bytes: int) -> None:
    nbytes = os.fstat(fd).st_size
    if nbytes != HEADER_BYTES + capacity_bytes:
        raise _wrong_size(path, nbytes, capacity_bytes)


def _wrong_size(path: Path, nbytes: int, capacity_bytes: int) -> DamagedError:
    return DamagedError(
        f"segment `{path}` has another size: expected {HEADER_BYTES + capacity_bytes} bytes, found {nbytes}",
        kind="wrong-size",
    )


def _allocate(fd: int, start: int, nbytes: int, path: Path) -> None:
    """Take the pages from the file system, which says so when it has none: a map would end in SIGBUS."""
    try:
        os.posix_fallocate(fd, start, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise BudgetError(f"no memory for `{path}`: {error.strerror} after {start:,} bytes") from error


def _touch(memory: mmap.mmap, start: int, nbytes: int) -> None:
    """Enter the pages in our page table, for writing."""
    try:
        memory.madvise(_POPULATE_WRITE, start, nbytes)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.14
            raise
        for place in range(start, start + nbytes, PAGE_BYTES):
            memory[place] = memory[place]
