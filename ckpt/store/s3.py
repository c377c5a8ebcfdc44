"""Bytes by key in an S3 bucket, through s3fs.

In: an `s3://bucket/prefix` URL; endpoint, region and credentials from the environment, a profile, or storage options.
Out: a `Store`. Never caches a listing, never takes a refusal or a lost answer for a verdict before it has read back,
never puts a credential into a URL or a message.

Requests are made on the event loop thread of fsspec. Retries with back-off are botocore's (`store_attempts`). Whether
the server honours `If-None-Match: *` is probed on first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import io
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

import fsspec.asyn
from s3fs import S3FileSystem

from ckpt.config import MIB, OBJECT_BYTES_MAX, Options
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, NotFoundError, StoreError
from ckpt.store.base import Entries, Entry, Names, check_keys
from ckpt.store.s3_errors import code_of, error_of
from ckpt.store.s3_session import shared_filesystem
from ckpt.store.s3_upload import S3Writer

_T = TypeVar("_T")
PAGE_KEYS = 1000  # of one listing request; the most that S3 gives
SLOWEST_BYTES_PER_S = MIB  # a transfer slower than this is given up
_PAUSE_S = 0.1  # between tries to create


class S3Store:
    """A `Store` in S3. Any thread; a forked process makes its own connections."""

    local_files = False

    def __init__(self, url: str, *, options: Options, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._bucket, _, prefix = self._url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options
        self._storage_options = dict(storage_options or {})
        self._system: tuple[int, S3FileSystem] | None = None  # with the process that it belongs to
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(options.store_threads)  # parts on their way
        self._conditional: bool | None = None
        # Of one small request with all its retries and pauses. botocore ends earlier; this is for a loop that hangs.
        seconds = options.connect_timeout_s + options.read_timeout_s
        self.timeout_s = options.store_attempts * seconds + 2.0 ** min(options.store_attempts, 6)

    @property
    def url(self) -> str:
        return self._url

    @property
    def conditional_create(self) -> bool:
        with self._lock:
            if self._conditional is None:
                self._conditional = self._probe()
            return self._conditional

    # ---- reading

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        return None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None and start:
            # Asked for first, because rclone's server spins for ever over a range that begins after the end.
            stop = max(start, self.size(key))
        if stop is None:
            return self._run(key, "read", lambda: self._get(key), nbytes=OBJECT_BYTES_MAX)
        buffer = bytearray(_check_range(key, start, stop))
        self.read_into(key, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        if not len(view):
            self._check_size(key, _check_range(key, start, start) + start)
            return
        self._run(key, "read", lambda: self._get_into(key, start, view), nbytes=len(view))

    def size(self, key: str) -> int:
        return int(self.request(key, "look at", "head_object")["ContentLength"])

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Entries:
        entries = []
        for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if not key.endswith("/"):  # a console's idea of a folder
                    modified_s = item["LastModified"].timestamp()
                    entries.append(Entry(key=key, nbytes=int(item["Size"]), modified_s=modified_s))
        return sorted(entries, key=lambda entry: entry.key)

    def list_folders(self, prefix: str) -> Names:
        start = len(self._prefix) + len(prefix)
        found = {
            item["Prefix"][start:].rstrip("/")
            for page in self._pages(prefix, Delimiter="/")
            for item in page.get("CommonPrefixes", ())
        }
        return sorted(found)

    # ---- writing

    def open_writer(self, key: str, *, nbytes: int | None = None) -> S3Writer:
        if self.exists(key):
            raise AlreadyExistsError(f"`{key}` in {self._url} exists already")
        return S3Writer(self, key, nbytes=nbytes, part_bytes=self._options.part_bytes)

    def put(self, key: str, data: bytes) -> None:
        self.request(key, "write", "put_object", Body=io.BytesIO(data))

    def create(self, key: str, data: bytes) -> None:
        conditions = {"IfNoneMatch": "*"} if self.conditional_create else {}
        if not conditions and self._is_there(key, data):
            return
        error: CheckpointError | None = None
        for attempt in range(self._options.store_attempts):
            if attempt:
                time.sleep(_PAUSE_S * 2**attempt)
            try:
                self.request(key, "create", "put_object", Body=io.BytesIO(data), **conditions)
                if conditions or self._is_there(key, data):
                    return
            except AlreadyExistsError as refusal:
                error = refusal
            except StoreError as lost:
                if lost.kind != "unreachable":
                    raise
                error = lost
            # A 412 can be the answer to our own request, sent again by botocore after its answer was lost; a 409 says
            # that the server could not decide. Only what the key holds is a verdict.
            if self._is_there(key, data):
                return
        assert error is not None
        raise error

    def delete(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        self._run("", "delete objects in", lambda: self._delete_all(keys))

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        """Abort multipart uploads below `prefix` that were started more than `older_than_s` ago."""
        self._check_prefix(prefix)
        try:
            answer = self._bucket_request("list uploads in", "list_multipart_uploads", Prefix=self._prefix + prefix)
        except NotFoundError:
            return 0  # how rclone's server says that there are none
        except StoreError as error:
            if error.kind == "unsupported":
                return 0
            raise
        now_s = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        removed = 0
        for upload in answer.get("Uploads", ()):
            # The server is asked for this prefix only, and still every name is looked at: these are other people's
            # data.
            if (
                upload["Key"].startswith(self._prefix + prefix)
                and now_s - upload["Initiated"].timestamp() >= older_than_s
            ):
                key = upload["Key"].removeprefix(self._prefix)
                with contextlib.suppress(NotFoundError):
                    self.request(key, "abort", "abort_multipart_upload", UploadId=upload["UploadId"])
                    removed += 1
        return removed

    def close(self) -> None:
        """Let go of the connections, which other stores of this process may share."""
        self._system = None

    # ---- for S3Writer and here

    def request(self, key: str, verb: str, method: str, **arguments: Any) -> Any:
        """One request about one key, with its failure explained."""
        nbytes = arguments["Body"].getbuffer().nbytes if isinstance(arguments.get("Body"), io.BytesIO) else 0
        return self._run(key, verb, lambda: self._call(method, Key=self._full(key), **arguments), nbytes=nbytes)

    def send_part(self, key: str, upload_id: str, number: int, part: io.BytesIO | io.BufferedReader) -> Future[str]:
        """Start to upload a part; waits for a free slot, which is free again when the part is done."""
        if not self._slots.acquire(timeout=self.timeout_s):
            text = f"cannot write `{key}` in {self._url}: no upload finished for {self.timeout_s:.0f} s"
            raise StoreError(text, kind="unreachable")

        async def send() -> str:
            answer = await self._call(
                "upload_part", Key=self._full(key), UploadId=upload_id, PartNumber=number, Body=part
            )
            return str(answer["ETag"])

        future = asyncio.run_coroutine_threadsafe(send(), self._fs().loop)
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def finish(self, part: Future[str], key: str) -> str:
        """Wait for a part; its tag, or its failure explained."""
        with self._explained(key, "write"):
            try:
                return part.result(timeout=self.timeout_s)
            except FutureTimeoutError:
                part.cancel()
                raise

    # ---- requests

    def _fs(self) -> S3FileSystem:
        if self._system is None or self._system[0] != os.getpid():
            self._system = (os.getpid(), shared_filesystem(self._options, self._storage_options))
        return self._system[1]

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await self._fs()._call_s3(method, Bucket=self._bucket, **arguments)

    def _run(self, key: str, verb: str, coroutine: Callable[[], Awaitable[_T]], *, nbytes: int = 0) -> _T:
        if key:
            check_keys([key])
        with self._explained(key, verb):
            timeout_s = self.timeout_s + nbytes / SLOWEST_BYTES_PER_S
            return fsspec.asyn.sync(self._fs().loop, coroutine, timeout=timeout_s)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _explained(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            explained = error_of(error, url=self._url, key=key, verb=verb)
            if explained is None:
                raise
            raise explained from error

    def _full(self, key: str) -> str:
        check_keys([key])
        return self._prefix + key

    def _bucket_request(self, verb: str, method: str, **arguments: Any) -> Any:
        return self._run("", verb, lambda: self._call(method, **arguments))

    def _check_prefix(self, prefix: str) -> None:
        if prefix:
            if not prefix.endswith("/"):
                raise InvalidInputError(f"a prefix is empty or ends with a slash, found {prefix!r}", kind="bad-key")
            check_keys([prefix[:-1]])

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[Any]:
        self._check_prefix(prefix)
        more: dict[str, str] = {}
        while True:
            page = self._bucket_request(
                "list", "list_objects_v2", Prefix=self._prefix + prefix, MaxKeys=PAGE_KEYS, **arguments, **more
            )
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def _get(self, key: str, **arguments: Any) -> bytes:
        """The body of an object, asked for again when it breaks off; botocore retries only until the first byte."""
        for attempt in range(self._options.store_attempts):
            try:
                answer = await self._call("get_object", Key=self._full(key), **arguments)
                async with answer["Body"] as body:
                    data = await body.read()
                if len(data) == int(answer["ContentLength"]):
                    return bytes(data)
                failure: Exception = ConnectionError(f"{len(data)} of {answer['ContentLength']} bytes came")
            except Exception as error:
                explained = error_of(error, url=self._url, key=key, verb="read")
                if explained is None or getattr(explained, "kind", "") not in ("unreachable", "io") or code_of(error):
                    raise
                failure = error
            await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise failure

    async def _get_into(self, key: str, start: int, view: memoryview) -> None:
        """Fill `view`; more than `read_bytes_max` at once is asked for in several ranges side by side."""
        step = self._options.read_bytes_max
        free = asyncio.Semaphore(self._options.store_threads)

        async def fill(offset: int) -> None:
            part = view[offset : offset + step]
            first, last = start + offset, start + offset + len(part) - 1
            async with free:
                data = await self._get(key, Range=f"bytes={first}-{last}")
            if len(data) > len(part):  # a server that ignores ranges sends everything
                data = data[first : last + 1]
            if len(data) < len(part):
                raise self._truncated(key, last + 1, first + len(data))
            part[:] = data

        await asyncio.gather(*(fill(offset) for offset in range(0, len(view), step)))

    async def _delete_all(self, keys: Sequence[str]) -> None:
        free = asyncio.Semaphore(self._options.store_threads)

        async def delete(key: str) -> None:
            # One by one: DeleteObjects wants a checksum header on which servers disagree.
            async with free:
                with contextlib.suppress(FileNotFoundError):
                    await self._call("delete_object", Key=self._full(key))

        await asyncio.gather(*(delete(key) for key in keys))

    def _check_size(self, key: str, stop: int) -> None:
        size = self.size(key)
        if size < stop:
            raise self._truncated(key, stop, size)

    def _truncated(self, key: str, expected: int, found: int) -> DamagedError:
        text = f"`{key}` in {self._url} is truncated: expected at least {expected} bytes, found {found}"
        return DamagedError(text, kind="truncated")

    # ---- conditional creation

    def _is_there(self, key: str, data: bytes) -> bool:
        """True when the key holds exactly `data`, False when it is absent, else AlreadyExistsError."""
        try:
            found = self.read(key)
        except NotFoundError:
            return False
        if found != data:
            raise AlreadyExistsError(f"`{key}` in {self._url} exists already")
        return True

    def _probe(self) -> bool:
        """Whether a second conditional put of the same key is refused. Leaves nothing behind."""
        key = f".ckpt-probe-{secrets.token_hex(8)}"
        try:
            self.request(key, "probe", "put_object", Body=b"1", IfNoneMatch="*")
            try:
                self.request(key, "probe", "put_object", Body=b"2", IfNoneMatch="*")
            except AlreadyExistsError:
                return self.read(key) == b"1"
            return False
        except StoreError as error:
            if error.kind == "unsupported":
                return False
            raise
        finally:
            with contextlib.suppress(CheckpointError):
                self.delete([key])


def _check_range(key: str, start: int, stop: int) -> int:
    if start < 0 or stop < start:
        raise InvalidInputError(f"not a byte range: {start} to {stop} of `{key}`")
    return stop - start
