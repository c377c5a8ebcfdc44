"""One stored checkpoint, opened for reading: its manifest, its tensors, and reads of any boxes of them.

In: a store and a step. Out: `StoredCheckpoint`. Needs no process group and no model. Reads of the index are verified against
the manifest, reads of data against the index. Any thread may read; nothing is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckpt.commit import names
from ckpt.commit.find import resolve
from ckpt.config import MANIFEST_BYTES_MAX, OBJECT_BYTES_MAX, Options
from ckpt.engine.read import Progress, ReadJob, read_bytes_max, run_reads
from ckpt.errors import DamagedError, NotFoundError
from ckpt.format import index, manifest
from ckpt.format.checksum import sha256
from ckpt.format.image import OBJECT_SLOT_BYTES
from ckpt.format.manifest import FileRecord, Manifest, ReferenceRecord, WriterRecord
from ckpt.format.receipt import ObjectRow
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import Int64Array
from ckpt.plan.cover import not_in_order
from ckpt.plan.read import ReadPlan, plan_read, uncovered
from ckpt.store.base import Store

ROOM_BYTES_FREE = 16 << 20  # so much memory is taken on the word of an index alone


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image that holds fragments of a checkpoint: its own, or one of another step that it refers to."""

    key: str
    nbytes: int
    header_bytes: int
    header_crc32c: int
    step: int  # whose image it is

    def missing(self, reader: int) -> DamagedError:
        """What is wrong when it is gone; `reader` is the step that is read."""
        other = f" (an image of step {self.step}, which step {reader} refers to)" if self.step != reader else ""
        return DamagedError(f"`{self.key}` is missing from a complete checkpoint{other}", kind="missing-file")


