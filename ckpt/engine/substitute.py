"""Receipts and images for ranks of which nothing is left, so that the rest of their checkpoint is one again.

In: the receipts of the ranks that are left. Out: receipts of all ranks, and the bytes of images that are made up. What is kept
of the others is not touched. Pure: bytes in memory only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckpt.state.inline  # noqa: F401  (hyperparameters may be small tensors)
from ckpt.commit.assemble import distinct_in_order, merge_specs
from ckpt.commit.names import image_name
from ckpt.engine.approximate import LayerNames, Stage
from ckpt.format.checksum import num_blocks, sha256
from ckpt.format.image import lay_out, object_key, padded_object
from ckpt.format.objects import decode, encode
from ckpt.format.receipt import ImageTable, ObjectRow, Receipt
from ckpt.format.spec import TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import BoxTable, pad_dims
from ckpt.plan.cover import not_tiled


@dataclass(frozen=True, kw_only=True)
class Made:
    """The image of a rank that is lost."""

    receipt: Receipt
    image: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Payload:
    """An object of a rank that is lost."""

    name: str
    kind: str
    data: bytes  # encoded
    dp_rank: int = -1
    dp_size: int = -1


def whole_tensors(receipts: Sequence[Receipt]) -> tuple[list[TensorSpec], frozenset[str]]:
    """All tensors that these ranks know, and the names of those that they hold whole together."""
    images = [receipt.image for receipt in receipts if receipt.image is not None]
    specs = merge_specs([image.specs for image in images])
    ids = {spec.name: i for i, spec in enumerate(specs)}
    num_dims = max((image.rows.num_dims for image in images), default=1)
    numbers = [np.array([ids[spec.name] for spec in image.specs], np.int32)[image.rows.tensor] for image in images]
    boxes = BoxTable(
        tensor=np.concatenate(numbers),
        offsets=np.concatenate([pad_dims(image.rows.offsets, num_dims, 0) for image in images]),
        lengths=np.concatenate([pad_dims(image.rows.lengths, num_dims, 1) for image in images]),
    )
    wrong = {i for i, _ in not_tiled(specs, boxes.take(distinct_in_order(specs, boxes)))}
    return specs, frozenset(spec.name for i, spec in enumerate(specs) if i not in wrong)


def only(receipt: Receipt, keep: Callable[[str], bool]) -> Receipt:
    """The receipt without the tensors that `keep` does not want; the bytes of the image stay where they are."""
    image = receipt.image
    assert image is not None
    wanted = np.array([keep(spec.name) for spec in image.specs], bool)
    numbers = (np.cumsum(wanted) - 1).astype(np.int32)
    rows = wanted[image.rows.tensor] if len(wanted) else np.zeros(0, bool)
    blocks = np.repeat(rows, num_blocks(image.nbytes, receipt.block_bytes))
    kept = image.rows.take(np.flatnonzero(rows))
    table = dataclasses.replace(
        image,
        specs=[spec for spec, is_wanted in zip(image.specs, wanted, strict=True) if is_wanted],
        rows=dataclasses.replace(kept, tensor=numbers[kept.tensor]),
        offsets=image.offsets[rows],
        nbytes=image.nbytes[rows],
        holder=None if image.holder is None else image.holder[rows],
    )
    return dataclasses.replace(
        receipt,
        structure=f"{receipt.structure}-kept",
        image=table,
        checksums=receipt.checksums[blocks],
        digests=None,
        extra={key: value for key, value in receipt.extra.items() if key != "tensors"},
    )


def make(
    like: Receipt,
    rank: int,
    specs: Sequence[TensorSpec],
    value_of: Callable[[TensorSpec], NDArray[np.uint8]],
    objects: Sequence[Payload],
) -> Made:
    """The image of `rank` with these tensors whole, and these objects.

    Args:
        like: the receipt of another rank of the same attempt.
    """
    specs = sorted(specs, key=lambda spec: spec.name)
    num_dims = max((len(spec.shape) for spec in specs), default=1) or 1
    lengths = np.array([[*spec.shape, *[1] * (num_dims - len(spec.shape))] for spec in specs], np.int64)
    present = np.flatnonzero((lengths.reshape(-1, num_dims) > 0).all(axis=1))  # a tensor without elements has no box
    lengths = lengths.reshape(-1, num_dims)[present]
    boxes = BoxTable(tensor=present.astype(np.int32), offsets=np.zeros_like(lengths), lengths=lengths)
    payloads = [padded_object(one.data) for one in objects]
    sizes = [
        (object_key(one.name, rank=rank, writer=rank), len(data)) for one, data in zip(objects, payloads, strict=True)
    ]
    layout = lay_out(specs, boxes, sizes)
    image = np.zeros(layout.total_bytes, np.uint8)
    image[: len(layout.header)] = np.frombuffer(layout.header, np.uint8)
    checksums = []
    places = zip(layout.rows.tensor.tolist(), layout.offsets.tolist(), layout.nbytes.tolist(), strict=True)
    for tensor, offset, nbytes in places:
        fragment = image[offset : offset + nbytes]
        fragment[:] = value_of(specs[tensor])
        checksums += [crc32c(fragment[at : at + like.block_bytes]) for at in range(0, nbytes, like.block_bytes)]
    for data, offset in zip(payloads, layout.object_offsets, strict=True):
        image[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    table = ImageTable(
        specs=list(specs),
        rows=layout.rows,
        offsets=layout.offsets,
        nbytes=layout.nbytes,
        header_bytes=len(layout.header),
        header_crc32c=crc32c(layout.header),
    )
    made = Receipt(
        rank=rank,
        world=like.world,
        step=like.step,
        attempt=like.attempt,
        structure=f"made-{rank}",
        file=image_name(rank, like.world),
        file_bytes=len(image),
        block_bytes=like.block_bytes,
        checksums=np.array(checksums, np.uint32),
        objects=_object_rows(rank, objects, payloads, layout.object_offsets),
        image=table,
    )
    return Made(receipt=made, image=image)


def _object_rows(
    rank: int, objects: Sequence[Payload], payloads: Sequence[bytes], offsets: Sequence[int]
) -> list[ObjectRow]:
    return [
        ObjectRow(
            name=one.name,
            kind=one.kind,
            rank=rank,
            writer=rank,
            dp_rank=one.dp_rank,
            dp_size=one.dp_size,
            digest=sha256(data),
            byte_offset=offset,
            nbytes=len(data),
        )
        for one, data, offset in zip(objects, payloads, offsets, strict=True)
    ]


def substitutes(
    lost: Sequence[int],
    rows: Mapping[str, Sequence[tuple[ObjectRow, bytes]]],
    stages: Sequence[Stage],
    names: LayerNames,
) -> tuple[dict[int, list[Payload]], list[str]]:
    """Objects for the ranks that are lost, out of those that are left, and what a person should know of them.

    Args:
        rows: name -> rows with their payloads, of the ranks that are left.
    """
    out: dict[int, list[Payload]] = {rank: [] for rank in lost}
    notes = []
    for name, found in rows.items():
        row, data = found[0]
        if row.kind == "optimizer":
            trees = [decode(payload, name=name) for _, payload in found]
            tree = _renamed_groups(trees, stages, names)
            for rank in lost:
                payload = encode(tree if rank == lost[0] else {"groups": [], "param_state": {}}, name=name)
                out[rank].append(Payload(name=name, kind=row.kind, data=payload))
        elif row.kind == "rank":
            notes.append(f"`{name}` of ranks {list(lost)}: fresh random streams")
            for rank in lost:
                seed = hashlib.sha256(f"ckpt.recover/1 {row.digest} {rank}".encode()).hexdigest()
                out[rank].append(Payload(name=name, kind=row.kind, data=encode({"seed": seed}, name=name)))
        elif row.kind == "replicated":
            if len({payload.rstrip(b" ") for _, payload in found}) > 1:
                notes.append(f"`{name}` of ranks {list(lost)}: that of rank {row.rank}, although ranks differ in it")
            for rank in lost:
                out[rank].append(Payload(name=name, kind=row.kind, data=data.rstrip(b" ")))
        else:
            shares = {one.dp_rank for one, _ in found}
            if row.dp_size < 1 or shares != set(range(row.dp_size)):
                notes.append(f"`{name}`, a loader, is lost on ranks {list(lost)}: it can only be loaded without it")
    return out, notes


def _renamed_groups(trees: Sequence[Any], stages: Sequence[Stage], names: LayerNames) -> dict[str, Any]:
    """Hyperparameters of the parameters of lost layers: those of the stage before; state that is no tensor is left out."""
    groups = []
    for tree in trees:
        for group in tree["groups"]:
            params = [new for param in group["params"] for new in _in_lost_layers(param, stages, names)]
            if params:
                groups.append({**group, "params": params})
    return {"groups": groups, "param_state": {}}


def _in_lost_layers(param: str, stages: Sequence[Stage], names: LayerNames) -> Iterator[str]:
    place = names.place(param)
    for stage in stages:
        for layer, low in zip(stage.layers, stage.below, strict=True):
            if place is not None and place[0] == low:
                yield names.renamed(param, layer)
