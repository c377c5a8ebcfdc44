"""Cut the work on one image into spans: runs of its bytes that are read, computed and written at a time.

In: a plan, an image, a memory limit. Out: spans, in the order of the image's bytes, each with all that is read for it. Pure.
Where a span begins changes no bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckpt.config import MERGE_FRAGMENT_ELEMENTS, MERGE_TILE_ELEMENTS
from ckpt.layout.box import Box
from ckpt.merge.images import ImagePlan
from ckpt.merge.plan import Feed, MergePlan, TensorPlan
from ckpt.merge.tiles import cut, inside

ALIGN_BYTES = 64  # where each piece begins in memory
ELEMENTS_MIN = 1 << 14  # of a span, whatever the limit


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Memory of one process for spans."""

    span_bytes: int  # of feeds and result of a span that can be cut
    unit_bytes: int  # of feeds of a tensor whose statistics are made while it is in memory
    total_bytes: int  # of all spans on their way; one is on its way in any case


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run of elements of one tensor of the result."""

    plan: TensorPlan
    box: Box  # in the tensor
    fragment: int  # which fragment of the image it is a part of

    @property
    def nbytes(self) -> int:
        """Of the result."""
        return self.box.volume * self.plan.spec.itemsize

    def feed_box(self, feed: Feed) -> Box:
        """What is read of a feed."""
        if feed.whole:
            return Box(offsets=(0,) * len(feed.spec.shape), lengths=feed.spec.shape)
        return self.box

    def feed_nbytes(self, feed: Feed) -> int:
        return self.feed_box(feed).volume * feed.spec.itemsize


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows that follow each other in an image."""

    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Of the result."""
        return sum(row.nbytes for row in self.rows)

    @property
    def read_nbytes(self) -> int:
        """Memory that the pieces of all feeds take, aligned."""
        return sum(aligned(row.feed_nbytes(feed)) for row in self.rows for feed in row.plan.feeds)


def aligned(nbytes: int) -> int:
    """Rounded up to where the next piece may begin."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def spans_of(
    plan: MergePlan, image: ImagePlan, limits: Limits, wanted: Callable[[TensorPlan], bool] | None = None
) -> Iterator[Span]:
    """The spans of one image.

    Args:
        wanted: for a pass of statistics: the tensors that it is about. A row is then one tile, so that sums over tiles do not
            depend on the limits. None: all tensors, to be made.
    """
    rows: list[Row] = []
    held = 0
    for row in _rows(plan, image, limits, wanted):
        nbytes = sum(aligned(row.feed_nbytes(feed)) for feed in row.plan.feeds) + row.nbytes
        if rows and held + nbytes > limits.span_bytes:
            yield Span(rows=tuple(rows))
            rows, held = [], 0
        rows.append(row)
        held += nbytes
    if rows:
        yield Span(rows=tuple(rows))


def _rows(
    plan: MergePlan, image: ImagePlan, limits: Limits, wanted: Callable[[TensorPlan], bool] | None
) -> Iterator[Row]:
    for number, (at, fragment) in enumerate(image.rows):
        tensor = plan.tensors[image.tensors[at]]
        if wanted is not None and not wanted(tensor):
            continue
        if must_be_whole(plan, tensor) or (wanted is None and in_memory(plan, tensor, limits)):
            yield Row(plan=tensor, box=fragment, fragment=number)
            continue
        per_element = max(1, tensor.feed_itemsize + tensor.spec.itemsize)
        limit = max(ELEMENTS_MIN, limits.span_bytes // per_element) if wanted is None else MERGE_TILE_ELEMENTS
        whole_rows = tensor.kind == "element" and plan.bounds[tensor.bound].needs.unit == "row"
        for box in cut(fragment.lengths, limit, whole_rows=whole_rows):
            yield Row(plan=tensor, box=inside(fragment, box), fragment=number)


def must_be_whole(plan: MergePlan, tensor: TensorPlan) -> bool:
    """Whether a tensor is made in one piece, whatever memory that takes."""
    if tensor.kind == "element":
        return plan.bounds[tensor.bound].needs.unit == "matrix"
    return tensor.kind == "pool"


def in_memory(plan: MergePlan, tensor: TensorPlan, limits: Limits) -> bool:
    """Whether the passes of a method run over a tensor while all of it is in memory, so that it is read once.

    So they do where its statistics are its own, it lies in one fragment, and it fits.
    """
    if tensor.kind != "element":
        return False
    needs = plan.bounds[tensor.bound].needs
    if needs.passes == 0 or not needs.per_tensor:
        return False
    if needs.unit == "matrix":
        return True
    fits = sum(feed.spec.nbytes for feed in tensor.feeds) <= limits.unit_bytes
    return fits and math.prod(tensor.spec.shape) <= MERGE_FRAGMENT_ELEMENTS


def needs_pass(plan: MergePlan, tensor: TensorPlan, number: int, limits: Limits) -> bool:
    """Whether pass `number` (from 0) reads a tensor by itself, before the result is made."""
    if (
        tensor.kind != "element"
        or tensor.is_echo
        or not tensor.spec.nbytes
        or plan.bounds[tensor.bound].num_passes <= number
    ):
        return False
    return not in_memory(plan, tensor, limits)
