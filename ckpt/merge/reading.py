"""Read the pieces of spans into memory, some spans ahead of the one that is computed.

In: spans of one image. Out: `Filled` spans in their order: every piece of every feed, verified, in the memory of an arena.
Holds no more arenas than the limit allows (one in any case), and uses them again: a first touch of memory costs several times
a reuse.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.read import Progress, run_reads
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError
from ckpt.format.index import PARTIAL_BYTES_MIN, FragmentTable
from ckpt.format.spec import PieceTable
from ckpt.kernels import ReadBuffer
from ckpt.kernels.merge import Elements
from ckpt.layout.box import Box, BoxTable, Int64Array
from ckpt.merge.images import ImagePlan
from ckpt.merge.plan import Feed, MergePlan
from ckpt.merge.sources import Source
from ckpt.merge.spans import Limits, Span, aligned
from ckpt.plan.read import contiguous_strides, uncovered
from ckpt.snapshot.images import allocate

SPANS_AHEAD = 3  # that are computed, or read, at a time
READS_AT_ONCE = 3  # sources that are read at a time, each with some native reads in flight


@dataclass(frozen=True, kw_only=True, eq=False)
class Filled:
    """A span whose pieces are in memory."""

    span: Span
    memory: NDArray[np.uint8]
    places: tuple[tuple[int, ...], ...]  # by row and feed: byte of `memory`

    def raw(self, row: int, feed: int) -> NDArray[np.uint8]:
        """The bytes of one piece."""
        one = self.span.rows[row]
        start = self.places[row][feed]
        return self.memory[start : start + one.feed_nbytes(one.plan.feeds[feed])]

    def elements(self, row: int, feed: int) -> Elements:
        return Elements(data=self.raw(row, feed), dtype=self.span.rows[row].plan.feeds[feed].spec.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Wanted:
    """Pieces of one source."""

    source: int
    feeds: list[tuple[Feed, Box, int]]  # with the place in memory


class Spans(Protocol):
    """Where spans come from."""

    def take(self, *, wait: bool) -> tuple[ImagePlan, Span] | None:
        """The next one. None: there are no more; without `wait` also: none is known yet."""


class Arenas:
    """Memory for spans, taken and given back by any thread; `take` waits while too much is out."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._free: list[NDArray[np.uint8]] = []
        self._out = 0  # bytes

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """At least so many bytes; None while that would be over the total and others are out."""
        if self._out and self._out + nbytes > self._total:
            return None
        fitting = [arena for arena in self._free if len(arena) >= nbytes]
        if fitting:
            chosen = min(fitting, key=len)
            self._free = [arena for arena in self._free if arena is not chosen]
        else:
            while self._free and self._out + nbytes + sum(map(len, self._free)) > self._total:
                self._free.pop()  # those that are too small make way for the new one
            chosen = allocate(max(nbytes, 1))
        self._out += len(chosen)
        return chosen

    def give_back(self, arena: NDArray[np.uint8]) -> None:
        self._out -= len(arena)
        self._free.append(arena)

    def clear(self) -> None:
        self._free = []


