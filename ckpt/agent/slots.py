"""The images of one rank in memory: two generations, of which one is always whole.

In: what the trainer and the group report. Out: segments, and refusals. The newest complete image is never written over: a trainer
that wants to write while nothing else is free is told `busy` and skips. Age is told by generation, not by step: after a restart
from an older image the same steps come again. Any thread; waits for nobody but whoever touches new memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt.agent import budget, segments
from ckpt.agent.header import HEADER_BYTES, Header, State
from ckpt.agent.identity import Identity, make_private
from ckpt.agent.segments import Segment
from ckpt.config import AGENT_SEGMENTS_MAX, Options
from ckpt.errors import AgentError, InvalidInputError

NUM_GENERATIONS = 2


class Slots:
    """The segments of an agent."""

    def __init__(self, folder: Path, identity: Identity, options: Options, *, complete: State = State.SEALED) -> None:
        """
        Args:
            complete: the state from which on an image may replace the one before: PROTECTED where there is a group.
        """
        self.complete = complete
        self._folder, self._identity, self._options = folder, identity, options
        self._segments: list[Segment] = []
        self._pins: dict[str, int] = {}
        self._image_bytes = 0  # as reserved
        self._lock = threading.RLock()
        self._reserving = threading.Lock()

    def take(self, adopted: Sequence[Segment]) -> None:
        """Hold what an earlier agent left."""
        with self._lock:
            self._segments += adopted

    def reserve(self, image_bytes: int) -> list[Segment]:
        """Room for `NUM_GENERATIONS` images; keeps the newest complete one, in a segment of another size if need be.

        Raises:
            BudgetError: there is no memory for that. Nothing was taken, and what was held is held.
        """
        if image_bytes < 1:
            raise InvalidInputError(f"an image must have bytes, found {image_bytes}")
        with self._reserving:
            with self._lock:
                old = [one for one in self._segments if not self._fits(one, image_bytes) and self._is_spare(one)]
                missing = NUM_GENERATIONS - sum(self._fits(one, image_bytes) for one in self._segments)
                if missing > 0:
                    self._check_budget(missing * image_bytes, old)
                self._image_bytes = image_bytes
                for segment in old:
                    self._drop(segment)
            made = [self._make(image_bytes) for _ in range(missing)]
            with self._lock:
                self._segments += made
                return list(self._segments)

    def begin(self, *, step: int, attempt: str, epoch: int, world: int) -> Segment:
        """A segment to write into. AgentError `busy` when none is free, `not-reserved` when there is none."""
        with self._lock:
            usable = [one for one in self._segments if self._fits(one, self._image_bytes)] if self._image_bytes else []
            if not usable:
                raise AgentError("no memory is reserved for images", kind="not-reserved")
            free = [one for one in usable if self._is_spare(one)]
            if not free:
                held = ", ".join(f"step {one.header.step} {one.header.state.name}" for one in usable)
                raise AgentError(f"no memory is free for step {step}: {held}", kind="busy")
            segment = min(free, key=lambda one: (one.header.state is not State.EMPTY, one.header.generation))
            generation = 1 + max(one.header.generation for one in self._segments)
            segment.begin(generation=generation, step=step, attempt=attempt, epoch=epoch, world=world)
            return segment

    def seal(self, name: str, generation: int, image_bytes: int, image_crc: int | None) -> Segment:
        """The image is complete; takes its checksum, unless that is given."""
        with self.pinned(name, generation) as segment:
            self._expect(segment, State.WRITING)
            if not 0 <= image_bytes <= segment.header.capacity_bytes:
                raise InvalidInputError(
                    f"an image of {image_bytes:,} bytes in a segment of {segment.header.capacity_bytes:,}"
                )
            crc = segment.crc(image_bytes) if image_crc is None else image_crc
            with self._lock:
                self._find(name, generation)  # nobody abandoned it meanwhile
                self._expect(segment, State.WRITING)
                segment.seal(image_bytes, crc)
        self._retire()
        return segment

    def protect(self, name: str, generation: int) -> None:
        """The group can make the image again."""
        with self._lock:
            segment = self._find(name, generation)
            self._expect(segment, State.SEALED)
            segment.update(state=State.PROTECTED)
        self._retire()

    def abandon(self, name: str, generation: int) -> None:
        """The image will not be completed."""
        with self._lock:
            segment = self._find(name, generation)
            self._expect(segment, State.WRITING)
            segment.empty()

    def discard(self, name: str, generation: int) -> None:
        """The image does not count any more: it is damaged, say."""
        with self._lock:
            self._find(name, generation).empty()

    def abandon_writing(self) -> list[Header]:
        """The trainer is gone: what it was writing is nothing. What that was."""
        with self._lock:
            writing = [one for one in self._segments if one.header.state is State.WRITING]
            lost = [one.header for one in writing]
            for segment in writing:
                segment.empty()
            return lost

    def newest(self) -> Header | None:
        """The newest complete image."""
        with self._lock:
            complete = [one.header for one in self._segments if one.header.state >= self.complete]
            return max(complete, key=lambda header: header.generation, default=None)

    def headers(self) -> list[Header]:
        """Of all segments."""
        with self._lock:
            return [one.header for one in self._segments]

    def by_name(self) -> dict[str, Header]:
        """Of all segments, at one moment."""
        with self._lock:
            return {one.name: one.header for one in self._segments}

    def describe(self) -> list[dict[str, Any]]:
        """All segments for an answer, in the order of `all`."""
        with self._lock:
            return [describe(one) for one in self._segments]

    def all(self) -> list[Segment]:
        """All segments, in the order of `describe`."""
        with self._lock:
            return list(self._segments)

    @contextmanager
    def pinned(self, name: str, generation: int) -> Iterator[Segment]:
        """The segment while it holds this generation; it is not given to a trainer meanwhile."""
        with self._lock:
            segment = self._find(name, generation)
            self._pins[name] = self._pins.get(name, 0) + 1
        try:
            yield segment
        finally:
            with self._lock:
                self._pins[name] -= 1

    def touch(self) -> None:
        """Say in every header that this agent lives."""
        with self._lock:
            for segment in self._segments:
                segment.update()

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        with self._lock:
            while self._segments:
                self._segments.pop().unlink()
            try:
                self._folder.rmdir()
            except OSError:
                pass  # other agents' segments lie there, or it is gone

    def _fits(self, segment: Segment, image_bytes: int) -> bool:
        return segment.header.capacity_bytes >= image_bytes

    def _is_spare(self, segment: Segment) -> bool:
        """Whether what it holds may go: nothing, or an image older than the newest complete one."""
        header, newest = segment.header, self.newest()
        if self._pins.get(segment.name):
            return False
        older = newest is not None and header.generation < newest.generation
        return header.state is State.EMPTY or (header.is_complete and older)

    def _retire(self) -> None:
        """Give back segments of an earlier size once nothing needs them."""
        with self._lock:
            for segment in list(self._segments):
                if self._image_bytes and not self._fits(segment, self._image_bytes) and self._is_spare(segment):
                    self._drop(segment)

    def _drop(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.unlink()

    def _check_budget(self, need_bytes: int, old: Sequence[Segment]) -> None:
        if len(self._segments) + NUM_GENERATIONS > AGENT_SEGMENTS_MAX:
            raise AgentError(f"over {AGENT_SEGMENTS_MAX} segments of one rank", kind="too-many-segments")
        make_private(self._folder)
        freed_bytes = sum(HEADER_BYTES + one.header.capacity_bytes for one in old)
        need_bytes += NUM_GENERATIONS * HEADER_BYTES - freed_bytes
        budget.check(max(0, need_bytes), budget.look(self._folder), self._options)

    def _make(self, image_bytes: int) -> Segment:
        segment = segments.create(self._folder, self._identity, image_bytes)
        try:
            segment.populate()
        except BaseException:
            segment.unlink()
            raise
        return segment

    def _find(self, name: str, generation: int) -> Segment:
        for segment in self._segments:
            if segment.name == name and segment.header.generation == generation:
                return segment
        raise AgentError(f"segment `{name}` does not hold generation {generation} any more", kind="stale-generation")

    def _expect(self, segment: Segment, state: State) -> None:
        if segment.header.state is not state:
            raise AgentError(
                f"segment `{segment.name}` is {segment.header.state.name}, expected {state.name}",
                kind="stale-generation",
            )


def describe(segment: Segment) -> dict[str, Any]:
    """A segment for an answer."""
    header = segment.header
    return {
        "name": segment.name,
        "state": header.state.name,
        "generation": header.generation,
        "step": header.step,
        "attempt": header.attempt,
        "epoch": header.epoch,
        "world": header.world,
        "capacity_bytes": header.capacity_bytes,
        "image_bytes": header.image_bytes,
        "image_crc": header.image_crc,
        "populate_s": segment.populate_s,
    }
