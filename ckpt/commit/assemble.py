"""Make the index and the manifest of a checkpoint out of the receipts of its writers.

In: one receipt per rank. Out: the bytes of the index files and of the manifest. Pure but for a cache of image tables. Refuses
receipts that disagree, fragments that overlap and tensors that are not whole, so that such a checkpoint never becomes visible.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.commit.saved_layout import saved_layout
from ckpt.errors import DamagedError, InvalidInputError, RankFailedError
from ckpt.format import index, manifest
from ckpt.format.checksum import num_blocks
from ckpt.format.receipt import ImageTable, Receipt, with_image
from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable, Int64Array, pad_dims
from ckpt.plan.cover import not_tiled
from ckpt.plan.records import corners
from ckpt.plan.save import arange_per


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """Everything that the committer writes: index files by name, then the manifest."""

    files: dict[str, bytes]
    manifest: manifest.Manifest


@dataclass(frozen=True, kw_only=True)
class _Merged:
    """The part of the index that depends on structure only."""

    specs: list[TensorSpec]
    boxes: BoxTable
    num_dims: NDArray[np.int32]  # [N]
    writer: NDArray[np.int32]
    offsets: Int64Array
    nbytes: Int64Array
    layout: dict[str, Any] | None
    blocks: Int64Array  # [B] where each block's checksum is in the receipts' checksums, end to end
    block_starts: Int64Array
    tensors_file: bytes
    rows: Int64Array  # [N] which row of the receipts' tables, end to end, each fragment is
    references: list[manifest.ReferenceRecord]


class Assembler:
    """Keeps the image tables and the merged structure between steps. One owner thread at a time."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._images: dict[tuple[int, str], ImageTable] = {}
        self._key: tuple[str, ...] = ()
        self._merged: _Merged | None = None

    def assemble(
        self,
        receipts: Sequence[Receipt],
        *,
        metadata: dict[str, Any],
        metrics: dict[str, float],
        layout: dict[str, Any] | None = None,
    ) -> Assembled:
        """The index and manifest of one attempt.

        Args:
            receipts: in rank order, one of every rank.
            layout: the layout document to store; None stores what the ranks say of themselves.

        Raises:
            RankFailedError: receipts of different attempts, steps or worlds; ranks that describe a tensor differently.
            InvalidInputError: a tensor of which elements are missing or held in overlapping pieces.
        """
        _check_same_attempt(receipts)
        receipts = [self._with_image(receipt) for receipt in receipts]
        key = (str(receipts[0].block_bytes), *(receipt.structure for receipt in receipts))
        if self._merged is None or key != self._key:
            self._merged, self._key = _merge(receipts), key
        merged = self._merged
        fragments = index.FragmentTable(
            boxes=merged.boxes,
            writer=merged.writer,
            offsets=merged.offsets,
            nbytes=merged.nbytes,
            checksums=np.concatenate([receipt.checksums for receipt in receipts])[merged.blocks],
            block_starts=merged.block_starts,
            digests=_digests(receipts, merged.rows),
        )
        files = {
            index.TENSORS_FILE: merged.tensors_file,
            index.FRAGMENTS_FILE: index.pack_fragments(fragments, merged.num_dims),
            index.OBJECTS_FILE: index.pack_objects(
                sorted((row for r in receipts for row in r.objects), key=lambda row: (row.name, row.rank))
            ),
        }
        record = {name: index.file_record(name, data) for name, data in files.items()}
        return Assembled(
            files=files,
            manifest=manifest.Manifest(
                step=receipts[0].step,
                attempt=receipts[0].attempt,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                program=self._program,
                world=len(receipts),
                block_bytes=receipts[0].block_bytes,
                num_tensors=len(merged.specs),
                num_fragments=len(fragments),
                tensor_bytes=sum(spec.nbytes for spec in merged.specs),
                tensors=record[index.TENSORS_FILE],
                fragments=record[index.FRAGMENTS_FILE],
                objects=record[index.OBJECTS_FILE],
                writers=[_writer_record(receipt) for receipt in receipts],
                layout=layout or merged.layout,
                metadata=metadata,
                metrics=metrics,
                structure_changed=any(receipt.extra.get("structure_changed") for receipt in receipts),
                references=merged.references,
            ),
        )

    def _with_image(self, receipt: Receipt) -> Receipt:
        key = (receipt.rank, receipt.structure)
        if receipt.image is not None:
            self._images = {k: v for k, v in self._images.items() if k[0] != receipt.rank}
            self._images[key] = receipt.image
        elif key not in self._images:
            raise RankFailedError(
                f"rank {receipt.rank} refers to a structure that it never sent", kind="rank-disagrees"
            )
        return with_image(receipt, self._images[key])


