"""Lay a stored checkpoint out anew, for other ranks or as it is, in one process and in bounded memory.

In: a stored checkpoint, a layout (none: a copy) and a store. Out: a published checkpoint of the same step, tensors and objects,
that refers to no other one. Images are built in memory, as many at once as the budget allows, and every source byte is read once
where it allows all of one batch. Never shows a half-written checkpoint: the manifest comes last, and a failure takes back what
was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import ckpt.commit.publish as publishing
from ckpt.commit import names
from ckpt.commit.assemble import Assembled, Assembler
from ckpt.commit.complete import PROGRAM
from ckpt.config import Options
from ckpt.engine.read import Progress, run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import CheckpointError
from ckpt.format import manifest
from ckpt.format.checksum import choose_block_bytes
from ckpt.format.image import lay_out, object_key
from ckpt.format.index import FragmentTable
from ckpt.format.receipt import ImageTable, ObjectRow, Receipt
from ckpt.format.spec import PieceTable
from ckpt.kernels import crc32c
from ckpt.layout.bound import BoundLayout
from ckpt.layout.box import BoxTable, pad_dims
from ckpt.layout.document import to_document
from ckpt.layout.layout import Layout
from ckpt.plan.read import ReadPlan, contiguous_strides
from ckpt.plan.reshard import plan_targets
from ckpt.snapshot.images import allocate
from ckpt.snapshot.pack import Packer, PackProgram, bind, make_program
from ckpt.store.base import Store, Writer

MEMORY_FRACTION = 4  # the default budget is a quarter of the memory that is free


@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """What one target rank holds, and the image that it would have written."""

    rank: int
    held: BoxTable  # what a load on this rank gets
    program: PackProgram
    rows: tuple[ObjectRow, ...]  # of the source: the objects that this image takes over
    digests: NDArray[np.uint8] | None = (
        None  # [N, 32] of the fragments in file order, where they are those of the source
    )

    @property
    def nbytes(self) -> int:
        return self.program.layout.total_bytes


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """What a reshard or a copy would do. Made without reading a byte of a tensor."""

    stored: StoredCheckpoint
    layout: dict[str, Any] | None  # the document to store
    block_bytes: int
    images: tuple[TargetImage, ...]
    fragments: FragmentTable  # of the source

    @property
    def work_nbytes(self) -> int:
        """Bytes of progress: each tensor byte is read once and each image byte written once."""
        return self.stored.manifest.tensor_bytes + sum(image.nbytes for image in self.images)

    def all_reads(self) -> ReadPlan:
        """The reads of a reshard whose memory holds all images at once."""
        rows = [image.program.layout.rows for image in self.images]
        dims = max(table.num_dims for table in rows)
        tensor = np.concatenate([table.tensor for table in rows])
        order = np.argsort(tensor, kind="stable")
        offsets = np.concatenate([pad_dims(table.offsets, dims, 0) for table in rows])
        lengths = np.concatenate([pad_dims(table.lengths, dims, 1) for table in rows])
        return self.reads(BoxTable(tensor=tensor[order], offsets=offsets[order], lengths=lengths[order]))

    def reads(self, boxes: BoxTable) -> ReadPlan:
        """The reads that give these boxes to one rank."""
        strides = contiguous_strides(boxes.lengths, self._itemsizes(boxes))
        nowhere = np.zeros(len(boxes), np.uint64)
        pieces = PieceTable(boxes=boxes, address=nowhere, limit=nowhere, strides=strides)
        return self.stored.plan(self.fragments, pieces)

    def _itemsizes(self, boxes: BoxTable) -> NDArray[np.int64]:
        return np.array([spec.itemsize for spec in self.stored.specs], np.int64)[boxes.tensor]


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """What a reshard did."""

    step: int
    attempt: str
    num_images: int
    wanted_nbytes: int  # of tensors
    read_nbytes: int  # from the images of the source, checksum blocks and gaps included
    written_nbytes: int  # images
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Whole chunks of one image, built in memory at once."""

    image: TargetImage
    first: int  # chunk
    last: int  # chunk, exclusive

    @property
    def start(self) -> int:
        """Bytes from the start of the image."""
        return self.image.program.chunk_range(self.first)[0]

    @property
    def nbytes(self) -> int:
        return self.image.program.chunk_range(self.last - 1)[1] - self.start


