"""Make the bytes of the result out of the pieces that were read.

In: filled spans. Out: bytes of the result, span by span, in file order. Weighted sums of a span are one native call; a method's
tiles are shared out over threads. Never reads or writes a file. One owner thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.config import MERGE_TILE_ELEMENTS
from ckpt.errors import CheckpointError, MismatchError
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements, FloatDtype, MixParts
from ckpt.layout.box import Box
from ckpt.merge.matrices import one_thread
from ckpt.merge.method import Constants, Elementwise, Matrix, Summary
from ckpt.merge.plan import Feed, MergePlan, TensorPlan
from ckpt.merge.reading import Filled
from ckpt.merge.spans import Limits, Row, in_memory
from ckpt.merge.tile import Slot, Tile
from ckpt.merge.tiles import cut
from ckpt.snapshot.images import allocate

APPLY_ELEMENTS = 1 << 18  # of a tile that a method writes: a few arrays of fp64 stay in the processor's caches
FindConstants = Callable[[TensorPlan], Constants]  # of all units that a tensor is of
_T = TypeVar("_T")
_R = TypeVar("_R")


class Computer:
    """Computes spans. `close` may be called twice."""

    def __init__(self, plan: MergePlan, limits: Limits, constants: FindConstants, threads: int) -> None:
        self._plan, self._limits, self._constants, self._threads = plan, limits, constants, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ckpt-merge-compute") if threads > 1 else None
        self._room = np.empty(0, np.uint8)

    def close(self) -> None:
        """End the threads and let go of the memory."""
        if self._pool is not None:
            self._pool.shutdown()
        self._room = np.empty(0, np.uint8)

    def result(self, filled: Filled) -> NDArray[np.uint8]:
        """The bytes of a span; they are good until the next call."""
        rows = filled.span.rows
        if len(self._room) < filled.span.nbytes:
            self._room = allocate(filled.span.nbytes)
        targets, at = [], 0
        for row in rows:
            targets.append(self._room[at : at + row.nbytes])
            at += row.nbytes
        linear = [i for i, row in enumerate(rows) if row.plan.kind == "linear"]
        if linear:
            self._mix(filled, linear, targets)
        for i, row in enumerate(rows):
            if row.plan.kind == "element":
                self._element(filled, i, targets[i])
            elif row.plan.kind != "linear":
                self._other(filled, i, targets[i])
        return self._room[:at]

    def observe(self, filled: Filled, row: int, number: int, constants: Constants) -> Summary:
        """What a pass finds in one row, its tiles folded in their order."""
        method = self._method(filled.span.rows[row])
        whole = self.tile(filled, row)
        boxes = list(self._tiles(whole, MERGE_TILE_ELEMENTS, filled.span.rows[row]))
        tiles = [self._part(whole, box, len(boxes)) for box in boxes]
        out = Summary()
        with _matrices(method, whole.name):
            for summary in self._map(lambda tile: method.observe(tile, number, constants), tiles):
                out.fold(summary)
        return out

    def tile(self, filled: Filled, row: int) -> Tile:
        """A row of an elementwise method, as the method sees it. Refuses what is not finite, unless the recipe lets it pass."""
        one = filled.span.rows[row]
        numbers = [feed.source for feed in one.plan.with_role("x")]
        found: dict[tuple[str, int], Elements] = {}
        slots: dict[tuple[str, int], Slot] = {}
        for i, feed in enumerate(one.plan.feeds):
            elements = filled.elements(row, i)
            if self._plan.recipe.nan == "error" and not kernels.all_finite(elements):
                raise self._not_finite(one, feed, elements)
            found[feed.role, feed.source] = elements
            if feed.slot:
                lengths = one.feed_box(feed).lengths
                slots[feed.slot, feed.source] = Slot(elements=elements, shape=lengths, whole=feed.whole)
        needs = self._plan.bounds[one.plan.bound].needs
        return Tile(
            name=one.plan.subject,
            shape=one.plan.spec.shape,
            box=one.box,
            context=self._plan.bounds[one.plan.bound].context,
            numbers=tuple(numbers),
            elements=tuple(found["x", number] for number in numbers),
            base_elements=found.get(("base", -1)),
            slots={slot: tuple(slots.get((slot, number)) for number in numbers) for slot in needs.slots},
            hyperparameters=one.plan.hyperparameters,
            output=one.plan.output,
        )

    # weighted sums

    def _mix(self, filled: Filled, rows: Sequence[int], targets: Sequence[NDArray[np.uint8]]) -> None:
        """All weighted sums of a span in one call, or in a few where there are more sources than a call takes."""
        slots = [_slots(filled.span.rows[i]) for i in rows]
        width = max(len(one) for one in slots)
        bad = np.zeros(len(rows), bool)
        sums = self._sums(filled, rows) if width > kernels.SOURCES_MAX else None
        for first in range(0, width, kernels.SOURCES_MAX):
            stop = min(first + kernels.SOURCES_MAX, width)
            parts = self._parts(filled, rows, slots, (first, stop), targets if stop == width else None, sums)
            bad = kernels.mix(parts, go_on=first > 0, threads=self._threads)
        if self._plan.recipe.nan == "error" and bad.any():
            self._explain(filled, rows[int(np.argmax(bad))])

    def _sums(self, filled: Filled, rows: Sequence[int]) -> list[NDArray[np.float64]]:
        return [np.empty(filled.span.rows[i].box.volume * 2) for i in rows]

    def _parts(
        self,
        filled: Filled,
        rows: Sequence[int],
        slots: Sequence[Sequence[tuple[int, float]]],
        window: tuple[int, int],
        targets: Sequence[NDArray[np.uint8]] | None,
        sums: list[NDArray[np.float64]] | None,
    ) -> MixParts:
        num, width = len(rows), window[1] - window[0]
        source, dtype = np.zeros((num, width), np.uint64), np.zeros((num, width), np.int32)
        weight, divisor = np.zeros((num, width)), np.ones((num, 2))
        exact = np.zeros(num, np.uint8)
        base = int(filled.memory.ctypes.data)
        for k, i in enumerate(rows):
            plan = filled.span.rows[i].plan
            for s, (feed, share) in enumerate(slots[k][window[0] : window[1]]):
                source[k, s] = base + filled.places[i][feed]
                dtype[k, s] = FloatDtype[plan.feeds[feed].spec.dtype]
                weight[k, s] = share
            assert plan.coefficients is not None
            divisor[k] = plan.coefficients.divisor, plan.coefficients.divisor_rest
            exact[k] = any(feed.spec.dtype == "float64" for feed in plan.feeds)
        none = np.zeros(num, np.uint64)
        return MixParts(
            source=source,
            dtype=dtype,
            weight=weight,
            length=np.array([filled.span.rows[i].box.volume for i in rows], np.int64),
            divisor=divisor,
            sum=none if sums is None else np.array([one.ctypes.data for one in sums], np.uint64),
            target=none if targets is None else np.array([targets[i].ctypes.data for i in rows], np.uint64),
            target_dtype=np.array([FloatDtype[filled.span.rows[i].plan.spec.dtype] for i in rows], np.int32),
            exact=exact,
        )

    # methods

    def _element(self, filled: Filled, row: int, target: NDArray[np.uint8]) -> None:
        one = filled.span.rows[row]
        method = self._method(one)
        if in_memory(self._plan, one.plan, self._limits):
            constants = self._own_constants(filled, row, method)
        else:
            constants = self._constants(one.plan)
        whole, itemsize, dtype = self.tile(filled, row), one.plan.spec.itemsize, one.plan.spec.dtype
        boxes = list(self._tiles(whole, APPLY_ELEMENTS, one))
        stops = np.cumsum([box.volume * itemsize for box in boxes]).tolist()
        work = [
            (self._part(whole, box, len(boxes)), target[stop - box.volume * itemsize : stop])
            for box, stop in zip(boxes, stops, strict=True)
        ]
        with _matrices(method, whole.name):
            good = list(self._map(lambda item: method.write(item[0], constants, item[1], dtype), work))
        if self._plan.recipe.nan == "error" and not all(good):
            raise CheckpointError(
                f"method `{method.name}` made elements of `{one.plan.spec.name}` that are NaN, infinite or too large for "
                f"{dtype}",
                kind="not-finite",
            )

    def _own_constants(self, filled: Filled, row: int, method: Elementwise) -> Constants:
        """All passes over a tensor that is in memory."""
        constants: Constants = {}
        context = self._plan.bounds[filled.span.rows[row].plan.bound].context
        for number in range(method.needs.passes):
            constants = method.resolve(number, self.observe(filled, row, number, constants), constants, context)
        return constants

    def _method(self, row: Row) -> Elementwise:
        method = self._plan.bounds[row.plan.bound].method
        assert isinstance(method, Elementwise)
        return method

    def _tiles(self, whole: Tile, limit: int, row: Row) -> Iterator[Box]:
        unit = self._plan.bounds[row.plan.bound].needs.unit
        if unit == "matrix":
            yield Box(offsets=(0,) * len(whole.box.lengths), lengths=whole.box.lengths)
            return
        yield from cut(whole.box.lengths, limit, whole_rows=unit == "row")

    def _part(self, whole: Tile, box: Box, num: int) -> Tile:
        """One of `num` tiles. Threads share tiles out; a tile that is alone has them all."""
        return dataclasses.replace(whole.part(box), threads=self._threads if num == 1 else 1)

    def _map(self, work: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
        """In order; never more results at a time than threads."""
        if self._pool is None or len(items) < 2:
            yield from map(work, items)
            return
        for start in range(0, len(items), self._threads):
            yield from self._pool.map(work, items[start : start + self._threads])

    # everything else

    def _other(self, filled: Filled, row: int, target: NDArray[np.uint8]) -> None:
        one = filled.span.rows[row]
        if one.plan.kind == "copy":
            target[:] = filled.raw(row, 0)
        elif one.plan.kind == "same":
            self._same(filled, row)
            target[:] = filled.raw(row, len(one.plan.feeds) - 1)
        elif one.plan.kind == "pool":
            self._pool_variance(filled, row, target)
        else:
            _reset(one, target)

    def _same(self, filled: Filled, row: int) -> None:
        """Refuse a table that should be the same in all sources and is not."""
        one = filled.span.rows[row]
        last = len(one.plan.feeds) - 1
        for i, feed in enumerate(one.plan.feeds[:-1]):
            same = feed.spec.dtype == one.plan.feeds[last].spec.dtype
            if not same or not np.array_equal(filled.raw(row, i), filled.raw(row, last)):
                label = self._plan.source(feed.source).label
                raise MismatchError(
                    f"`{one.plan.spec.name}` should be the same in all sources, and is not in {label}",
                    kind="not-the-same",
                    hints=("a rule says what becomes of it: `policy: combine` or `policy: newest`",),
                )

    def _pool_variance(self, filled: Filled, row: int, target: NDArray[np.uint8]) -> None:
        """The variance of all data together: mean of (variance + mean^2), less the square of the mean of means."""
        one = filled.span.rows[row]
        assert one.plan.coefficients is not None
        weights = one.plan.coefficients.weights
        means = {
            f.source: kernels.widen(filled.elements(row, i)) for i, f in enumerate(one.plan.feeds) if f.role == "mean"
        }
        moment, mean = np.zeros(one.box.volume), np.zeros(one.box.volume)
        for i, feed in enumerate(one.plan.feeds):
            if feed.role == "x":
                moment = moment + weights[feed.source] * (
                    kernels.widen(filled.elements(row, i)) + means[feed.source] * means[feed.source]
                )
                mean = mean + weights[feed.source] * means[feed.source]
        divisor = one.plan.coefficients.divisor
        pooled = np.maximum(moment / divisor - (mean / divisor) * (mean / divisor), 0.0)
        if not kernels.narrow(pooled, one.plan.spec.dtype, target) and self._plan.recipe.nan == "error":
            self._explain(filled, row)

    # refusals

    def _explain(self, filled: Filled, row: int) -> None:
        """Name what was not finite: an element of a source, or else what came out."""
        one = filled.span.rows[row]
        for i, feed in enumerate(one.plan.feeds):
            elements = filled.elements(row, i)
            if not kernels.all_finite(elements):
                raise self._not_finite(one, feed, elements)
        raise CheckpointError(
            f"`{one.plan.spec.name}` has elements that are too large for {one.plan.spec.dtype} when they are merged",
            kind="not-finite",
            hints=("store another dtype: `--dtype float32`",),
        )

    def _not_finite(self, row: Row, feed: Feed, elements: Elements) -> CheckpointError:
        values = kernels.widen(elements)
        first = int(np.argmax(~np.isfinite(values)))
        index = [int(i) for i in np.unravel_index(first, row.feed_box(feed).lengths)] if values.size > 1 else []
        if not feed.whole:
            index = [a + b for a, b in zip(index, row.box.offsets, strict=False)]
        return CheckpointError(
            f"`{feed.spec.name}` of {self._plan.source(feed.source).label} is {values[first]} at {index}",
            kind="not-finite",
            hints=("leave that source out, or let such numbers pass: `numerics: {nan: propagate}`",),
        )


@contextlib.contextmanager
def _matrices(method: Elementwise, name: str) -> Iterator[None]:
    """What a method does with whole matrices: on one thread of BLAS, and with a tensor's name in what LAPACK has to say."""
    if not isinstance(method, Matrix):
        yield
        return
    try:
        with one_thread():
            yield
    except np.linalg.LinAlgError as error:
        raise CheckpointError(
            f"method `{method.name}` cannot merge `{name}`: {error}", kind="no-convergence"
        ) from error


def _slots(row: Row) -> list[tuple[int, float]]:
    """(feed, weight) of a weighted sum, sources in canonical order, the base last."""
    coefficients = row.plan.coefficients
    assert coefficients is not None
    return [
        (i, coefficients.base if feed.role == "base" else coefficients.weights[feed.source])
        for i, feed in enumerate(row.plan.feeds)
    ]


def _reset(row: Row, target: NDArray[np.uint8]) -> None:
    """As a new module has it: a running variance of one, everything else zero."""
    target[:] = 0
    if row.plan.spec.name.endswith("running_var"):
        kernels.narrow(np.ones(row.box.volume), row.plan.spec.dtype, target)
