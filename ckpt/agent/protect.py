"""Make the parity that one member holds, out of the blobs of its group.

In: a card, the group's peers, memory for the parity. Out: parity in that memory and the cards that it is of. Pulls; nobody
pushes. A peer that has not sealed the step yet is asked again until the deadline. Never looks at bytes that were not verified on
arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.agent.decode import key_of
from ckpt.agent.inventory import Card, Parity
from ckpt.agent.stripes import Block, Step, Stripes, encode_plan
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.ring import Ring
from ckpt.config import Options
from ckpt.errors import PeerError
from ckpt.format.checksum import piece_bytes_of
from ckpt.kernels.erasure import code_blocks, code_for

_NOTHING = np.empty(0, np.uint8)  # a source that ends before the chunk counts as zeros
_ASK_S = (0.005, 0.2)  # between two questions to a peer that is not as far yet: at first, and at most


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was done."""

    parity: Parity
    pulled_nbytes: int
    pull_s: float
    code_s: float


def nbytes_needed(blob_bytes: int, *, num_members: int, parity: int) -> int:
    """Room for the parity of a group whose largest blob has so many bytes."""
    return Stripes(image_nbytes=(blob_bytes,) * num_members, num_parity=parity).parity_nbytes


def cards_of_group(
    card: Card, peers: Mapping[int, Peer], *, ends_at: float, stopped: Callable[[], bool] = lambda: False
) -> tuple[Card, ...]:
    """The cards of all members for the step of `card`.

    Raises:
        PeerError: one has none by `ends_at` (of `time.monotonic`), or says that it will have none.
    """
    found = {card.rank: card}
    pause_s = _ASK_S[0]
    while True:
        for rank in card.members:
            if rank in found:
                continue
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                missing = [r for r in card.members if r not in found]
                raise PeerError(f"ranks {missing} have not sealed step {card.step} in time", kind="peer-late")
            answer = peers[rank].call("card", {"step": card.step, "attempt": card.attempt}, deadline_s=left_s)
            if answer.get("card") is not None:
                found[rank] = _fitting(Card.from_fields(answer["card"]), card)
            elif answer.get("missed"):
                raise PeerError(f"rank {rank} has no step {card.step}: {answer['missed']}", kind="peer-not-held")
        if len(found) == len(card.members):
            return tuple(found[rank] for rank in card.members)
        if stopped():
            raise PeerError(f"step {card.step} was given up", kind="peer-stopped")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _ASK_S[1])