def plan_reshard(stored: StoredCheckpoint, layout: Layout, *, options: Options) -> ReshardPlan:
    """Plan; reads the index only. InvalidInputError when the layout does not fit the tensors."""
    specs = stored.specs
    bound: BoundLayout = layout.bind([(spec.name, spec.shape) for spec in specs])
    ranks = range(layout.mesh.world_size)
    held = [bound.box_table(rank) for rank in ranks]
    block_bytes = choose_block_bytes(stored.manifest.tensor_bytes)
    images = []
    for rank, rows in enumerate(plan_targets(specs, held)):
        objects = [row for row in stored.objects if row.rank % len(ranks) == rank]
        program = _program(stored, rank, rows, objects, block_bytes, options)
        images.append(TargetImage(rank=rank, held=held[rank], program=program, rows=tuple(objects)))
    return ReshardPlan(
        stored=stored,
        layout=to_document(layout),
        block_bytes=block_bytes,
        images=tuple(images),
        fragments=stored.fragments(),
    )


def plan_copy(stored: StoredCheckpoint, *, options: Options) -> ReshardPlan:
    """Plan the same fragments in as many images, all of them in this checkpoint: none in an image of another step."""
    fragments = stored.fragments(digests=True)
    block_bytes, num_images = stored.manifest.block_bytes, len(stored.manifest.writers)
    # A fragment of another step goes into the image of the same number: in a run of one job, that of the rank that held it.
    others = [names.parse_ranked(one.file, "safetensors") or (0, 0) for one in stored.manifest.references]
    home = np.array([*range(num_images), *(number % num_images for number, _ in others)], np.int64)
    images = []
    for rank in range(num_images):
        of = np.flatnonzero(home[fragments.writer] == rank)
        rows = fragments.boxes.take(of)
        objects = [row for row in stored.objects if row.writer == rank]
        program = _program(stored, rank, rows, objects, block_bytes, options)
        digests = fragments.digests[of[program.layout.source]] if fragments.digests is not None else None
        images.append(TargetImage(rank=rank, held=rows, program=program, rows=tuple(objects), digests=digests))
    return ReshardPlan(
        stored=stored,
        layout=stored.manifest.layout,
        block_bytes=block_bytes,
        images=tuple(images),
        fragments=fragments,
    )


def _program(
    stored: StoredCheckpoint,
    rank: int,
    rows: BoxTable,
    objects: Sequence[ObjectRow],
    block_bytes: int,
    options: Options,
) -> PackProgram:
    """The image of these fragments and objects."""
    sizes = [(object_key(row.name, rank=row.rank, writer=rank), row.nbytes) for row in objects]
    image = lay_out(stored.specs, rows, sizes)
    return make_program(
        image, stored.specs, rows, image.source, chunk_bytes=options.chunk_bytes, block_bytes=block_bytes
    )


def default_memory_bytes() -> int:
    """A quarter of the memory that is free now."""
    return int(psutil.virtual_memory().available) // MEMORY_FRACTION