def _check_same_attempt(receipts: Sequence[Receipt]) -> None:
    for field in ("attempt", "step", "world", "block_bytes"):
        values = [getattr(receipt, field) for receipt in receipts]
        if len(set(values)) > 1:
            other = next(i for i, value in enumerate(values) if value != values[0])
            raise RankFailedError(
                f"ranks disagree on the {field}: {values[0]} on rank 0, {values[other]} on rank {other}",
                kind="rank-disagrees",
            )
    if [receipt.rank for receipt in receipts] != list(range(receipts[0].world)):
        raise RankFailedError(f"receipts of ranks {[r.rank for r in receipts]}, expected {receipts[0].world} ranks")


def _writer_record(receipt: Receipt) -> manifest.WriterRecord:
    assert receipt.image is not None
    return manifest.WriterRecord(
        rank=receipt.rank,
        file=receipt.file,
        nbytes=receipt.file_bytes,
        header_bytes=receipt.image.header_bytes,
        header_crc32c=receipt.image.header_crc32c,
        layout=str(receipt.extra.get("layout", "")),
    )


def _digests(receipts: Sequence[Receipt], rows: Int64Array) -> NDArray[np.uint8] | None:
    """Of the merged fragments; None unless every rank took them."""
    found = [receipt.digests for receipt in receipts if receipt.digests is not None]
    return np.concatenate(found)[rows] if len(found) == len(receipts) else None


def _merge_references(
    images: Sequence[ImageTable], order: Int64Array, nbytes: Int64Array
) -> tuple[NDArray[np.int32], list[manifest.ReferenceRecord]]:
    """Number of the image of each merged fragment, and the images beyond the writers' own that are among them."""
    known = sorted({_place(reference): reference for image in images for reference in image.references}.items())
    number = {place: len(images) + i for i, (place, _) in enumerate(known)}
    columns = []
    for rank, image in enumerate(images):
        of_holder = np.array([number[_place(reference)] for reference in image.references] + [rank], np.int32)
        holder = image.holder if image.holder is not None else np.full(len(image.rows), -1, np.int32)
        columns.append(of_holder[holder])  # the last one, -1, is the rank itself
    writer = np.concatenate(columns)[order]
    used = np.bincount(writer, weights=nbytes[order], minlength=len(images) + len(known)).astype(np.int64)
    kept = np.append(np.ones(len(images), bool), used[len(images) :] > 0)
    renumbered = (np.cumsum(kept) - 1).astype(np.int32)
    references = [
        dataclasses.replace(reference, used_bytes=int(used[len(images) + i]))
        for i, (_, reference) in enumerate(known)
        if kept[len(images) + i]
    ]
    return renumbered[writer], references


def _place(reference: manifest.ReferenceRecord) -> tuple[int, str, str]:
    return reference.step, reference.attempt, reference.file


