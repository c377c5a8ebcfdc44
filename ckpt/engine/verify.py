"""Check every byte of one stored checkpoint, and go on after what is found.

In: a stored checkpoint. Out: `Verified`: what was checked, and one `Finding` per damaged place. Covers the index files, the
headers of all images, every block of every fragment, every object, sizes and absent files; of images of other steps that it
refers to, the header and the blocks of its own fragments. The manifest was checked when the checkpoint was opened. Never writes,
never holds more than a few chunks; an unreachable store is an error, not a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.read import Progress, ReadJob, find_damage
from ckpt.engine.reader import StoredCheckpoint, StoredImage
from ckpt.errors import DamagedError, NotFoundError
from ckpt.format.image import OBJECT_PREFIX, fragment_key, header_entry, header_nbytes, object_key, parse_header
from ckpt.format.index import FragmentTable
from ckpt.format.manifest import FileRecord
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import LocalState
from ckpt.kernels import crc32c
from ckpt.plan.cover import not_tiled
from ckpt.plan.read import plan_verify

_T = TypeVar("_T")
_Entries = dict[str, tuple[str, tuple[int, ...], int, int]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One damaged place."""

    kind: str  # a kind of ckpt.errors.DamagedError: "damaged", "truncated", "missing-file", ...
    message: str
    file: str  # key in the store
    start: int | None = None  # bytes; None: the whole file, or not known
    stop: int | None = None  # bytes, exclusive
    tensor: str | None = None  # whose bytes these are
    object: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and what is wrong with it."""

    step: int
    num_files: int
    nbytes: int  # that were to be read
    findings: list[Finding] = field(default_factory=list)  # in order of discovery


def verify_nbytes(stored: StoredCheckpoint) -> int:
    """Bytes that `verify` reads of an undamaged checkpoint."""
    found = stored.manifest
    index = sum(record.nbytes for record in (found.tensors, found.fragments, found.objects))
    referred = sum(one.header_bytes + one.used_bytes for one in found.references)
    return index + sum(writer.nbytes for writer in found.writers) + referred


def verify(stored: StoredCheckpoint, *, progress: Progress | None = None) -> Verified:
    """Read and check everything that belongs to the checkpoint. Any process may call it, also while others read.

    Args:
        progress: called with the bytes done since the last call, `verify_nbytes` in all, from any thread.
    """
    return _Verification(stored, progress or _ignore).run()


class _Verification:
    """One run of `verify`. Used once, by one thread."""

    def __init__(self, stored: StoredCheckpoint, progress: Progress) -> None:
        self._stored, self._progress = stored, progress
        self._findings: list[Finding] = []

    def run(self) -> Verified:
        stored = self._stored
        records = (stored.manifest.tensors, stored.manifest.fragments, stored.manifest.objects)
        sound = [self._check_index_file(record) for record in records]
        readable = np.array([self._size_of_image(image) for image in stored.images], np.int64)
        headers = [self._header(number, int(size)) for number, size in enumerate(readable)]
        fragments = self._try(stored.manifest.fragments, stored.fragments) if sound[0] and sound[1] else None
        rows = self._try(stored.manifest.objects, lambda: stored.objects) if sound[2] else None
        if fragments is not None:
            self._check_tiled(fragments)
            self._check_used(fragments)
            self._check_entries(fragments, headers)
            self._check_fragments(fragments, readable)
        if rows is not None:
            self._check_objects(rows, headers, readable)
        return Verified(
            step=stored.step,
            num_files=1 + len(records) + len(readable),
            nbytes=verify_nbytes(stored),
            findings=self._findings,
        )

    def _add(self, message: str, file: str, *, kind: str = "damaged", **place: Any) -> None:
        self._findings.append(Finding(kind=kind, message=message, file=file, **place))

    def _try(self, record: FileRecord, call: Callable[[], _T]) -> _T | None:
        """The result of a look at a file of the index, or a finding."""
        try:
            return call()
        except DamagedError as error:
            self._add(error.message, self._key(record.file), kind=error.kind)
            return None

    def _key(self, file: str) -> str:
        return f"{self._stored.folder}/{file}"

    # files

    def _size(self, key: str, expected: int, missing: str = "") -> int:
        """Bytes of the file, -1 when there is none; both are findings where they are not as expected."""
        try:
            found = self._stored.store.size(key)
        except NotFoundError:
            self._add(missing or f"`{key}` is missing", key, kind="missing-file")
            return -1
        except DamagedError as error:  # a folder or a link in its place
            self._add(error.message, key, kind=error.kind)
            return -1
        if found != expected:
            low, high = sorted((found, expected))
            text = f"`{key}` is damaged: expected {expected} bytes, found {found}"
            self._add(text, key, kind="truncated" if found < expected else "damaged", start=low, stop=high)
        return found

    def _check_index_file(self, record: FileRecord) -> bool:
        """Whether a file of the index is what the manifest says, block by block."""
        key = self._key(record.file)
        before = len(self._findings)
        readable = min(self._size(key, record.nbytes), record.nbytes)
        for block, start in enumerate(range(0, max(readable, 0), record.block_bytes)):
            stop = min(start + record.block_bytes, readable)
            data = self._stored.store.read(key, start, stop)
            self._progress(stop - start)
            expected, found = record.crc32c[block], crc32c(data)
            if expected != found:
                text = (
                    f"bytes [{start}, {stop}) of `{key}` are damaged: expected crc32c {expected:08x}, found {found:08x}"
                )
                self._add(text, key, start=start, stop=stop)
        return len(self._findings) == before

    def _size_of_image(self, image: StoredImage) -> int:
        missing = image.missing(self._stored.step).message
        return min(self._size(image.key, image.nbytes, missing), image.nbytes)

    def _header(self, number: int, readable: int) -> _Entries | None:
        """The checked header of an image; None when it is not the one that was written."""
        writer = self._stored.images[number]
        key = writer.key
        if readable < writer.header_bytes:
            return None  # missing or cut: there is a finding
        header = self._stored.store.read(key, 0, writer.header_bytes)
        self._progress(len(header))
        if crc32c(header) != writer.header_crc32c:
            text = (
                f"the header of `{key}` is damaged: bytes [0, {len(header)}): "
                f"expected crc32c {writer.header_crc32c:08x}, found {crc32c(header):08x}"
            )
            self._add(text, key, start=0, stop=len(header))
            return None
        try:
            if header_nbytes(header, file=key, file_bytes=writer.nbytes) != writer.header_bytes:
                raise DamagedError(f"the header of `{key}` is damaged: its length is not the manifest's")
            return parse_header(header, file=key, file_bytes=writer.nbytes)
        except DamagedError as error:
            self._add(error.message, key, kind=error.kind, start=0, stop=len(header))
            return None

    # what the files hold

    def _check_tiled(self, fragments: FragmentTable) -> None:
        specs, key = self._stored.specs, self._key(self._stored.manifest.fragments.file)
        for tensor, covered in not_tiled(specs, fragments.boxes):
            spec = specs[tensor]
            text = f"the fragments of `{spec.name}` hold {covered} elements, expected {spec.nbytes // spec.itemsize}, once each"
            self._add(text, key, kind="not-tiled", tensor=spec.name)

    def _check_used(self, fragments: FragmentTable) -> None:
        """The manifest says how much of each image of another step is used."""
        stored = self._stored
        num_own = len(stored.manifest.writers)
        used = np.bincount(fragments.writer, weights=fragments.nbytes, minlength=len(stored.images))
        for reference, found in zip(stored.manifest.references, used[num_own:].tolist(), strict=True):
            if found != reference.used_bytes:
                text = (
                    f"{int(found)} bytes of `{reference.file}` of step {reference.step} are referred to, "
                    f"expected {reference.used_bytes}"
                )
                self._add(text, self._key(stored.manifest.fragments.file))

    def _check_entries(self, fragments: FragmentTable, headers: list[_Entries | None]) -> None:
        """The index and the headers of the images say the same of every fragment."""
        specs = self._stored.specs
        boxes = fragments.boxes
        columns = (boxes.tensor, boxes.offsets, boxes.lengths, fragments.writer, fragments.offsets, fragments.nbytes)
        for tensor, offsets, lengths, writer, start, nbytes in zip(*(c.tolist() for c in columns), strict=True):
            entries, spec = headers[writer], specs[tensor]
            if entries is None:
                continue
            dims = len(spec.shape)
            name = fragment_key(spec, offsets[:dims], lengths[:dims])
            expected = (*header_entry(spec, lengths[:dims]), start, start + nbytes)
            if entries.get(name) != expected:
                key = self._stored.image_keys[writer]
                text = f"the header of `{key}` and the index disagree on `{name}`: {entries.get(name)}, expected {expected}"
                self._add(text, key, tensor=spec.name)

    def _check_fragments(self, fragments: FragmentTable, readable: NDArray[np.int64]) -> None:
        stored = self._stored
        self._report_unreadable(fragments, readable)
        plan = plan_verify(
            fragments,
            block_bytes=stored.manifest.block_bytes,
            read_bytes_max=stored.read_bytes_max,
            gap_bytes_max=stored.options.read_gap_bytes_max,
            readable=readable,
        )
        job = ReadJob(
            store=stored.store,
            keys=stored.image_keys,
            plan=plan,
            fragments=fragments,
            specs=stored.specs,
            pieces=LocalState.empty().pieces,
            options=stored.options,
            missing=lambda number: stored.images[number].missing(stored.step).message,
        )
        for damage in find_damage(job, progress=self._progress):
            self._add(damage.message, damage.key, start=damage.start, stop=damage.stop, tensor=damage.tensor)

    def _report_unreadable(self, fragments: FragmentTable, readable: NDArray[np.int64]) -> None:
        """One finding per fragment that ends behind its file, from where on it is gone."""
        stop = fragments.offsets + fragments.nbytes
        for row in np.flatnonzero(stop > readable[fragments.writer]).tolist():
            writer = int(fragments.writer[row])
            key, name = self._stored.image_keys[writer], self._stored.specs[int(fragments.boxes.tensor[row])].name
            start = max(int(fragments.offsets[row]), int(readable[writer]))
            text = f"tensor `{name}` is damaged: bytes [{start}, {int(stop[row])}) of `{key}` are missing"
            self._add(text, key, kind="truncated", start=start, stop=int(stop[row]), tensor=name)

    def _check_objects(
        self, rows: list[ObjectRow], headers: list[_Entries | None], readable: NDArray[np.int64]
    ) -> None:
        seen: set[tuple[int, int]] = set()
        for row in rows:
            stop = row.byte_offset + row.nbytes
            key = (
                self._stored.image_keys[row.writer]
                if 0 <= row.writer < len(self._stored.manifest.writers)
                else self._stored.folder
            )
            place: dict[str, Any] = {"start": row.byte_offset, "stop": stop, "object": row.name}
            try:
                self._stored.read_object(row)
                self._check_object_entry(row, headers[row.writer])  # `read_object` refused a number that is no writer's
            except NotFoundError:
                text = f"object `{row.name}` of rank {row.rank} is lost: `{key}` is missing"
                self._add(text, key, kind="missing-file", **place)
            except DamagedError as error:
                self._add(error.message, key, kind=error.kind, **place)
            if (row.writer, row.byte_offset) not in seen:
                seen.add((row.writer, row.byte_offset))
                self._progress(row.nbytes)

    def _check_object_entry(self, row: ObjectRow, entries: _Entries | None) -> None:
        name = OBJECT_PREFIX + object_key(row.name, rank=row.rank, writer=row.writer)
        expected = ("U8", (row.nbytes,), row.byte_offset, row.byte_offset + row.nbytes)
        if entries is not None and entries.get(name) != expected:
            raise DamagedError(f"header and index disagree on object `{row.name}` of rank {row.rank}")


def _ignore(nbytes: int) -> None:
    del nbytes
