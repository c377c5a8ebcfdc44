"""Ranges of blobs, from wherever they are left: of the agent that holds them, or decoded from those of its group.

In: a candidate, and how to pull from an agent. Out: bytes in the caller's memory, or an error; then that memory is void. Pulls
are verified against what their holder has, holders verify what they have when they tell their inventory, and readers verify
blocks against the index: a decoder itself finds nothing. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.agent.inventory import Candidate, Group
from ckpt.agent.stripes import Block, Stripes, rebuild_plan
from ckpt.agent.transport.wire import Key
from ckpt.config import Options
from ckpt.errors import NotFoundError
from ckpt.kernels.erasure import code_blocks, code_for


class Pull(Protocol):
    """Fill `into` with bytes [start, stop) of what the agent at `address` holds under `key`, verified. Any thread."""

    def __call__(self, address: str, key: Key, start: int, stop: int, into: memoryview) -> None: ...


class Blobs:
    """All blobs of one recoverable candidate. `close` may be called twice."""

    def __init__(self, candidate: Candidate, *, run_id: str, pull: Pull, options: Options) -> None:
        self._candidate, self._run_id, self._pull, self._options = candidate, run_id, pull, options
        self._place = {
            card.rank: (group, place) for group in candidate.groups for place, card in enumerate(group.cards)
        }
        self._lanes = ThreadPoolExecutor(options.peer_streams_each_max, thread_name_prefix="ckpt-decode")
        self.decoded_nbytes = 0  # so far, for the report

    def is_lost(self, rank: int) -> bool:
        """Whether nobody holds the blob of `rank`, so that it is decoded."""
        group, place = self._place[rank]
        return place in group.lost

    def holder(self, rank: int) -> str | None:
        """The address of who holds the blob of `rank`; None when it is lost."""
        group, place = self._place[rank]
        return group.blobs.get(place)

    def read_into(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on of the blob of `rank`."""
        group, place = self._place[rank]
        if place in group.lost:
            self._decode(group, place, start, start + len(into), into)
        else:
            self._pull(group.blobs[place], self._image_key(rank), start, start + len(into), into)

    def close(self) -> None:
        """Stop the threads."""
        self._lanes.shutdown(cancel_futures=True)

    def _decode(self, group: Group, place: int, start: int, stop: int, into: memoryview) -> None:
        stripes = stripes_of(group)
        plan = rebuild_plan(stripes, place, lost=group.incomplete)
        code = code_for(stripes.num_data, stripes.num_parity)
        for step in plan.steps:
            target = step.target
            low, high = max(start, target.start), min(stop, target.stop)
            if target.parity or low >= high:
                continue
            rows = code.rows(have=step.have, wanted=[target.piece])
            for at in range(low, high, self._options.peer_chunk_bytes):
                end = min(at + self._options.peer_chunk_bytes, high)
                parts = [source.part(at - target.start, end - target.start) for source in step.sources]
                sources = self._fetch(group, stripes, parts)
                code_blocks(sources, [into[at - start : end - start]], rows)
                self.decoded_nbytes += end - at

    def _fetch(self, group: Group, stripes: Stripes, parts: Sequence[Block]) -> list[NDArray[np.uint8]]:
        buffers = [np.empty(part.nbytes, np.uint8) for part in parts]

        def one(part: Block, buffer: NDArray[np.uint8]) -> None:
            holders = group.parities if part.parity else group.blobs
            if part.member not in holders:
                raise NotFoundError(f"nobody holds the {part} that decoding needs", kind="no-object")
            key = self._key(group, stripes, part)
            low = part.start - (part.start // stripes.block_bytes * stripes.block_bytes if part.parity else 0)
            self._pull(holders[part.member], key, low, low + part.nbytes, buffer.data)

        wanted = [(part, buffer) for part, buffer in zip(parts, buffers, strict=True) if part.nbytes]
        for future in [self._lanes.submit(one, part, buffer) for part, buffer in wanted]:
            future.result()
        return buffers

    def _key(self, group: Group, stripes: Stripes, part: Block) -> Key:
        card = group.cards[part.member]
        return key_of(stripes, part, run_id=self._run_id, step=card.step, attempt=card.attempt, members=card.members)

    def _image_key(self, rank: int) -> Key:
        one = self._candidate
        return Key(run_id=self._run_id, step=one.step, attempt=one.attempt, kind="image", rank=rank)


def stripes_of(group: Group) -> Stripes:
    """How the blobs of a group are cut."""
    return Stripes(image_nbytes=tuple(card.blob_bytes for card in group.cards), num_parity=group.cards[0].parity)


def key_of(stripes: Stripes, part: Block, *, run_id: str, step: int, attempt: str, members: Sequence[int]) -> Key:
    """Under which its holder serves a block: whole blobs, and each row of parity by itself."""
    if not part.parity:
        return Key(run_id=run_id, step=step, attempt=attempt, kind="image", rank=members[part.member])
    row = (part.member - part.stripe) % stripes.num_members
    return Key(run_id=run_id, step=step, attempt=attempt, kind="parity", group=members[0], stripe=part.stripe, row=row)
