"""What an agent holds that is whole.

In: the segments of its images and of its parity. Out: an inventory. Every byte is looked at; what is damaged is dropped and told
in the log, so that it counts as lost. A look that was taken a moment ago need not be taken again when a job starts: an agent
takes it ahead, as soon as its trainer is gone. Any thread; one look at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt.agent import blob
from ckpt.agent.inventory import Card, Inventory, Parity
from ckpt.agent.segments import Segment
from ckpt.agent.slots import Slots
from ckpt.config import AGENT_LOOK_S
from ckpt.errors import AgentError, CheckpointError, DamagedError
from ckpt.kernels import set_thread_nice

if TYPE_CHECKING:
    from ckpt.agent.process import Agent

_Record = TypeVar("_Record")


class Look:
    """Looks of one agent.

    Args:
        address: where its peers find it now.
    """

    def __init__(self, agent: Agent, parity: Slots, address: Callable[[], str]) -> None:
        self._agent, self._parity, self._address = agent, parity, address
        self._looking = threading.Lock()  # who comes meanwhile has it from the look that is under way
        self._seen: dict[
            str, tuple[int, float]
        ] = {}  # segment -> generation that was whole, and when (`time.monotonic`)

    def inventory(self, *, fresh: bool) -> Inventory:
        """What is whole here.

        Args:
            fresh: look at every byte; else not again at what was looked at within `AGENT_LOOK_S`.
        """
        with self._looking:
            blobs = self._records(self._agent.slots, Card.from_fields, fresh=fresh)
            parities = self._records(self._parity, Parity.from_fields, fresh=fresh)
        chosen = self._agent.memo.memo.chosen
        return Inventory(address=self._address(), blobs=blobs, parities=parities, chosen=chosen)

    def ahead(self) -> None:
        """Look at what is here, on a thread of its own. Drops nothing: that is for who asks."""

        def look() -> None:
            set_thread_nice(self._agent.options.flush_nice)
            with self._looking:
                for segment in (*self._agent.slots.all(), *self._parity.all()):
                    header = segment.header
                    with contextlib.suppress(CheckpointError, ValueError):  # given back meanwhile
                        if header.is_complete and segment.is_whole:
                            self._seen[segment.name] = header.generation, time.monotonic()

        threading.Thread(target=look, name="ckpt-look", daemon=True).start()

    def _records(self, slots: Slots, parse: Callable[[Any], _Record], *, fresh: bool) -> tuple[_Record, ...]:
        found = (self._record(slots, segment, parse, fresh=fresh) for segment in slots.all())
        return tuple(one for one in found if one is not None)

    def _record(
        self, slots: Slots, segment: Segment, parse: Callable[[Any], _Record], *, fresh: bool
    ) -> _Record | None:
        """What a segment holds; None when that is nothing whole. What was written over meanwhile is not damaged."""
        header = segment.header
        if not header.is_complete:
            return None
        known = not fresh and self._was_seen(segment.name, header.generation)
        try:
            if not known and not segment.is_whole:
                raise DamagedError(f"the checksum of segment `{segment.name}` is wrong", kind="bad-checksum")
            what = f"segment `{segment.name}`"
            found = parse(blob.read_record(segment.payload()[: header.image_bytes], what=what)[0])
            now = segment.header
            if not now.is_complete or now.generation != header.generation:
                return None
            if not known:
                self._seen[segment.name] = header.generation, time.monotonic()
            return found
        except CheckpointError as error:
            now = segment.header
            if now.generation == header.generation and now.is_complete:
                self._agent.log.tell("damaged", step=header.step, segment=segment.name, error=error.message)
                with contextlib.suppress(AgentError):  # begun anew since that look
                    slots.discard(segment.name, header.generation)
            return None

    def _was_seen(self, name: str, generation: int) -> bool:
        seen = self._seen.get(name)
        return seen is not None and seen[0] == generation and time.monotonic() - seen[1] < AGENT_LOOK_S