def waves(step: Step, member: int, num_members: int, width: int) -> list[list[int]]:
    """The numbers of the sources of `step` that have bytes, in as few parts of at most `width` as can be, which are even.

    Who comes after `member` in the group comes first, so that what all members pull at a time is spread evenly over them.
    """
    order = [number for number, source in enumerate(step.sources) if source.nbytes]
    order.sort(key=lambda number: (step.sources[number].member - member) % num_members)
    count = -(-len(order) // width)
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [sorted(order[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def _fitting(theirs: Card, ours: Card) -> Card:
    if theirs.of != ours.of or theirs.members != ours.members or theirs.parity != ours.parity:
        raise PeerError(
            f"rank {theirs.rank} saved step {theirs.step} in a group {list(theirs.members)}, expected {list(ours.members)}",
            kind="peer-refused",
        )
    return theirs


def make_parity(
    cards: tuple[Card, ...],
    rank: int,
    peers: Mapping[int, Peer],
    memory: memoryview,
    *,
    run_id: str,
    options: Options,
    ends_at: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Made:
    """Fill the first bytes of `memory` with the parity that `rank` holds.

    Raises:
        PeerError: a blob cannot be had, or not by `ends_at`; what is in `memory` is void.
    """
    stripes = Stripes(image_nbytes=tuple(card.blob_bytes for card in cards), num_parity=cards[0].parity)
    member = cards[0].members.index(rank)
    with _Encoder(cards, stripes, member, peers, memory, run_id=run_id, options=options, ends_at=ends_at) as encoder:
        for step in encode_plan(stripes, member).steps:
            encoder.make(step, stopped)
        parity = Parity(rank=rank, cards=cards, block_bytes=stripes.block_bytes)
        return Made(parity=parity, pulled_nbytes=encoder.pulled_nbytes, pull_s=encoder.pull_s, code_s=encoder.code_s)


class _Encoder:
    """Pulls the sources of a block, a few side by side, each by one transfer, and codes chunk by chunk as they come. One thread;
    transfers on threads of their own. What is coded counts once all transfers have turned out whole."""

    def __init__(
        self,
        cards: tuple[Card, ...],
        stripes: Stripes,
        member: int,
        peers: Mapping[int, Peer],
        memory: memoryview,
        *,
        run_id: str,
        options: Options,
        ends_at: float,
    ) -> None:
        self._cards, self._stripes, self._peers, self._memory = cards, stripes, peers, memory
        self._member = member
        self._run_id, self._options, self._ends_at = run_id, options, ends_at
        self._code = code_for(stripes.num_data, stripes.num_parity)
        # Of whole pieces: only of those does their holder know what they were when they were sealed.
        piece = piece_bytes_of(max(stripes.image_nbytes))
        self._chunk_bytes = min(max(options.peer_chunk_bytes // piece, 1) * piece, max(stripes.block_bytes, 1))
        self._num_lanes = min(stripes.num_data, options.protect_streams_max)
        self._lanes = ThreadPoolExecutor(self._num_lanes, thread_name_prefix="ckpt-pull")
        self._rings: list[Ring] = []
        self.pulled_nbytes, self.pull_s, self.code_s = 0, 0.0, 0.0

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()
        self._lanes.shutdown(cancel_futures=True)

    def _give_up(self) -> None:
        for ring in self._rings:
            ring.fail(PeerError("the encoding was given up", kind="peer-stopped"))

    def make(self, step: Step, stopped: Callable[[], bool]) -> None:
        """Fill the target of one step, a few sources at a time."""
        rows = self._code.rows(have=step.have, wanted=[step.target.piece])
        for number, chosen in enumerate(waves(step, self._member, self._stripes.num_members, self._num_lanes)):
            part = Step(target=step.target, sources=tuple(step.sources[one] for one in chosen))
            self._fold(part, np.ascontiguousarray(rows[:, chosen]), add=number > 0, stopped=stopped)
        self.pulled_nbytes += sum(source.nbytes for source in step.sources)

    def _fold(self, step: Step, rows: NDArray[np.uint8], *, add: bool, stopped: Callable[[], bool]) -> None:
        """Set the target to what these sources give, or add that to it."""
        self._rings = rings = [Ring(chunk_bytes=self._chunk_bytes) for _ in step.sources]
        waiting = [
            self._lanes.submit(self._pull, source, ring) for source, ring in zip(step.sources, rings, strict=True)
        ]
        for part in step.chunks(self._chunk_bytes):
            if stopped():
                raise PeerError("the agent ends", kind="peer-stopped")
            self._code_chunk(part, rings, rows, add)
            failpoints.hit("agent.in-parity")
        before = time.perf_counter()
        for future in waiting:
            future.result()
        self._rings = []  # before the next ones are made
        self.pull_s += time.perf_counter() - before

    def _code_chunk(self, part: Step, rings: Sequence[Ring], rows: NDArray[np.uint8], add: bool) -> None:
        before = time.perf_counter()
        having = [ring for ring, source in zip(rings, part.sources, strict=True) if source.nbytes]
        found = {id(ring): ring.take(ends_at=self._ends_at) for ring in having}
        between = time.perf_counter()
        sources = [found.get(id(ring), _NOTHING) for ring in rings]
        target = self._memory[part.target.start : part.target.stop]
        code_blocks(sources, [target], rows, add=add, tile_bytes=self._options.code_tile_bytes)
        del found, sources  # the rings hold them, and let go of them now
        for ring in having:
            ring.give_back()
        self.pull_s += between - before
        self.code_s += time.perf_counter() - between

    def _pull(self, source: Block, ring: Ring) -> int:
        card = self._cards[source.member]
        key = key_of(
            self._stripes, source, run_id=self._run_id, step=card.step, attempt=card.attempt, members=card.members
        )
        left_s = max(self._ends_at - time.monotonic(), 0.001)
        return self._peers[card.rank].pull_through(key, source.start, source.stop, ring, deadline_s=left_s)