class SpanReader:
    """Reads spans of images, some ahead. One owner thread; its reads run on threads of its own. `close` may be called twice."""

    def __init__(self, plan: MergePlan, limits: Limits, progress: Progress | None = None) -> None:
        self._plan, self._progress = plan, progress
        self._arenas = Arenas(limits.total_bytes)
        self._pool = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="ckpt-merge-read")
        self._local = threading.local()
        self._fragments = _Fragments()
        self.read_nbytes = 0

    def read(self, spans: Spans) -> Iterator[tuple[ImagePlan, Filled]]:
        """The spans, filled, those of one image after those of another. A span's memory is taken back when the next one is
        asked for."""
        ahead: deque[tuple[ImagePlan, Filled, list[Future[int]]]] = deque()
        waiting: tuple[ImagePlan, Span] | None = None
        image, fragments = None, None
        try:
            while True:
                while len(ahead) < SPANS_AHEAD and (
                    waiting is not None or (waiting := spans.take(wait=not ahead)) is not None
                ):
                    if image is not waiting[0]:
                        image, fragments = waiting[0], self._fragments.part(self._plan, waiting[0])
                    assert fragments is not None
                    started = self._start(waiting[1], fragments)
                    if started is None:
                        break
                    ahead.append((waiting[0], *started))
                    waiting = None
                if not ahead:
                    return
                of, filled, futures = ahead[0]
                for future in futures:
                    self.read_nbytes += future.result()
                yield of, filled
                self._arenas.give_back(filled.memory)
                ahead.popleft()
        finally:
            for _, _, futures in ahead:
                for future in futures:
                    future.cancel()
                wait(futures)

    def close(self) -> None:
        """End the threads and let go of the memory."""
        self._pool.shutdown()
        self._arenas.clear()

    def _start(self, span: Span, fragments: _Part) -> tuple[Filled, list[Future[int]]] | None:
        """Begin to read a span; None while there is no memory for it."""
        memory = self._arenas.take(span.read_nbytes)
        if memory is None:
            return None
        places: list[tuple[int, ...]] = []
        wanted: dict[int, _Wanted] = {}
        at = 0
        for row in span.rows:
            starts = []
            for feed in row.plan.feeds:
                starts.append(at)
                pieces = wanted.setdefault(feed.source, _Wanted(source=feed.source, feeds=[]))
                pieces.feeds.append((feed, row.feed_box(feed), at))
                at += aligned(row.feed_nbytes(feed))
            places.append(tuple(starts))
        filled = Filled(span=span, memory=memory, places=tuple(places))
        return filled, [self._pool.submit(self._fill, one, memory, fragments) for one in wanted.values()]

    def _fill(self, wanted: _Wanted, memory: NDArray[np.uint8], fragments: _Part) -> int:
        """Read the pieces of one source; bytes read."""
        source = self._plan.source(wanted.source)
        table = fragments.of(wanted.source)
        pieces = _pieces(wanted, memory)
        reads = source.reader.plan(table, pieces)
        missing = uncovered(reads.copies, pieces)
        if len(missing):
            name = source.specs[int(pieces.boxes.tensor[missing[0]])].name
            raise DamagedError(f"{source.label} is damaged: elements of `{name}` are in no fragment")
        if not hasattr(self._local, "buffer"):
            self._local.buffer = ReadBuffer()
        job = dataclasses.replace(source.reader.job(table, pieces, reads), buffer=self._local.buffer)
        run_reads(job, progress=self._progress)
        return reads.read_nbytes


class _Fragments:
    """The fragments of all sources: small indexes are kept, of large ones only what an image needs is read."""

    def __init__(self) -> None:
        self._whole: dict[int, FragmentTable] = {}

    def part(self, plan: MergePlan, image: ImagePlan) -> _Part:
        """Those of the tensors that an image is made from."""
        wanted: dict[int, set[int]] = {}
        for number in image.tensors:
            for feed in plan.tensors[number].feeds:
                wanted.setdefault(feed.source, set()).add(feed.tensor)
        return _Part(self._whole, {n: (plan.source(n), np.array(sorted(ids))) for n, ids in wanted.items()})


class _Part:
    """The fragments that one image needs, looked up when they are first wanted. Any thread."""

    def __init__(self, whole: dict[int, FragmentTable], wanted: dict[int, tuple[Source, NDArray[np.int64]]]) -> None:
        self._whole, self._wanted = whole, wanted
        self._known: dict[int, FragmentTable] = {}
        self._lock = threading.Lock()

    def of(self, number: int) -> FragmentTable:
        with self._lock:
            if number not in self._known:
                self._known[number] = self._find(number)
            return self._known[number]

    def _find(self, number: int) -> FragmentTable:
        source, ids = self._wanted[number]
        stored = source.reader
        if isinstance(stored, StoredCheckpoint) and stored.manifest.fragments.nbytes > PARTIAL_BYTES_MIN:
            return stored.fragments(ids)
        if number not in self._whole:
            self._whole[number] = stored.fragments(None)
        return self._whole[number].of_tensors(ids)


def _pieces(wanted: _Wanted, memory: NDArray[np.uint8]) -> PieceTable:
    """The pieces of one source, sorted by tensor."""
    items = sorted(wanted.feeds, key=lambda item: (item[0].tensor, item[2]))
    boxes = BoxTable.build((feed.tensor, box) for feed, box, _ in items)
    itemsize: Int64Array = np.array([feed.spec.itemsize for feed, _, _ in items], np.int64)
    base = memory.ctypes.data
    return PieceTable(
        boxes=boxes,
        address=np.array([at + base for _, _, at in items], np.uint64),
        limit=np.full(len(items), base + len(memory), np.uint64),
        strides=contiguous_strides(boxes.lengths, itemsize),
    )
