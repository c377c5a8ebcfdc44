"""Upload one new object in parts, several at a time, in bounded memory.

In: memoryviews of any size. Out: an S3 object, visible only when `commit` returns. Never keeps more parts in memory
than the store has slots for, plus the one being filled; never leaves an upload open after `abort`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ckpt.config import KIB, MIB
from ckpt.errors import CheckpointError, NotFoundError, StoreError

if TYPE_CHECKING:
    from ckpt.store.s3 import S3Store

_READ_BYTES = 256 * KIB  # that a request takes of a part at a time
PARTS_MAX = 10_000  # of S3
PART_BYTES_MIN = 5 * MIB  # of S3, for all parts but the last


class S3Writer:
    """A `Writer` by multipart upload; an object of less than one part is a single put. One thread at a time."""

    def __init__(self, store: S3Store, key: str, *, nbytes: int | None, part_bytes: int) -> None:
        self._store = store
        self._key = key
        self._part_bytes = part_size(nbytes, part_bytes)
        self._part = io.BytesIO()  # a file, because aiohttp sends large plain bytes in one piece and blocks the loop
        self._filled = 0  # bytes in it
        self._nbytes = 0
        self._upload_id: str | None = None
        self._parts: list[Future[str]] = []
        self._failure: CheckpointError | None = None
        self._done = False

    def write(self, data: memoryview) -> None:
        """Append `data`, which may be reused afterwards. Waits while all upload slots are taken."""
        if self._failure is not None:
            raise self._failure
        view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        while len(view):
            count = min(len(view), self._part_bytes - self._filled)
            self._part.write(view[:count])
            self._filled += count
            self._nbytes += count
            view = view[count:]
            if self._filled == self._part_bytes:
                self._send_part()

    def write_lasting(self, data: memoryview) -> None:
        """Append `data`, which stays as it is until `commit` or `abort` returns: whole parts are sent without a copy."""
        view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        while self._failure is None and not self._filled and len(view) >= self._part_bytes:
            part, view = view[: self._part_bytes], view[self._part_bytes :]
            self._nbytes += len(part)
            self._send(io.BufferedReader(_Reader(part), _READ_BYTES))
        self.write(view)

    def commit(self) -> None:
        """Make the object visible and durable."""
        if self._failure is not None:
            raise self._failure
        if self._upload_id is None:
            self._store.request(self._key, "write", "put_object", Body=_rewound(self._part))
        else:
            if self._filled:
                self._send_part()
            self._complete()
        self._done = True

    def abort(self) -> None:
        """Drop the upload and its parts. Of one that cannot be dropped now, `gc` takes care."""
        if self._done:
            return
        self._done = True
        self._part = io.BytesIO()
        # Not cancelled but awaited: a part that arrives after the abort would stay on the bill.
        concurrent.futures.wait(self._parts, timeout=self._store.timeout_s)
        if self._upload_id is not None:
            with contextlib.suppress(StoreError, NotFoundError):
                self._store.request(self._key, "abort", "abort_multipart_upload", UploadId=self._upload_id)

    def _send_part(self) -> None:
        part, self._part, self._filled = self._part, io.BytesIO(), 0
        self._send(_rewound(part))

    def _send(self, part: io.BytesIO | io.BufferedReader) -> None:
        number = len(self._parts) + 1
        try:
            if number > PARTS_MAX:
                text = f"`{self._key}` needs more than {PARTS_MAX} parts of {self._part_bytes} bytes"
                raise StoreError(text, kind="too-large", hints=("raise `part_bytes`",))
            if self._upload_id is None:
                answer = self._store.request(self._key, "start the upload of", "create_multipart_upload")
                self._upload_id = answer["UploadId"]
            self._raise_failed_part()
            self._parts.append(self._store.send_part(self._key, self._upload_id, number, part))
        except CheckpointError as error:
            self._failure = error
            raise

    def _raise_failed_part(self) -> None:
        for part in self._parts:
            if part.done():
                self._store.finish(part, self._key)

    def _complete(self) -> None:
        tags = [self._store.finish(part, self._key) for part in self._parts]
        listing: list[dict[str, Any]] = [{"PartNumber": i, "ETag": tag} for i, tag in enumerate(tags, start=1)]
        try:
            self._store.request(
                self._key, "finish the upload of", "complete_multipart_upload",
                UploadId=self._upload_id, MultipartUpload={"Parts": listing},
            )  # fmt: skip
        except (StoreError, NotFoundError):
            # The answer may have been lost and the repeated request have found no such upload. Nobody else writes this
            # key, so an object of this size is ours.
            if not self._landed():
                raise

    def _landed(self) -> bool:
        try:
            return self._store.size(self._key) == self._nbytes
        except (StoreError, NotFoundError):
            return False


class _Reader(io.RawIOBase):
    """A file over memory of somebody else's."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._view) - self._at)
        buffer[:count] = self._view[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def _rewound(part: io.BytesIO) -> io.BytesIO:
    part.seek(0)
    return part


def part_size(nbytes: int | None, part_bytes: int) -> int:
    """Bytes of one part: as configured, but within the limits of S3. All parts but the last are equal (R2 wants it)."""
    size = max(part_bytes, PART_BYTES_MIN)
    if nbytes is not None:
        size = max(size, -(-nbytes // PARTS_MAX // MIB) * MIB if nbytes > size * PARTS_MAX else size)
    return size
