"""What a search moves in: one weight per source for each group of tensors, or for each range of elements.

In: names of sources, groups and tensors. Out: `Point`s, and the recipe that merges one. Pure: knows no scores, opens nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckpt.errors import InvalidInputError
from ckpt.layout.pattern import NamePattern, TensorName

Float64Array = NDArray[np.float64]
SPLITS_MAX = 1024  # places where a range may end: a model with more elements has so many, evenly spaced
REST = "**"  # the pattern of the last group


@dataclass(frozen=True)
class Point:
    """Merge coefficients: a row of one weight per source for each group, or for each range of elements.

    Weights are in the order in which the sources are named. With a base they are those of changes to it.
    """

    rows: tuple[tuple[float, ...], ...]
    stops: tuple[int, ...] = ()  # () for groups; else where each range ends, the last at the number of elements

    @cached_property
    def key(self) -> str:
        """The same for the same point."""
        return hashlib.sha256(json.dumps(self.plain()).encode()).hexdigest()[:16]

    @property
    def array(self) -> Float64Array:
        """[rows, sources]"""
        return np.array(self.rows, np.float64)

    def plain(self) -> dict[str, Any]:
        """As JSON; `of` gives it back, to the last bit."""
        return {"rows": [list(row) for row in self.rows], **({"stops": list(self.stops)} if self.stops else {})}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Point:
        """The point of a record."""
        return Point(
            rows=tuple(tuple(float(value) for value in row) for row in plain["rows"]),
            stops=tuple(int(stop) for stop in plain.get("stops", ())),
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that share their weights."""

    name: str
    match: tuple[str, ...]  # name patterns


@dataclass(frozen=True, kw_only=True)
class Space:
    """All points of a search. Drivers see nothing else of the sources."""

    sources: tuple[str, ...]  # labels, in the order in which they are named
    steps: tuple[int | None, ...]
    groups: tuple[Group, ...]  # the last one has the rest
    tensors: tuple[tuple[str, int], ...]  # (name, elements) of all that is combined, in the order of ranges
    deltas: bool = False  # weights of changes to a base; otherwise the weights of each row sum to 1
    abs_sum_max: float = 0.0  # of a row; 0: no bound

    @property
    def num_sources(self) -> int:
        return len(self.sources)

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_elements(self) -> int:
        return sum(count for _, count in self.tensors)

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Where a range may end: at most SPLITS_MAX elements, evenly spaced, the last at the end."""
        num = min(SPLITS_MAX, self.num_elements)
        return tuple((i + 1) * self.num_elements // num for i in range(num))

    def point(self, weights: ArrayLike) -> Point:
        """The nearest point of the space: [groups, sources] or [sources] for all groups.

        Without a base each row is moved evenly until it sums to 1, and drawn towards the mean until the sum of its magnitudes is
        within `abs_sum_max`; with a base towards zero.
        """
        array = np.asarray(weights, np.float64)
        if array.shape == (self.num_sources,):
            array = np.tile(array, (self.num_groups, 1))
        if array.shape != (self.num_groups, self.num_sources) or not np.isfinite(array).all():
            raise InvalidInputError(
                f"a point has finite weights of shape [{self.num_groups}, {self.num_sources}], found {array.shape}"
            )
        return Point(rows=tuple(map(tuple, self.nearest(array).tolist())))

    def nearest(self, weights: Float64Array) -> Float64Array:
        """The same for an array [..., sources] of rows."""
        centre = np.zeros(self.num_sources)
        if not self.deltas:
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.where(total == 1.0, weights, weights + (1.0 - total) / self.num_sources)
            centre = np.full(self.num_sources, 1.0 / self.num_sources)
        if self.abs_sum_max:
            weights = weights.copy()
            for place in zip(*np.nonzero(np.abs(weights).sum(axis=-1) > self.abs_sum_max), strict=True):
                weights[place] = _drawn(weights[place], centre, self.abs_sum_max)
        return weights

    def ranges(self, rows: Sequence[Sequence[float]], stops: Sequence[int]) -> Point:
        """A point whose weights change at elements; neighbours with equal weights become one range."""
        kept_rows: list[tuple[float, ...]] = []
        kept_stops: list[int] = []
        for row, stop in zip(rows, stops, strict=True):
            weights = tuple(float(value) for value in row)
            if kept_rows and kept_rows[-1] == weights:
                kept_stops[-1] = stop
            else:
                kept_rows.append(weights)
                kept_stops.append(stop)
        return Point(rows=tuple(kept_rows), stops=tuple(kept_stops))

    def mean(self) -> Point:
        """Equal weights that sum to 1."""
        return self.point(np.full(self.num_sources, 1.0 / self.num_sources))

    def single(self, source: int) -> Point:
        """One source alone."""
        return self.point(np.eye(self.num_sources)[source])


def _drawn(row: Float64Array, centre: Float64Array, bound: float) -> Float64Array:
    """The point between `centre` and `row` farthest from the centre whose magnitudes sum to the bound (it is convex)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = np.abs(centre + middle * (row - centre)).sum() <= bound
        low, high = (middle, high) if inside else (low, middle)
    return np.asarray(centre + low * (row - centre))