class StoredCheckpoint:
    """A complete checkpoint. `step` and `manifest` are known; the index is read when it is first needed."""

    def __init__(self, store: Store, step: int | Literal["latest"], options: Options) -> None:
        self.store, self.options = store, options
        self.step: int = resolve(store, step)
        key = names.manifest_key(self.step)
        self.manifest: Manifest = manifest.unpack(self._read_manifest(key), name=key)
        if self.manifest.step != self.step or not names.is_attempt(self.manifest.attempt):
            raise DamagedError(f"`{key}` is the manifest of step {self.manifest.step}, expected {self.step}")
        self._check_names()
        self._specs: list[TensorSpec] | None = None
        self._counts: Int64Array | None = None  # fragments of each tensor; known with `_specs`
        self._objects: list[ObjectRow] | None = None
        self.index_nbytes = 0  # read so far

    def _read_manifest(self, key: str) -> bytes:
        nbytes = self.store.size(key)
        if nbytes > MANIFEST_BYTES_MAX:
            raise DamagedError(f"`{key}` is damaged: {nbytes} bytes are too many for a manifest")
        return self.store.read(key)

    def _check_names(self) -> None:
        found = self.manifest
        records = (found.tensors, found.fragments, found.objects)
        expected = [index.TENSORS_FILE, index.FRAGMENTS_FILE, index.OBJECTS_FILE]
        num_writers = len(found.writers)
        images = [(rank, names.image_name(rank, num_writers)) for rank in range(num_writers)]
        if [record.file for record in records] != expected or [(w.rank, w.file) for w in found.writers] != images:
            raise DamagedError(f"the manifest of step {self.step} names files that are not its own", kind="bad-names")
        for one in found.references:  # no name may lead out of the run
            own = (one.step, one.attempt) == (self.step, found.attempt)
            if own or not names.is_image(one.step, one.attempt, one.file):
                raise DamagedError(
                    f"the manifest of step {self.step} refers to what is no image of another attempt", kind="bad-names"
                )

    @property
    def folder(self) -> str:
        """Key prefix of the attempt's files."""
        return names.attempt_folder(self.step, self.manifest.attempt)

    @cached_property
    def images(self) -> list[StoredImage]:
        """All images, by the number that the index has for them: of the writers, then those referred to."""
        own: list[tuple[int, str, WriterRecord | ReferenceRecord]] = [
            (self.step, self.folder, writer) for writer in self.manifest.writers
        ]
        others = [(one.step, names.attempt_folder(one.step, one.attempt), one) for one in self.manifest.references]
        return [
            StoredImage(
                key=f"{folder}/{record.file}",
                nbytes=record.nbytes,
                header_bytes=record.header_bytes,
                header_crc32c=record.header_crc32c,
                step=step,
            )
            for step, folder, record in (*own, *others)
        ]

    @property
    def image_keys(self) -> list[str]:
        """Key of each image, by number."""
        return [image.key for image in self.images]

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors, by id; sorted by name."""
        if self._specs is None:
            record = self.manifest.tensors
            file = self._file(record)
            specs, counts = index.unpack_tensors(file, name=self._key(record), num_rows=self.manifest.num_tensors)
            if int(counts.sum()) != self.manifest.num_fragments:
                raise DamagedError(
                    f"`{self._key(record)}` is damaged: its fragments are not {self.manifest.num_fragments}"
                )
            self._specs, self._counts = specs, counts
        return self._specs

    @property
    def objects(self) -> list[ObjectRow]:
        """All objects of all ranks."""
        if self._objects is None:
            self._objects = index.unpack_objects(
                self._file(self.manifest.objects), name=self._key(self.manifest.objects)
            )
            odd = [row for row in self._objects if not 0 <= row.rank < self.manifest.world]
            if odd:
                self._objects = None
                raise DamagedError(
                    f"object `{odd[0].name}` is of rank {odd[0].rank}, expected 0 to {self.manifest.world - 1}"
                )
        return self._objects

    def fragments(self, tensors: NDArray[np.integer] | None = None, *, digests: bool = False) -> index.FragmentTable:
        """Fragments of the tensors with these ids; of all when None. `digests`: with their SHA-256, where stored."""
        record, specs = self.manifest.fragments, self.specs
        file = self._file(record, whole=tensors is None or len(tensors) * 2 > len(specs))
        table = index.unpack_fragments(
            file,
            specs,
            tensors,
            self.manifest.block_bytes,
            name=self._key(record),
            counts=self._counts,
            digests=digests,
        )
        self._check_places(table)
        # Fragments that overlap could add up to a whole and leave elements unread. The random seed lets none be made to fit.
        wrong = not_in_order(self.specs, table.boxes, seed=secrets.randbits(32))
        if wrong:
            name = self.specs[wrong[0]].name
            raise DamagedError(
                f"the index of step {self.step} is damaged: the fragments of `{name}` overlap or are not in order"
            )
        return table

    def _check_places(self, table: index.FragmentTable) -> None:
        sizes = np.array([image.nbytes for image in self.images], np.int64)
        headers = np.array([image.header_bytes for image in self.images], np.int64)
        bad = (table.writer < 0) | (table.writer >= len(sizes))
        if not bad.any():
            bad = (table.offsets < headers[table.writer]) | (table.offsets > sizes[table.writer] - table.nbytes)
        if bad.any():
            name = self.specs[int(table.boxes.tensor[np.argmax(bad)])].name
            raise DamagedError(
                f"the index of step {self.step} is damaged: a fragment of `{name}` lies outside its image"
            )

    def check_room(self, nbytes: int) -> None:
        """Before memory for `nbytes` of one tensor is taken: that the images really hold so much. DamagedError when not."""
        held = 0
        for image in self.images:
            if nbytes <= max(held, ROOM_BYTES_FREE):
                return
            try:
                held += min(self.store.size(image.key), image.nbytes)
            except NotFoundError as error:
                raise image.missing(self.step) from error
        if nbytes > max(held, ROOM_BYTES_FREE):
            raise DamagedError(
                f"step {self.step} is damaged: it claims {nbytes} bytes of a tensor in images of {held} bytes"
            )

    @property
    def read_bytes_max(self) -> int:
        """As `ckpt.engine.read.read_bytes_max`."""
        return read_bytes_max(self.store, self.options)

    def plan(self, fragments: index.FragmentTable, pieces: PieceTable) -> ReadPlan:
        """The reads that fill `pieces` (tensor numbers are ids). DamagedError when an element is stored nowhere."""
        plan = plan_read(
            fragments,
            self.specs,
            pieces,
            block_bytes=self.manifest.block_bytes,
            read_bytes_max=self.read_bytes_max,
            gap_bytes_max=self.options.read_gap_bytes_max,
        )
        missing = uncovered(plan.copies, pieces)
        if len(missing):
            name = self.specs[int(pieces.boxes.tensor[missing[0]])].name
            raise DamagedError(f"step {self.step} is damaged: elements of `{name}` are in no fragment")
        return plan

    def job(self, fragments: index.FragmentTable, pieces: PieceTable, plan: ReadPlan) -> ReadJob:
        """The work of carrying out `plan`."""
        return ReadJob(
            store=self.store,
            keys=self.image_keys,
            missing=lambda number: self.images[number].missing(self.step).message,
            plan=plan,
            fragments=fragments,
            specs=self.specs,
            pieces=pieces,
            options=self.options,
        )

    def read_pieces(self, pieces: PieceTable, *, progress: Progress | None = None) -> ReadPlan:
        """Fill `pieces` and return the plan that did it."""
        fragments = self.fragments(np.unique(pieces.boxes.tensor))
        plan = self.plan(fragments, pieces)
        run_reads(self.job(fragments, pieces, plan), progress=progress)
        return plan

    def read_object(self, row: ObjectRow) -> bytes:
        """One object's bytes, verified."""
        writer = self.manifest.writers[row.writer] if 0 <= row.writer < len(self.manifest.writers) else None
        if row.nbytes > OBJECT_BYTES_MAX + OBJECT_SLOT_BYTES:
            raise DamagedError(f"object `{row.name}` of rank {row.rank} is damaged: {row.nbytes} bytes are too many")
        if (
            writer is None
            or not writer.header_bytes <= row.byte_offset <= row.byte_offset + row.nbytes <= writer.nbytes
        ):
            raise DamagedError(f"object `{row.name}` of rank {row.rank} lies outside its image")
        key = f"{self.folder}/{writer.file}"
        try:
            data = self.store.read(key, row.byte_offset, row.byte_offset + row.nbytes)
        except NotFoundError as error:
            raise DamagedError(f"`{key}` is missing from a complete checkpoint", kind="missing-file") from error
        if sha256(data) != row.digest:
            raise DamagedError(
                f"object `{row.name}` of rank {row.rank} is damaged: bytes [{row.byte_offset}, "
                f"{row.byte_offset + row.nbytes}) of `{key}`: expected {row.digest}, found {sha256(data)}"
            )
        return data

    def _key(self, record: FileRecord) -> str:
        return f"{self.folder}/{record.file}"

    def _file(self, record: FileRecord, *, whole: bool = True) -> index.VerifiedFile:
        key = self._key(record)
        name = key
        try:
            found = self.store.size(key)
        except NotFoundError as error:
            raise DamagedError(f"`{key}` is missing from a complete checkpoint", kind="missing-file") from error
        if found != record.nbytes:
            raise DamagedError(f"`{key}` is damaged: expected {record.nbytes} bytes, found {found}", kind="truncated")

        def read(start: int, stop: int) -> bytes:
            self.index_nbytes += stop - start
            return self.store.read(key, start, stop)

        if not whole and record.nbytes > index.PARTIAL_BYTES_MIN:
            return index.VerifiedFile(record, read, name=name)
        data = read(0, record.nbytes)
        if sha256(data) != record.digest:
            raise DamagedError(f"`{key}` is damaged: expected {record.digest}, found {sha256(data)}")
        return index.VerifiedFile(record, lambda start, stop: data[start:stop], name=name)


def ids_of(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Tensor id by name and by alias; a name wins over an alias."""
    out: dict[str, int] = {}
    for i, spec in enumerate(specs):
        for alias in spec.aliases:
            out.setdefault(alias, i)
    out.update({spec.name: i for i, spec in enumerate(specs)})
    return out
