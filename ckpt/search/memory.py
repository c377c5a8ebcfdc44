"""The sources of a search in memory, read once, and what is made of them: merged models, gradients of coefficients, products.

In: opened sources and a recipe. Out: raw tensors of any point, with the very arithmetic of `ckpt merge`, so that the checkpoint
of a point holds the same bits. Never writes. One owner thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.config import Options
from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.layout.box import Box
from ckpt.merge.compute import Computer
from ckpt.merge.images import ImagePlan
from ckpt.merge.plan import Feed, MergePlan, TensorPlan
from ckpt.merge.reading import Filled, SpanReader
from ckpt.merge.spans import Limits, Row, Span, aligned
from ckpt.search.candidate import RawTensor
from ckpt.search.point import Space
from ckpt.snapshot.images import allocate

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Where one tensor of one source lies in memory."""

    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def row_of(tensor: TensorPlan) -> Row:
    """All of a tensor."""
    box = Box(offsets=(0,) * len(tensor.spec.shape), lengths=tensor.spec.shape)
    return Row(plan=tensor, box=box, fragment=0)


def nbytes_of(plan: MergePlan) -> int:
    """Memory that the sources of a plan take."""
    return sum(aligned(feed.spec.nbytes) for tensor in plan.tensors for feed in tensor.feeds)


class WholeTensors:
    """Spans of one whole tensor each, for a SpanReader."""

    def __init__(self, plan: MergePlan) -> None:
        self._left = iter(self._all(plan))

    def take(self, *, wait: bool) -> tuple[ImagePlan, Span] | None:
        """The next one."""
        return next(self._left, None)

    def _all(self, plan: MergePlan) -> Iterator[tuple[ImagePlan, Span]]:
        seen: set[int] = set()
        for image in plan.images:
            for number in image.tensors:
                tensor = plan.tensors[number]
                if number not in seen and tensor.feeds and tensor.spec.nbytes:
                    seen.add(number)
                    yield image, Span(rows=(row_of(tensor),))


def read_whole(plan: MergePlan) -> Iterator[tuple[TensorPlan, Filled]]:
    """Every tensor with all that is read for it, one after the other; good until the next is asked for."""
    largest = max((tensor.read_nbytes for tensor in plan.tensors), default=0)
    limits = Limits(span_bytes=largest, unit_bytes=largest, total_bytes=2 * largest)
    reader = SpanReader(plan, limits)
    try:
        for _, filled in reader.read(WholeTensors(plan)):
            yield filled.span.rows[0].plan, filled
    finally:
        reader.close()