def groups_of(names: Sequence[str], given: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of a search, and one of the rest where some tensor is in none. InvalidInputError for a group without tensors."""
    patterns = [(group, [NamePattern(text) for text in group.match]) for group in given]
    counts = dict.fromkeys((group.name for group in given), 0)
    rest = False
    for name in names:
        parsed = TensorName.parse(name)
        found = next((g for g, some in patterns if any(p.match(name, parsed) is not None for p in some)), None)
        rest = rest or found is None
        if found is not None:
            counts[found.name] += 1
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise InvalidInputError(
            f"group `{empty[0]}` has no tensor of its own that is combined",
            kind="empty-group",
            hints=("the first group that matches has a tensor; `ckpt tensors URL` lists the names",),
        )
    return (*given, Group(name="rest" if given else "all", match=(REST,))) if rest or not given else tuple(given)


def layer_groups(layers: Sequence[str], num: int) -> tuple[Group, ...]:
    """Layers (as `model/layers.3`) in `num` runs of equal length, in their order."""
    num = min(num, len(layers))
    edges = [i * len(layers) // num for i in range(num + 1)] if num else []
    return tuple(
        Group(
            name=layers[a] if b - a == 1 else f"{layers[a]} to {layers[b - 1].rpartition('/')[2]}",
            match=tuple(f"{layer}.**" for layer in layers[a:b]),
        )
        for a, b in itertools.pairwise(edges)
    )


def combine_of(space: Space, point: Point) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(`combine`, further `rules`) of the recipe that merges a point."""
    if not point.stops:
        rows = [(text, row) for group, row in zip(space.groups, point.rows, strict=True) for text in group.match]
        return _combine(space, rows), []
    if len(point.rows) == 1:
        return _combine(space, [(REST, point.rows[0])]), []
    named: list[tuple[str, tuple[float, ...]]] = []
    rules = []
    for name, pieces in _pieces(space, point):
        if len(pieces) == 1:
            named.append((name, pieces[0][1]))
            continue
        combine = {
            "method": "pieces",
            "starts": [start for start, _ in pieces],
            "weights": [value for _, row in pieces for value in row],
            "deltas": space.deltas,
        }
        rules.append({"match": name, "combine": combine})
    return _combine(space, [*named, (REST, point.rows[0])]), rules


def _combine(space: Space, rows: Sequence[tuple[str, tuple[float, ...]]]) -> dict[str, Any]:
    return {
        "method": "coefficients",
        "match": [text for text, _ in rows],
        "weights": [value for _, row in rows for value in row],
        "deltas": space.deltas,
    }


def _pieces(space: Space, point: Point) -> Iterator[tuple[str, list[tuple[int, tuple[float, ...]]]]]:
    """Of each tensor: (first element in it, weights) of the ranges that it lies in."""
    first = 0
    for name, count in space.tensors:
        low = bisect_right(point.stops, first)
        pieces = [(0, point.rows[low])]
        for i in range(low, len(point.stops) - 1):
            if point.stops[i] >= first + count:
                break
            pieces.append((point.stops[i] - first, point.rows[i + 1]))
        yield name, pieces
        first += count
