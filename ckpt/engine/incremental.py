"""Leave out of an image what an earlier checkpoint holds already, and refer to it there.

In: a whole image in memory with its checksums, and the fragments of the newest complete checkpoint. Out: `Thinned`: the image
without the unchanged fragments, and a table that says where all of them lie. A fragment is unchanged when tensor, dtype, global
shape, box, SHA-256 and, where blocks are of one size, every CRC-32C are equal. Reads the store only at the first save of a
process, and for one look whether the earlier checkpoint still counts. No collective calls; one thread.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.commit import find
from ckpt.commit.publish import published_attempt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint, ids_of
from ckpt.errors import CheckpointError
from ckpt.format.checksum import DIGEST_BYTES, num_blocks
from ckpt.format.image import lay_out, object_key
from ckpt.format.manifest import ReferenceRecord
from ckpt.format.receipt import ImageTable, ObjectRow
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.read import contiguous_strides
from ckpt.plan.save import arange_per
from ckpt.snapshot.pack import Packer, PackProgram, bind, make_program
from ckpt.store.base import Store

_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class Held:
    """Fragments of one complete checkpoint, and where they lie."""

    step: int
    attempt: str
    specs: Sequence[TensorSpec]
    rows: BoxTable  # `tensor` indexes `specs`
    nbytes: Int64Array  # [N]
    digests: NDArray[np.uint8]  # [N, 32] SHA-256
    checksums: NDArray[np.uint32]  # per block, fragment after fragment
    block_bytes: int
    images: Sequence[ReferenceRecord]
    holder: NDArray[np.int32]  # [N] which of `images`
    offsets: Int64Array  # [N] bytes from the start of that file


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """An image without what others hold."""

    program: PackProgram
    packer: Packer | None  # None: nothing is left out, the whole image is to be written
    image: ImageTable  # of all fragments, in the order of the whole image
    objects: list[ObjectRow]
    digests: NDArray[np.uint8]  # [N, 32]
    key: str  # equal keys mean equal image tables


@dataclass(frozen=True, kw_only=True)
class Whole:
    """One rank's image in memory, as it would be written if nothing were left out."""

    memory: NDArray[np.uint8]  # the image's bytes, at least
    program: PackProgram
    specs: Sequence[TensorSpec]
    checksums: NDArray[np.uint32]
    block_bytes: int
    objects: Sequence[ObjectRow]