class Sources:
    """All sources in memory."""

    def __init__(self, plan: MergePlan, options: Options) -> None:
        """Read them.

        Args:
            plan: one that reads every source for every tensor.
        """
        self._options = options
        self._threads = options.copy_threads
        self._memory = allocate(max(nbytes_of(plan), 1))
        self._pieces: dict[tuple[int, int], _Piece] = {}
        self._plan = plan
        self._by_name = {tensor.spec.name: tensor for tensor in plan.tensors if tensor.kind == "linear"}
        at = 0
        for tensor, filled in read_whole(plan):
            for i, feed in enumerate(tensor.feeds):
                if (feed.source, feed.tensor) in self._pieces:
                    continue
                raw = filled.raw(0, i)
                self._memory[at : at + len(raw)] = raw
                self._pieces[feed.source, feed.tensor] = _Piece(
                    start=at, nbytes=len(raw), dtype=feed.spec.dtype, shape=feed.spec.shape
                )
                at += aligned(len(raw))

    def merged(self, plan: MergePlan) -> dict[str, RawTensor]:
        """The tensors of a plan over the same sources. CheckpointError (`not-finite`) as a merge has it."""
        rows = [row_of(tensor) for tensor in plan.tensors]
        places = tuple(tuple(self._start(feed) for feed in row.plan.feeds) for row in rows)
        filled = Filled(span=Span(rows=tuple(rows)), memory=self._memory, places=places)
        limits = Limits(span_bytes=filled.span.nbytes, unit_bytes=1 << 62, total_bytes=0)
        computer = Computer(plan, limits, lambda plan: {}, self._threads)
        try:
            made = computer.result(filled)
        finally:
            computer.close()
        out, at = {}, 0
        for row in rows:
            spec = row.plan.spec
            out[spec.name] = RawTensor(
                data=made[at : at + row.nbytes].copy(), dtype=spec.dtype, shape=spec.shape, aliases=spec.aliases
            )
            at += row.nbytes
        return out

    @property
    def names(self) -> list[str]:
        """Of the tensors that are combined."""
        return list(self._by_name)

    def delta(self, name: str, place: int) -> Float64Array:
        """A tensor of a source less that of the base, where there is a base.

        Args:
            name: with its state key.
            place: of the source, in the order in which they are named.
        """
        tensor = self._tensor(name)
        feed = next(f for f in tensor.with_role("x") if self._plan.opened.sources[f.source].place == place)
        base = tensor.with_role("base")
        less = self._elements(base[0]) if base else None
        return kernels.widen(self._elements(feed), base=less, threads=self._threads).reshape(tensor.spec.shape)

    def pull_back(self, space: Space, gradients: Mapping[str, Any]) -> Float64Array:
        """[groups, sources]: the gradient of a loss by merge coefficients, from its gradient by the merged tensors.

        The merged tensor is linear in its weights, so that is the sum over the tensors of a group of <gradient, x_i>, or of
        <gradient, x_i - base> with a base. Where the weights must sum to 1 it is projected onto that.

        Args:
            gradients: by name with its state key; arrays, or torch tensors on the CPU. Tensors without one have none.
        """
        from ckpt.layout.pattern import NamePattern, TensorName

        patterns = [[NamePattern(text) for text in group.match] for group in space.groups]
        out = np.zeros((space.num_groups, space.num_sources))
        for name, gradient in gradients.items():
            parsed = TensorName.parse(name)
            group = next(g for g, some in enumerate(patterns) if any(p.match(name, parsed) is not None for p in some))
            values = np.asarray(gradient, np.float64).reshape(-1)
            if values.size != math.prod(self._tensor(name).spec.shape):
                raise InvalidInputError(f"the gradient of `{name}` has {values.size} elements, not those of the tensor")
            for place in range(space.num_sources):
                out[group, place] += float(values @ self.delta(name, place).reshape(-1))
        return out if space.deltas else out - out.mean(axis=1, keepdims=True)

    def _tensor(self, name: str) -> TensorPlan:
        if name not in self._by_name:
            raise InvalidInputError(f"`{name}` is no tensor that is combined", kind="no-tensor")
        return self._by_name[name]

    def _elements(self, feed: Feed) -> kernels.Elements:
        piece = self._pieces.get((feed.source, feed.tensor))
        if piece is None:  # without elements
            return kernels.Elements(data=np.empty(0, np.uint8), dtype=feed.spec.dtype)
        return kernels.Elements(data=self._memory[piece.start : piece.start + piece.nbytes], dtype=piece.dtype)

    def _start(self, feed: Feed) -> int:
        piece = self._pieces.get((feed.source, feed.tensor))
        assert piece is not None or not feed.spec.nbytes, feed
        return 0 if piece is None else piece.start


def range_products(plan: MergePlan, space: Space, stops: Sequence[int]) -> Float64Array:
    """[ranges, sources, sources]: sums of products of the sources' elements (less the base's) over each range of elements.

    Reads the sources once, one tensor at a time.
    """
    out = np.zeros((len(stops), space.num_sources, space.num_sources))
    first_of, at = {}, 0
    for name, count in space.tensors:
        first_of[name] = at
        at += count
    ends = np.array(stops)
    for tensor, filled in read_whole(plan):
        if tensor.spec.name in first_of:
            _add_products(plan, tensor, filled, first_of[tensor.spec.name], ends, out)
    return out


def _add_products(
    plan: MergePlan, tensor: TensorPlan, filled: Filled, first: int, ends: NDArray[Any], out: Float64Array
) -> None:
    xs = [i for i, feed in enumerate(tensor.feeds) if feed.role == "x"]
    base = [i for i, feed in enumerate(tensor.feeds) if feed.role == "base"]
    places = [plan.opened.sources[tensor.feeds[i].source].place for i in xs]
    start, stop = first, first + math.prod(tensor.spec.shape)
    while start < stop:
        number = int(np.searchsorted(ends, start, side="right"))
        end = min(int(ends[number]), stop)
        every = [_part(filled.elements(0, i), start - first, end - first) for i in (*xs, *base)]
        tile = kernels.Tile(sources=every[: len(xs)], base=every[-1] if base else None)
        out[number][np.ix_(places, places)] += kernels.gram(tile)
        start = end


def _part(elements: kernels.Elements, start: int, stop: int) -> kernels.Elements:
    size = elements.kind.itemsize
    return kernels.Elements(data=elements.data[start * size : stop * size], dtype=elements.dtype)
