"""Cut a tensor into tiles: boxes whose elements are one run in row-major order.

In: a shape and a limit. Out: boxes, in order of their elements. Pure: depends on these two numbers alone, never on files, sources
or workers, so that sums over tiles are the same wherever they are made.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

from ckpt.layout.box import Box

_NUMBERED = re.compile(r"(.*?[./](?:0|[1-9][0-9]*))(?:[./].*)?", re.DOTALL)


def cut(lengths: Sequence[int], limit: int, *, whole_rows: bool = False) -> Iterator[Box]:
    """Boxes of at most `limit` elements that follow each other: some leading indices, a range of the next dim, all of the rest.

    Args:
        limit: elements, at least 1.
        whole_rows: never cut the last dim; a row that is longer than `limit` is a box of its own.
    """
    if whole_rows and lengths:
        last = lengths[-1]
        for box in cut(lengths[:-1], max(1, limit // max(last, 1))):
            yield Box(offsets=(*box.offsets, 0), lengths=(*box.lengths, last))
        return
    if math.prod(lengths) == 0:
        return
    dim, inner = 0, math.prod(lengths)
    while inner > limit:  # ends at the last dim, where `inner` is 1
        inner //= lengths[dim]
        dim += 1
    if dim == 0:
        yield Box(offsets=(0,) * len(lengths), lengths=tuple(lengths))
        return
    dim -= 1
    step = limit // inner
    rest = tuple(lengths[dim + 1 :])
    for lead in itertools.product(*map(range, lengths[:dim])):
        for start in range(0, lengths[dim], step):
            size = min(step, lengths[dim] - start)
            yield Box(offsets=(*lead, start, *(0 for _ in rest)), lengths=(*(1 for _ in lead), size, *rest))


def inside(outer: Box, box: Box) -> Box:
    """`box`, whose offsets count from the first corner of `outer`, in the coordinates of `outer`."""
    offsets = tuple(a + b for a, b in zip(outer.offsets, box.offsets, strict=True))
    return Box(offsets=offsets, lengths=box.lengths)


def first_element(shape: Sequence[int], offsets: Sequence[int]) -> int:
    """Row-major number of the element at `offsets`."""
    number = 0
    for size, offset in zip(shape, offsets, strict=True):
        number = number * size + offset
    return number


def layer_of(name: str) -> str:
    """The layer that a tensor is of: its name up to the first number in it (`model/layers.3`), or all of its name."""
    match = _NUMBERED.fullmatch(name)
    return match[1] if match else name
