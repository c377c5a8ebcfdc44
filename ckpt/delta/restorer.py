"""Give a fine-tune back: its base, and what was stored of the difference.

In: a stored delta and its base, opened. Out: a checkpoint. The base is refused before anything is written when it is another one;
what comes back is compared with the digest that was taken when the delta was made, so that the stated error holds. One owner
thread.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.config import MERGE_LISTED_MAX
from ckpt.delta import codecs
from ckpt.delta.measure import changed, in_order
from ckpt.delta.plan import Limits
from ckpt.delta.record import OBJECT, Delta, Kept, Payload, label_of, unpack
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError, InvalidInputError, MismatchError, NotFoundError
from ckpt.format.dtypes import dtype_of
from ckpt.format.receipt import ObjectRow
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements
from ckpt.layout.box import Box
from ckpt.merge.objects import ResultObject
from ckpt.merge.pieces import PieceReader
from ckpt.merge.sources import Source
from ckpt.merge.tiles import cut

Bytes = NDArray[np.uint8]


def read_delta(stored: StoredCheckpoint) -> Delta:
    """The record of a stored delta. NotFoundError (`not-a-delta`) for another checkpoint."""
    row = next((row for row in stored.objects if row.name == OBJECT and row.kind == "replicated"), None)
    if row is None or OBJECT not in stored.manifest.metadata:
        raise NotFoundError(
            f"step {stored.step} of {stored.store.url} is no delta",
            kind="not-a-delta",
            hints=("`ckpt delta make FINETUNE --base BASE -o URL` makes one",),
        )
    return unpack(stored.read_object(row), name=f"{stored.folder}/{OBJECT}")


def choose(delta: Delta, task: str | None) -> int:
    """The number of the fine-tune that is meant: by its number from 1, or as it was named. InvalidInputError when none is."""
    labels = [one.label for one in delta.tasks]
    if task is None:
        if len(labels) == 1:
            return 0
        wrong = f"this delta holds {len(labels)} fine-tunes: say which one comes back"
    elif task in labels:
        return labels.index(task)
    elif task.isdecimal() and 1 <= int(task) <= len(labels):
        return int(task) - 1
    else:
        wrong = f"this delta holds no fine-tune `{task}`"
    shown = ", ".join(f"{number} {label}" for number, label in enumerate(labels, 1))
    raise InvalidInputError(wrong, kind="no-task", hints=(f"`--task N`, one of: {shown}",))


def objects_of(stored: StoredCheckpoint, task: int) -> list[ResultObject]:
    """The objects of one fine-tune."""
    prefix = f"{task}/"
    return [
        ResultObject(row=ObjectRow(**{**vars(row), "name": row.name[len(prefix) :]}), payload=_payload(stored, row))
        for row in stored.objects
        if row.name.startswith(prefix)
    ]


def _payload(stored: StoredCheckpoint, row: ObjectRow) -> Any:
    return lambda: stored.read_object(row)


class Restorer:
    """Makes the tensors of one fine-tune. Used by one thread; `close` may be called twice."""

    def __init__(self, stored: StoredCheckpoint, delta: Delta, task: int, base: Source, limits: Limits) -> None:
        self._delta, self._base, self._limits = delta, base, limits
        self.tensors = delta.tasks[task].tensors
        label = f"the delta {stored.store.url}@{stored.step}"
        self._payloads, self._base_reader = PieceReader(stored, label), PieceReader(base.reader, base.label)
        self._ids = {spec.name: i for i, spec in enumerate(stored.specs)}
        self._base_ids = {spec.name: i for i, spec in enumerate(base.specs)}
        self._pool = ThreadPoolExecutor(limits.ahead + 1, thread_name_prefix="ckpt-delta")
        self._label = label
        self._check_payloads(stored)

    def close(self) -> None:
        self._pool.shutdown()

    def check_base(self) -> bool:
        """That this is the base that the delta was made from; whether its data had to be read for it.

        The digest of its index says so at once. The same weights saved on another layout have another index: then the tensors
        that are needed are read and compared. MismatchError (`wrong-base`) that lists the tensors that differ.
        """
        if self._delta.base["index"] == self._base.digest:
            return False
        wrong = [name for name in self._needed() if not self._is_same(name)]
        if wrong:
            shown = "".join(f"\n  `{name}`" for name in wrong[:MERGE_LISTED_MAX])
            made_from = label_of(self._delta.base)
            raise MismatchError(
                f"{self._base.label} is not the base of this delta, which was made from {made_from}; "
                f"{len(wrong)} tensors differ:{shown}",
                kind="wrong-base",
                hints=(f"the base's index was {self._delta.base['index']}, this one's is {self._base.digest}",),
            )
        return True

    def stream(self, number: int) -> Iterator[Bytes]:
        """The bytes of one tensor. DamagedError at its end when they are not those that were stated."""
        kept = self.tensors[number]
        digest = hashlib.sha256()
        boxes = cut(kept.spec.shape, self._delta.chunk_elements)
        ends = [0, *itertools.accumulate(kept.payload.sizes.tolist())]

        def work(item: tuple[int, Box]) -> Bytes:
            at, box = item
            return self._chunk(kept, at, ends[at], ends[at + 1], box)

        for data in in_order(self._pool, work, enumerate(boxes), ahead=self._limits.ahead):
            digest.update(data.data)
            yield data
        if digest.hexdigest() != kept.sha256:
            raise DamagedError(
                f"`{kept.spec.name}` does not come back as was stated: expected sha256 {kept.sha256}, found "
                f"{digest.hexdigest()}; {self._label} or {self._base.label} has changed since it was made",
                kind="wrong-bytes",
            )

    def _chunk(self, kept: Kept, at: int, start: int, stop: int, box: Box) -> Bytes:
        data = self._coded(kept.payload, start, stop)
        raw = None if kept.base is None else self._base_reader.read(self._base_ids[kept.base], box)
        nbytes = box.volume * kept.spec.itemsize
        if kept.coding == "planes":
            return codecs.unpack_planes(data, raw, kept.spec.itemsize, nbytes)
        assert raw is not None and kept.base is not None
        base = Elements(data=raw, dtype=self._base.specs[self._base_ids[kept.base]].dtype)
        if kept.coding == "ternary":
            signs = codecs.unpack_signs(data, box.volume)
            where, by = signs != 0, kept.scale * signs[signs != 0]
        else:
            where = codecs.unpack_bits(data, box.volume)
            by = self._shared(kept, at, box)[where]
        return changed(base, where, by, kept.spec.dtype, name=kept.spec.name)

    def _shared(self, kept: Kept, at: int, box: Box) -> NDArray[np.float64]:
        shared = self._delta.shared[kept.spec.name]
        start = int(shared.payload.sizes[:at].sum())
        data = self._coded(shared.payload, start, start + int(shared.payload.sizes[at]))
        itemsize = dtype_of(shared.dtype).itemsize
        raw = codecs.unpack_planes(data, None, itemsize, box.volume * itemsize)
        return kernels.widen(Elements(data=raw, dtype=shared.dtype))

    def _coded(self, payload: Payload, start: int, stop: int) -> bytes:
        return self._payloads.read(self._ids[payload.tensor], Box(offsets=(start,), lengths=(stop - start,))).tobytes()

    def _needed(self) -> list[str]:
        return sorted({kept.base for kept in self.tensors if kept.base is not None})

    def _is_same(self, name: str) -> bool:
        i = self._base_ids.get(name)
        shapes = {kept.spec.shape for kept in self.tensors if kept.base == name}
        if i is None or shapes != {self._base.specs[i].shape}:
            return False
        digest = hashlib.sha256()
        boxes = cut(self._base.specs[i].shape, self._delta.chunk_elements)
        for data in in_order(self._pool, lambda box: self._base_reader.read(i, box), boxes, ahead=self._limits.ahead):
            digest.update(data.data)
        return digest.hexdigest() == self._delta.base_sha256.get(name)

    def _check_payloads(self, stored: StoredCheckpoint) -> None:
        """That the record and the tensors of the delta belong together."""
        payloads = [kept.payload for kept in self.tensors]
        for kept in self.tensors:
            if kept.coding == "mask":
                if kept.spec.name not in self._delta.shared:
                    raise DamagedError(f"{self._label} is damaged: `{kept.spec.name}` has no shared sum")
                payloads.append(self._delta.shared[kept.spec.name].payload)
            num = sum(1 for _ in cut(kept.spec.shape, self._delta.chunk_elements))
            if len(kept.payload.sizes) != num:
                raise DamagedError(f"{self._label} is damaged: `{kept.spec.name}` has {num} chunks")
        for payload in payloads:
            i = self._ids.get(payload.tensor)
            if i is None or stored.specs[i].dtype != "uint8" or stored.specs[i].shape != (payload.nbytes,):
                raise DamagedError(f"{self._label} is damaged: `{payload.tensor}` is not what its record says")
