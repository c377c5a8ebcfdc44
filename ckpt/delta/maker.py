"""Code fine-tunes as differences to their base, and measure how far off they come back.

In: a plan. Out: chunks in a spool, and a `Delta` that says all of it. Each tensor is read chunk by chunk, as often as its method
needs (once where it fits into memory); what is measured is what `apply` will make. One owner thread; chunks are coded on others.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckpt.config import DELTA_CHUNK_ELEMENTS
from ckpt.delta import codecs
from ckpt.delta.measure import Measure, changed, errors, in_order, not_finite
from ckpt.delta.methods import Compeft, Tall
from ckpt.delta.plan import Limits, MakePlan, Want
from ckpt.delta.record import Delta, Kept, Shared, Task
from ckpt.delta.spool import Spool, Spooled
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint
from ckpt.format.dtypes import dtype_of
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements
from ckpt.layout.box import Box
from ckpt.merge import thresholds
from ckpt.merge.method import Constants, Summary
from ckpt.merge.pieces import PieceReader
from ckpt.merge.publication import Saved
from ckpt.merge.sources import Source
from ckpt.merge.tiles import cut

Bytes = NDArray[np.uint8]


class _Pair(NamedTuple):
    """A chunk of a fine-tune and of the base."""

    own: Bytes
    base: Bytes | None


class _Masked(NamedTuple):
    """A chunk of one fine-tune, masked."""

    pair: _Pair
    mask: NDArray[np.bool_]
    restored: Bytes
    off: NDArray[np.float64]  # of `errors`


class _Signs(NamedTuple):
    coded: bytes
    num: int
    total: float  # of their magnitudes


@dataclass(frozen=True, kw_only=True)
class _Ternary:
    """What a pass over a tensor, or all of them, found."""

    threshold: int  # bits of the least magnitude that is kept
    deviation: float


class Maker:
    """Codes all tensors of a plan. Used once; `close` may be called twice."""

    def __init__(self, plan: MakePlan, limits: Limits, spool: Spool, progress: Progress | None = None) -> None:
        self._plan, self._limits, self._spool, self._progress = plan, limits, spool, progress
        self._base = PieceReader(plan.base.reader, plan.base.label)
        self._readers = [PieceReader(source.reader, source.label) for source in plan.sources]
        self._pool = ThreadPoolExecutor(limits.ahead + 1, thread_name_prefix="ckpt-delta")
        self._digests: dict[int, str] = {}  # of tensors of the base
        self.spooled: dict[str, Spooled] = {}  # by name of the tensor that will hold it
        self._kept: dict[tuple[int, str], Kept] = {}

    def run(self) -> Delta:
        """Code everything."""
        method = self._plan.method
        for want in self._plan.wants:
            if want.coding == "planes":
                self._planes(want)
        if isinstance(method, Compeft):
            self._compeft(method)
        shared = self._tall(method) if isinstance(method, Tall) else {}
        self._spool.flush()
        return Delta(
            method=method.name,
            parameters=method.parameters,
            chunk_elements=DELTA_CHUNK_ELEMENTS,
            base=self._plan.base.record(),
            base_sha256={self._plan.base.specs[i].name: digest for i, digest in sorted(self._digests.items())},
            tasks=tuple(self._task(number, source) for number, source in enumerate(self._plan.sources)),
            shared=shared,
        )

    def close(self) -> None:
        self._pool.shutdown()

    def _task(self, number: int, source: Source) -> Task:
        stored = source.reader
        saved, metadata = Saved.like(stored), {}
        if isinstance(stored, StoredCheckpoint):
            saved = Saved(**{**vars(saved), "metrics": stored.manifest.metrics})
            metadata = stored.manifest.metadata
        kept = [one for (task, _), one in sorted(self._kept.items()) if task == number]
        return Task(source=source.record(), saved=saved, metadata=metadata, tensors=tuple(kept))

    # reading

    def _pair(self, want: Want, box: Box) -> _Pair:
        own = self._readers[want.task].read(want.tensor, box)
        return _Pair(own, None if want.base is None else self._base.read(want.base, box))

    def _advance(self, pair: _Pair) -> None:
        if self._progress is not None:
            self._progress(len(pair.own))

    def _note_base(self, want: Want, digest: Any) -> None:
        if want.base is not None:
            self._digests[want.base] = digest.hexdigest()

    # exact

    def _planes(self, want: Want) -> None:
        spool, itemsize = Spooled(tensor=want.payload), want.spec.itemsize
        own, base = hashlib.sha256(), hashlib.sha256()

        def work(box: Box) -> tuple[_Pair, bytes]:
            pair = self._pair(want, box)
            return pair, codecs.pack_planes(pair.own, pair.base, itemsize)

        for pair, coded in in_order(self._pool, work, chunks_of(want.spec.shape), ahead=self._limits.ahead):
            own.update(pair.own.data)
            base.update(b"" if pair.base is None else pair.base.data)
            self._spool.put(spool, coded)
            self._advance(pair)
        self._note_base(want, base)
        num = math.prod(want.spec.shape)
        self._keep(Kept(**_common(want, self._plan.base, spool), sha256=own.hexdigest(), num_kept=num), spool)

    # ComPEFT

    def _compeft(self, method: Compeft) -> None:
        wants = [want for want in self._plan.wants if want.coding == "ternary"]
        groups = [[want] for want in wants] if method.scope == "tensor" else [wants]
        for group in groups:
            with _Chunks(self, self._limits.kept_bytes if len(group) == 1 else 0) as chunks:
                found = self._threshold(group, method, chunks)
                for want in group:
                    self._ternary(want, found, method, chunks)

    def _threshold(self, wants: Sequence[Want], method: Compeft, chunks: _Chunks) -> _Ternary:
        """Deviation and least magnitude over some tensors: two passes."""
        constants: Constants = {}
        moments = np.zeros(2)
        for number in range(thresholds.PASSES):
            summary = Summary()
            for want in wants:
                work = functools.partial(self._count, want, number, constants, chunks)
                for found in in_order(self._pool, work, chunks_of(want.spec.shape), ahead=self._limits.ahead):
                    summary.fold(found)
            if "bins" not in summary.sums:  # no elements at all
                return _Ternary(threshold=1, deviation=0.0)
            if number == 0:
                moments = summary.sums["moments"]
                if not np.isfinite(moments).all():
                    raise not_finite(wants[0].spec.name if len(wants) == 1 else "the fine-tune", "cannot be compared")
            constants = thresholds.resolved(
                number, summary, constants, lambda count: [thresholds.rank_of(method.density, count)]
            )
        count = sum(math.prod(want.spec.shape) for want in wants)
        mean = moments[0] / count
        deviation = math.sqrt(max(0.0, moments[1] / count - mean * mean))
        return _Ternary(threshold=max(1, int(constants["bits"][0, 0])), deviation=deviation)

    def _count(self, want: Want, number: int, constants: Constants, chunks: _Chunks, box: Box) -> Summary:
        """What one pass for the threshold finds in a chunk."""
        tile = _tile(want, self._plan.base, chunks.get(want, box))
        out = thresholds.counted(tile, number, constants)
        if number == 0:
            out.sums["moments"] = kernels.moments(tile)[0, [0, 2]]
        return out

    def _ternary(self, want: Want, found: _Ternary, method: Compeft, chunks: _Chunks) -> None:
        spool, boxes = Spooled(tensor=want.payload), list(chunks_of(want.spec.shape))
        count, total = 0, 0.0

        def code(box: Box) -> _Signs:
            return _signs(_tile(want, self._plan.base, chunks.get(want, box)), found.threshold)

        for signs in in_order(self._pool, code, boxes, ahead=self._limits.ahead):
            self._spool.put(spool, signs.coded)
            count, total = count + signs.num, total + signs.total
        self._spool.flush()
        if method.scale == "fit":
            scale = total / count if count else 0.0
        else:
            scale = method.scale * found.deviation
        measure, base = Measure(), hashlib.sha256()

        def check(number: int) -> tuple[_Pair, Bytes, NDArray[np.float64]]:
            pair = chunks.get(want, boxes[number])
            tile = _tile(want, self._plan.base, pair)
            assert tile.base is not None
            signs = codecs.unpack_signs(self._spool.chunk(spool, number), len(tile))
            by = scale * signs[signs != 0]
            restored = changed(tile.base, signs != 0, by, want.spec.dtype, name=want.spec.name)
            off = errors(tile.sources[0], Elements(data=restored, dtype=want.spec.dtype), tile.base)
            return pair, restored, off

        for pair, restored, off in in_order(self._pool, check, range(len(boxes)), ahead=self._limits.ahead):
            measure.take(restored, off)
            base.update(b"" if pair.base is None else pair.base.data)
            self._advance(pair)
        self._note_base(want, base)
        self._keep(_measured(want, self._plan.base, spool, measure, scale=scale, num_kept=count), spool)

    # TALL masks

    def _tall(self, method: Tall) -> dict[str, Shared]:
        groups: dict[str, list[Want]] = {}
        order = {source.place: number for number, source in enumerate(self._plan.opened.sources)}
        for want in self._plan.wants:
            if want.coding == "mask":
                groups.setdefault(want.spec.name, []).append(want)
        out = {}
        for name, wants in groups.items():
            # Summed in the canonical order, whatever the order in which they were named.
            wants.sort(key=lambda want: order[self._plan.sources[want.task].place])
            out[name] = self._masks(name, wants, method)
        return out

    def _masks(self, name: str, wants: Sequence[Want], method: Tall) -> Shared:
        dtype = _shared_dtype([want.spec.dtype for want in wants])
        sum_of = Spooled(tensor=f"shared/{name}")
        spools = [Spooled(tensor=want.payload) for want in wants]
        measures, counts, base = [Measure() for _ in wants], [0] * len(wants), hashlib.sha256()

        def work(box: Box) -> tuple[Bytes, bytes, list[_Masked]]:
            return self._mask_chunk(name, wants, box, dtype, method.threshold)

        for raw, coded, each in in_order(self._pool, work, chunks_of(wants[0].spec.shape), ahead=self._limits.ahead):
            base.update(raw.data)
            self._spool.put(sum_of, coded)
            for number, (pair, mask, restored, off) in enumerate(each):
                self._spool.put(spools[number], codecs.pack_bits(mask))
                counts[number] += int(mask.sum())
                measures[number].take(restored, off)
                self._advance(pair)
        for want, spool, measure, count in zip(wants, spools, measures, counts, strict=True):
            self._note_base(want, base)
            self._keep(_measured(want, self._plan.base, spool, measure, scale=1.0, num_kept=count), spool)
        self.spooled[sum_of.tensor] = sum_of
        return Shared(dtype=dtype, payload=sum_of.payload)

    def _mask_chunk(
        self, name: str, wants: Sequence[Want], box: Box, dtype: str, threshold: float
    ) -> tuple[Bytes, bytes, list[_Masked]]:
        first = wants[0]
        assert first.base is not None
        raw = self._base.read(first.base, box)
        base = Elements(data=raw, dtype=self._plan.base.specs[first.base].dtype)
        own = [Elements(data=self._readers[want.task].read(want.tensor, box), dtype=want.spec.dtype) for want in wants]
        total = kernels.widen(own[0], base=base)
        for one in own[1:]:
            total += kernels.widen(one, base=base)
        if not np.isfinite(total).all():
            raise not_finite(name, "cannot be compared")
        stored = np.empty(len(total) * dtype_of(dtype).itemsize, np.uint8)
        if not kernels.narrow(total, dtype, stored):
            raise not_finite(name, f"has changes whose sum does not fit into {dtype}")
        total = kernels.widen(Elements(data=stored, dtype=dtype))
        each = []
        for want, one in zip(wants, own, strict=True):
            change = kernels.widen(one, base=base)
            mask = np.abs(change) > threshold * np.abs(total - change)
            restored = changed(base, mask, total[mask], want.spec.dtype, name=want.spec.name)
            off = errors(one, Elements(data=restored, dtype=want.spec.dtype), base)
            each.append(_Masked(_Pair(one.data, raw), mask, restored, off))
        return raw, codecs.pack_planes(stored, None, dtype_of(dtype).itemsize), each

    def _keep(self, kept: Kept, spool: Spooled) -> None:
        task = int(kept.payload.tensor.partition("/")[0])
        self._kept[task, kept.spec.name] = kept
        self.spooled[spool.tensor] = spool


class _Chunks:
    """Chunks of tensors that are gone over several times; those of one tensor stay in memory where there is room."""

    def __init__(self, maker: Maker, kept_bytes: int) -> None:
        self._maker, self._room = maker, kept_bytes
        self._kept: dict[tuple[str, Box], _Pair] = {}

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()

    def get(self, want: Want, box: Box) -> _Pair:
        found = self._kept.get((want.payload, box))
        if found is not None:
            return found
        pair = self._maker._pair(want, box)
        nbytes = len(pair.own) + (0 if pair.base is None else len(pair.base))
        if nbytes <= self._room:  # threads may both take the last room: by a chunk or two, which the estimate has
            self._room -= nbytes
            self._kept[want.payload, box] = pair
        return pair


def chunks_of(shape: Sequence[int], elements: int = DELTA_CHUNK_ELEMENTS) -> Iterator[Box]:
    """The chunks of a tensor, in order of their elements."""
    return cut(shape, elements)


def _tile(want: Want, base: Source, pair: _Pair) -> kernels.Tile:
    assert want.base is not None and pair.base is not None
    return kernels.Tile(
        sources=[Elements(data=pair.own, dtype=want.spec.dtype)],
        base=Elements(data=pair.base, dtype=base.specs[want.base].dtype),
    )


def _signs(tile: kernels.Tile, threshold: int) -> _Signs:
    """The changes that reach the threshold, by their sign."""
    change = kernels.widen(tile.sources[0], base=tile.base)
    magnitude = np.abs(change)
    kept = magnitude.astype(np.float32).view(np.uint32) >= threshold
    signs = np.where(kept, np.sign(change), 0.0).astype(np.int8)
    return _Signs(codecs.pack_signs(signs), int(np.count_nonzero(signs)), kernels.total(magnitude[kept]))


def _shared_dtype(dtypes: Sequence[str]) -> str:
    """Of a sum: the widest of those that are summed, at least of 16 bits."""
    widest = max(dtypes, key=lambda one: (dtype_of(one).itemsize, one))
    return widest if dtype_of(widest).itemsize >= 2 else "bfloat16"


def _common(want: Want, base: Source, spool: Spooled) -> dict[str, Any]:
    return {
        "spec": want.spec,
        "coding": want.coding,
        "payload": spool.payload,
        "base": None if want.base is None else base.specs[want.base].name,
    }


def _measured(want: Want, base: Source, spool: Spooled, measure: Measure, **more: Any) -> Kept:
    digest = measure.digest.hexdigest()
    return Kept(**_common(want, base, spool), sha256=digest, stated=measure.stated, **more)