class Earlier:
    """What the checkpoints before hold of one rank's state. Used by whoever finishes saves, one after the other."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store, self._options = store, options
        self._held: Held | None = None
        self._look = True  # in the store, when nothing is known
        self._small: tuple[PackProgram, bytes, PackProgram] | None = (
            None  # the last program, what it kept, what it became
        )

    def keep(self, step: int, attempt: str, file: str, whole: Whole, thinned: Thinned) -> None:
        """The attempt is published: later saves may refer to what it holds."""
        image = thinned.image
        own = ReferenceRecord(
            step=step,
            attempt=attempt,
            file=file,
            nbytes=thinned.program.layout.total_bytes,
            header_bytes=image.header_bytes,
            header_crc32c=image.header_crc32c,
            used_bytes=0,
        )
        holder = image.holder if image.holder is not None else np.full(len(image.rows), -1, np.int32)
        self._held = Held(
            step=step,
            attempt=attempt,
            specs=whole.specs,
            rows=image.rows,
            nbytes=image.nbytes,
            digests=thinned.digests,
            checksums=whole.checksums,
            block_bytes=whole.block_bytes,
            images=[*image.references, own],
            holder=np.where(holder < 0, len(image.references), holder).astype(np.int32),
            offsets=image.offsets,
        )

    def drop(self) -> None:
        """A save failed, perhaps because of what it referred to: the next one refers to nothing."""
        self._held, self._look = None, False

    def thin(self, whole: Whole) -> Thinned:
        """Take the digests of all fragments, and leave out those that have not changed. `whole` stays as it is."""
        layout = whole.program.layout
        digests = _digests(whole.memory, layout.offsets, layout.nbytes, self._options.copy_threads)
        held = self._known(whole.specs)
        if held is None:
            at = np.full(len(layout.rows), -1, np.int64)
        else:
            at = _unchanged(held, whole, digests)
        return self._thinned(whole, digests, held, at)

    def _known(self, specs: Sequence[TensorSpec]) -> Held | None:
        """What the newest complete checkpoint holds, if it can be referred to."""
        try:
            if self._held is None and self._look:
                self._held = _held_in(self._store, specs, self._options)
            held = self._held
            if held is not None and published_attempt(self._store, held.step) != held.attempt:
                self._held = held = None  # forgotten: its images may be on their way out
        except CheckpointError as error:
            _log.warning("nothing in %s can be referred to, all is written: %s", self._store.url, error.message)
            return None
        finally:
            self._look = False
        return held

    def _thinned(self, whole: Whole, digests: NDArray[np.uint8], held: Held | None, at: Int64Array) -> Thinned:
        layout = whole.program.layout
        new = at < 0
        program = whole.program if new.all() else self._program(whole, new)
        small = program.layout
        offsets = np.empty(len(layout.rows), np.int64)
        holder: NDArray[np.int32] | None = None
        references: tuple[ReferenceRecord, ...] = ()
        if new.all() or held is None:
            offsets[:] = small.offsets
        else:
            offsets[np.flatnonzero(new)[small.source]] = small.offsets
            offsets[~new] = held.offsets[at[~new]]
            holder, references = _references(held, at)
        image = ImageTable(
            specs=list(whole.specs),
            rows=layout.rows,
            offsets=offsets,
            nbytes=layout.nbytes,
            header_bytes=len(small.header),
            header_crc32c=crc32c(small.header),
            references=references,
            holder=holder,
        )
        objects = zip(whole.objects, small.object_offsets, strict=True)
        return Thinned(
            program=program,
            packer=None if new.all() else _packer(whole, program, new),
            image=image,
            objects=[dataclasses.replace(row, byte_offset=offset) for row, offset in objects],
            digests=digests,
            key=_key(image),
        )

    def _program(self, whole: Whole, new: NDArray[np.bool_]) -> PackProgram:
        """How to write the fragments that are new; the last one when nothing that it depends on has changed."""
        if self._small is None or self._small[0] is not whole.program or self._small[1] != new.tobytes():
            rows = whole.program.layout.rows.take(new)
            objects = [(object_key(row.name, rank=row.rank, writer=row.writer), row.nbytes) for row in whole.objects]
            small = lay_out(whole.specs, rows, objects)
            program = make_program(
                small,
                whole.specs,
                rows,
                small.source,
                chunk_bytes=whole.program.chunk_bytes,
                block_bytes=whole.block_bytes,
            )
            self._small = (whole.program, new.tobytes(), program)
        return self._small[2]


def _packer(whole: Whole, program: PackProgram, new: NDArray[np.bool_]) -> Packer:
    """Copies the new fragments and the objects out of the whole image."""
    layout = whole.program.layout
    rows = layout.rows.take(new)
    itemsize = np.array([spec.itemsize for spec in whole.specs], np.int64)[rows.tensor]
    address = (layout.offsets[new] + whole.memory.ctypes.data).astype(np.uint64)
    pieces = PieceTable(
        boxes=rows,
        address=address,
        limit=address + layout.nbytes[new].astype(np.uint64),
        strides=contiguous_strides(rows.lengths, itemsize),
    )
    spans = zip(layout.object_offsets, layout.object_nbytes, strict=True)
    payloads = [whole.memory[start : start + nbytes].tobytes() for start, nbytes in spans]
    return Packer(bind(program, pieces), payloads, threads=1)


def _digests(memory: NDArray[np.uint8], offsets: Int64Array, nbytes: Int64Array, threads: int) -> NDArray[np.uint8]:
    """[N, 32] SHA-256 of each range of `memory`. hashlib lets other threads run meanwhile."""
    view = memory.data

    def one(span: tuple[int, int]) -> bytes:
        return hashlib.sha256(view[span[0] : span[0] + span[1]]).digest()

    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-digest") as pool:
        spans = zip(offsets.tolist(), nbytes.tolist(), strict=True)
        found = b"".join(pool.map(one, spans, chunksize=64))
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_BYTES)


def _unchanged(held: Held, whole: Whole, digests: NDArray[np.uint8]) -> Int64Array:
    """[N] row of `held` that is equal to each fragment, -1 where none is."""
    layout = whole.program.layout
    at = _same_box(held, whole.specs, layout.rows)
    rows = np.flatnonzero(at >= 0)
    at[rows[(held.digests[at[rows]] != digests[rows]).any(axis=1)]] = -1
    if held.block_bytes != whole.block_bytes:
        return at  # checksums of other blocks cannot be compared
    rows = np.flatnonzero(at >= 0)
    counts = num_blocks(layout.nbytes, whole.block_bytes)
    held_counts = num_blocks(held.nbytes, held.block_bytes)
    mine, theirs = np.cumsum(counts) - counts, np.cumsum(held_counts) - held_counts  # first block of each
    within, of = arange_per(counts[rows]), np.repeat(rows, counts[rows])
    differs = whole.checksums[mine[of] + within] != held.checksums[theirs[at[of]] + within]
    at[of[differs]] = -1
    return at


def _same_box(held: Held, specs: Sequence[TensorSpec], rows: BoxTable) -> Int64Array:
    """[N] row of `held` with the same box of the same tensor, -1 where there is none."""
    if held.rows is rows and (held.specs is specs or list(held.specs) == list(specs)):
        return np.arange(len(rows))
    known = {key: row for row, key in enumerate(_boxes(held.specs, held.rows))}
    return np.array([known.get(key, -1) for key in _boxes(specs, rows)], np.int64)


def _boxes(specs: Sequence[TensorSpec], rows: BoxTable) -> Iterator[tuple[object, ...]]:
    """What must be equal for one fragment to stand for another."""
    forms = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    dims = [len(spec.shape) for spec in specs]
    for tensor, offsets, lengths in zip(
        rows.tensor.tolist(), rows.offsets.tolist(), rows.lengths.tolist(), strict=True
    ):
        n = dims[tensor]
        yield (*forms[tensor], tuple(offsets[:n]), tuple(lengths[:n]))


def _references(held: Held, at: Int64Array) -> tuple[NDArray[np.int32], tuple[ReferenceRecord, ...]]:
    """[N] which of the images in the second value holds each fragment (-1: the own one). Those that hold none are left out."""
    used = np.unique(held.holder[at[at >= 0]])
    order = sorted(used.tolist(), key=lambda image: _place(held.images[image]))
    number = np.full(len(held.images), -1, np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    holder = np.where(at >= 0, number[held.holder[at]], -1).astype(np.int32)
    return holder, tuple(dataclasses.replace(held.images[image], used_bytes=0) for image in order)


def _place(reference: ReferenceRecord) -> tuple[int, str, str]:
    return reference.step, reference.attempt, reference.file


def _key(image: ImageTable) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((image.header_crc32c, [_place(one) for one in image.references])).encode())
    for column in (image.holder, image.offsets):
        digest.update(b"" if column is None else column.tobytes())
    return digest.hexdigest()


def _held_in(store: Store, specs: Sequence[TensorSpec], options: Options) -> Held | None:
    """What the newest complete checkpoint holds of these tensors; None when it has no digests, or there is none."""
    step = find.latest(store)
    if step is None:
        return None
    stored = StoredCheckpoint(store, step, options)
    ids = ids_of(stored.specs)
    wanted = np.array(sorted({ids[spec.name] for spec in specs if spec.name in ids}), np.int32)
    table = stored.fragments(wanted, digests=True)
    if table.digests is None:
        return None
    found = stored.manifest
    own = [
        ReferenceRecord(
            step=step,
            attempt=found.attempt,
            file=writer.file,
            nbytes=writer.nbytes,
            header_bytes=writer.header_bytes,
            header_crc32c=writer.header_crc32c,
            used_bytes=0,
        )
        for writer in found.writers
    ]
    return Held(
        step=step,
        attempt=found.attempt,
        specs=stored.specs,
        rows=table.boxes,
        nbytes=table.nbytes,
        digests=table.digests,
        checksums=table.checksums,
        block_bytes=found.block_bytes,
        images=[*own, *found.references],
        holder=table.writer,
        offsets=table.offsets,
    )