def _merge(receipts: Sequence[Receipt]) -> _Merged:
    images = [receipt.image for receipt in receipts if receipt.image is not None]
    specs = merge_specs([image.specs for image in images])
    ids = {spec.name: i for i, spec in enumerate(specs)}
    num_dims = max((image.rows.num_dims for image in images), default=1)
    tensor, offsets, lengths, position, nbytes = [], [], [], [], []
    for receipt, image in zip(receipts, images, strict=True):
        local = np.array([ids[spec.name] for spec in image.specs], np.int32)
        tensor.append(local[image.rows.tensor])
        offsets.append(pad_dims(image.rows.offsets, num_dims, 0))
        lengths.append(pad_dims(image.rows.lengths, num_dims, 1))
        position.append(image.offsets)
        nbytes.append(image.nbytes)
        if int(num_blocks(image.nbytes, receipt.block_bytes).sum()) != len(receipt.checksums):
            raise DamagedError(
                f"receipt of rank {receipt.rank} has {len(receipt.checksums)} checksums, expected others"
            )
    boxes = BoxTable(tensor=np.concatenate(tensor), offsets=np.concatenate(offsets), lengths=np.concatenate(lengths))
    order = distinct_in_order(specs, boxes)
    sizes = np.concatenate(nbytes)
    blocks, block_starts = blocks_in_order(sizes, order, receipts[0].block_bytes)
    merged = boxes.take(order)
    _check_tiled(specs, merged)
    writer, references = _merge_references(images, order, sizes)
    return _Merged(
        specs=specs,
        boxes=merged,
        num_dims=np.array([len(spec.shape) for spec in specs], np.int32)[merged.tensor],
        writer=writer,
        offsets=np.concatenate(position)[order],
        nbytes=sizes[order],
        layout=saved_layout([receipt.extra.get("tensors") for receipt in receipts], specs),
        blocks=blocks,
        block_starts=block_starts,
        tensors_file=index.pack_tensors(specs, np.bincount(merged.tensor, minlength=len(specs))),
        rows=order,
        references=references,
    )


def blocks_in_order(nbytes: Int64Array, order: Int64Array, block_bytes: int) -> tuple[Int64Array, Int64Array]:
    """Fragments taken in another order: ([B] which block each is now, [N + 1] first block of each fragment)."""
    counts = num_blocks(nbytes, block_bytes)
    first = np.cumsum(counts) - counts
    blocks: Int64Array = np.repeat(first[order], counts[order]) + arange_per(counts[order])
    return blocks, np.append(0, np.cumsum(counts[order]))


def distinct_in_order(specs: Sequence[TensorSpec], boxes: BoxTable) -> Int64Array:
    """Rows sorted by tensor and position, each distinct box once (of the lowest rank)."""
    first, last = corners(specs, boxes)
    order = np.lexsort((last, first, boxes.tensor))
    t, f, e = boxes.tensor[order], first[order], last[order]
    new = np.ones(len(order), bool)
    new[1:] = (t[1:] != t[:-1]) | (f[1:] != f[:-1]) | (e[1:] != e[:-1])
    result: Int64Array = order[new]
    return result


def merge_specs(per_rank: Sequence[Sequence[TensorSpec]]) -> list[TensorSpec]:
    """All tensors of all ranks, sorted by name; RankFailedError if ranks describe one differently."""
    out: dict[str, tuple[int, TensorSpec]] = {}
    for rank, specs in enumerate(per_rank):
        for spec in specs:
            seen = out.get(spec.name)
            if seen is None:
                out[spec.name] = (rank, spec)
            elif seen[1] != spec:
                out[spec.name] = (seen[0], _reconciled(seen, (rank, spec)))
    return [out[name][1] for name in sorted(out)]


def _reconciled(seen: tuple[int, TensorSpec], other: tuple[int, TensorSpec]) -> TensorSpec:
    (rank_a, a), (rank_b, b) = seen, other
    if (a.dtype, a.shape, a.role) != (b.dtype, b.shape, b.role):
        raise RankFailedError(
            f"ranks disagree on tensor `{a.name}`: {a.dtype} {list(a.shape)} {a.role} on rank {rank_a}, "
            f"{b.dtype} {list(b.shape)} {b.role} on rank {rank_b}",
            kind="rank-disagrees",
            hints=("a tensor that is cut over ranks must be a DTensor, or be described by `layout=` or ckpt.annotate",),
        )
    return dataclasses.replace(a, aliases=tuple(sorted({*a.aliases, *b.aliases})))


def _check_tiled(specs: Sequence[TensorSpec], boxes: BoxTable) -> None:
    wrong = not_tiled(specs, boxes)
    if wrong:
        lines = [
            f"`{specs[i].name}` {list(specs[i].shape)}: {covered} elements held, {specs[i].nbytes // specs[i].itemsize} expected"
            for i, covered in wrong[:20]
        ]
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise InvalidInputError(
            f"{len(wrong)} tensors are not whole over all ranks, or held in overlapping pieces: {'; '.join(lines)}{more}",
            kind="not-tiled",
            hints=("every rank that holds a part must call save with it",),
        )