def reshard(
    stored: StoredCheckpoint,
    into: Store,
    layout: Layout,
    *,
    options: Options,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Resharded:
    """Write `stored` into the run `into`, cut by `layout`, under the same step. One process calls.

    Args:
        memory_bytes: for images being built; None: a quarter of the free memory. At least one chunk is used.
        progress: called with the bytes done since the last call, `ReshardPlan.work_nbytes` in all, from any thread.

    Raises:
        AlreadyExistsError: `into` has this step; nothing was touched.
        InvalidInputError: the layout does not fit; nothing was written.
        DamagedError: the source is damaged; what was written is taken back.
    """
    publishing.refuse_existing(into, stored.step)
    plan = plan_reshard(stored, layout, options=options)
    return carry_out(plan, into, options=options, memory_bytes=memory_bytes, progress=progress)


def carry_out(
    plan: ReshardPlan,
    into: Store,
    *,
    options: Options,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Resharded:
    """Do what `plan` says; as `reshard`."""
    publishing.refuse_existing(into, plan.stored.step)
    run = _Reshard(plan, into, options, memory_bytes or default_memory_bytes(), progress or _ignore)
    return run.run()


class _Reshard:
    """One reshard on its way. Used once, by one thread."""

    def __init__(self, plan: ReshardPlan, into: Store, options: Options, memory_bytes: int, progress: Progress) -> None:
        self._plan, self._into, self._options, self._progress = plan, into, options, progress
        self._memory_bytes = memory_bytes
        self._attempt = names.new_attempt()
        self._folder = names.attempt_folder(plan.stored.step, self._attempt)
        self._written: list[str] = []
        self._writers: dict[int, Writer] = {}
        self._packers = {image.rank: self._packer(image) for image in plan.images}
        self._objects: dict[int, list[bytes]] = {}
        self._wanted = self._read = 0

    def run(self) -> Resharded:
        start = time.perf_counter()
        step = self._plan.stored.step
        try:
            for batch in self._batches():
                self._do_batch(batch)
            assembled = self._assemble()
            for name, data in assembled.files.items():
                self._written.append(f"{self._folder}/{name}")
                self._into.put(self._written[-1], data)
            publishing.publish(
                self._into, step, self._attempt, manifest.pack(assembled.manifest), options=self._options
            )
        except BaseException as error:
            self._take_back(error)
            raise
        return Resharded(
            step=step,
            attempt=self._attempt,
            num_images=len(self._plan.images),
            wanted_nbytes=self._wanted,
            read_nbytes=self._read,
            written_nbytes=sum(image.nbytes for image in self._plan.images),
            seconds=time.perf_counter() - start,
        )

    def _packer(self, image: TargetImage) -> Packer:
        """Only its checksums are used: the bytes are read straight into the image."""
        boxes = image.program.layout.rows
        nowhere = np.zeros(len(boxes), np.uint64)
        pieces = PieceTable(boxes=boxes, address=nowhere, limit=nowhere, strides=np.zeros_like(boxes.offsets))
        payloads = [b""] * len(image.rows)
        return Packer(bind(image.program, pieces), payloads, threads=self._options.copy_threads)

    def _batches(self) -> Iterator[list[_Part]]:
        """Parts in order of images, as many at once as the budget takes."""
        per_part = max(1, self._memory_bytes // self._options.chunk_bytes)  # chunks
        batch: list[_Part] = []
        for image in self._plan.images:
            num = image.program.num_chunks
            for first in range(0, num, per_part):
                part = _Part(image=image, first=first, last=min(first + per_part, num))
                if batch and sum(other.nbytes for other in batch) + part.nbytes > self._memory_bytes:
                    yield batch
                    batch = []
                batch.append(part)
        if batch:
            yield batch

    def _do_batch(self, batch: Sequence[_Part]) -> None:
        buffers = [allocate(part.nbytes)[: part.nbytes] for part in batch]
        self._fill(batch, buffers)
        for part, buffer in zip(batch, buffers, strict=True):
            self._put_rest(part, buffer)
            self._write(part, buffer)

    def _fill(self, batch: Sequence[_Part], buffers: Sequence[NDArray[np.uint8]]) -> None:
        """Read the fragments of all parts straight into their places."""
        stored = self._plan.stored
        tables = [_pieces(part, buffer) for part, buffer in zip(batch, buffers, strict=True)]
        pieces = _joined(tables)
        plan = stored.plan(self._plan.fragments, pieces)
        run_reads(stored.job(self._plan.fragments, pieces, plan), progress=_scaled(self._progress, plan))
        self._wanted += plan.wanted_nbytes
        self._read += plan.read_nbytes

    def _put_rest(self, part: _Part, buffer: NDArray[np.uint8]) -> None:
        """Header and objects."""
        layout = part.image.program.layout
        rank = part.image.rank
        if rank not in self._objects:
            self._objects[rank] = [self._plan.stored.read_object(row) for row in part.image.rows]
        start, stop = part.start, part.start + part.nbytes
        for offset, data in [(0, layout.header), *zip(layout.object_offsets, self._objects[rank], strict=True)]:
            low, high = max(offset, start), min(offset + len(data), stop)
            if low < high:
                buffer[low - start : high - start] = np.frombuffer(data, np.uint8)[low - offset : high - offset]

    def _write(self, part: _Part, buffer: NDArray[np.uint8]) -> None:
        """Append a part to its image; the last one makes it durable."""
        image = part.image
        writer = self._writers.get(image.rank)
        if writer is None:
            key = f"{self._folder}/{self._file_name(image)}"
            self._written.append(key)
            writer = self._writers[image.rank] = self._into.open_writer(key, nbytes=image.nbytes)
        for chunk in range(part.first, part.last):
            low, high = image.program.chunk_range(chunk)
            view = buffer[low - part.start : high - part.start]
            self._packers[image.rank].checksum(chunk, view)
            writer.write(view.data)
            self._progress(high - low)
        if part.last == image.program.num_chunks:
            writer.commit()
            del self._writers[image.rank]
            del self._objects[image.rank]

    def _file_name(self, image: TargetImage) -> str:
        return names.image_name(image.rank, len(self._plan.images))

    def _assemble(self) -> Assembled:
        source = self._plan.stored.manifest
        assembled = Assembler(PROGRAM).assemble(
            [self._receipt(image) for image in self._plan.images],
            metadata=source.metadata,
            metrics=source.metrics,
            layout=self._plan.layout,
        )
        record = dataclasses.replace(
            assembled.manifest, world=source.world, rank_layouts=source.layouts_by_rank, structure_changed=False
        )
        return dataclasses.replace(assembled, manifest=record)

    def _receipt(self, image: TargetImage) -> Receipt:
        layout = image.program.layout
        return Receipt(
            rank=image.rank,
            world=len(self._plan.images),
            step=self._plan.stored.step,
            attempt=self._attempt,
            structure=str(image.rank),
            file=self._file_name(image),
            file_bytes=layout.total_bytes,
            block_bytes=self._plan.block_bytes,
            checksums=self._packers[image.rank].checksums,
            digests=image.digests,
            objects=[
                dataclasses.replace(row, writer=image.rank, byte_offset=offset)
                for row, offset in zip(image.rows, layout.object_offsets, strict=True)
            ],
            image=ImageTable(
                specs=self._plan.stored.specs,
                rows=layout.rows,
                offsets=layout.offsets,
                nbytes=layout.nbytes,
                header_bytes=len(layout.header),
                header_crc32c=crc32c(layout.header),
            ),
        )

    def _take_back(self, error: BaseException) -> None:
        """Leave nothing behind; what cannot be removed now is marked for `ckpt gc`."""
        for writer in self._writers.values():
            with contextlib.suppress(CheckpointError):  # the first error is the one to report
                writer.abort()
        if getattr(error, "kind", "") == "outcome-unknown":
            return  # it may be published
        step = self._plan.stored.step
        try:
            publishing.abort(self._into, step, self._attempt, f"it could not be written: {error}")
            self._into.delete([*self._written, names.aborted_key(step, self._attempt)])
        except CheckpointError as problem:
            error.add_note(f"what was written could not be removed (`ckpt gc` does): {problem.message}")


def _pieces(part: _Part, buffer: NDArray[np.uint8]) -> PieceTable:
    """The fragments of a part, with their places in its buffer."""
    program = part.image.program
    rows = slice(int(program.part_starts[part.first]), int(program.part_starts[part.last]))
    boxes = program.layout.rows
    source = program.layout.source  # row of the boxes that the program was made from -> row in file order
    back = np.empty(len(source), np.int64)
    back[source] = np.arange(len(source))
    of = back[program.piece[rows]]
    lengths = program.lengths[rows]
    table = BoxTable(tensor=boxes.tensor[of], offsets=boxes.offsets[of] + program.within[rows], lengths=lengths)
    address = (program.position[rows] - part.start + buffer.ctypes.data).astype(np.uint64)
    limit = np.full(len(address), buffer.ctypes.data + len(buffer), np.uint64)
    return PieceTable(
        boxes=table, address=address, limit=limit, strides=contiguous_strides(lengths, program.itemsize[rows])
    )


def _joined(tables: Sequence[PieceTable]) -> PieceTable:
    """All pieces, sorted by tensor."""
    boxes = [table.boxes for table in tables]
    dims = max(table.num_dims for table in boxes)
    tensor = np.concatenate([table.tensor for table in boxes])
    order = np.argsort(tensor, kind="stable")
    return PieceTable(
        boxes=BoxTable(
            tensor=tensor[order],
            offsets=np.concatenate([pad_dims(table.offsets, dims, 0) for table in boxes])[order],
            lengths=np.concatenate([pad_dims(table.lengths, dims, 1) for table in boxes])[order],
        ),
        address=np.concatenate([table.address for table in tables])[order],
        limit=np.concatenate([table.limit for table in tables])[order],
        strides=np.concatenate([pad_dims(table.strides, dims, 0) for table in tables])[order],
    )


def _scaled(progress: Progress, plan: ReadPlan) -> Callable[[int], None]:
    """Progress in wanted bytes: what is read in excess does not count."""
    ratio = plan.wanted_nbytes / max(plan.read_nbytes, 1)
    return lambda nbytes: progress(round(nbytes * ratio))


def _ignore(nbytes: int) -> None:
    del nbytes
