"""Make the parity that one member holds, out of the blobs of its group.

In: a card, the group's peers, memory for the parity. Out: parity in that memory and the cards that it is of. Pulls; nobody
pushes. A peer that has not sealed the step yet is asked again until the deadline. Never looks at bytes that were not verified on
arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.agent.decode import key_of
from ckpt.agent.inventory import Card, Parity
from ckpt.agent.stripes import Block, Step, Stripes, encode_plan
from ckpt.agent.transport.client import Peer
from ckpt.config import Options
from ckpt.errors import PeerError
from ckpt.kernels.erasure import code_blocks, code_for

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
    with _Encoder(cards, stripes, peers, memory, run_id=run_id, options=options, ends_at=ends_at) as encoder:
        for step in _chunks(stripes, member, encoder.chunk_bytes):
            if stopped():
                raise PeerError("the agent ends", kind="peer-stopped")
            encoder.add(step)
            failpoints.hit("agent.in-parity")
        encoder.finish()
        parity = Parity(rank=rank, cards=cards, block_bytes=stripes.block_bytes)
        return Made(parity=parity, pulled_nbytes=encoder.pulled_nbytes, pull_s=encoder.pull_s, code_s=encoder.code_s)


class _Encoder:
    """Two sets of buffers: one is filled by pulls while the other is coded. One thread; pulls on threads of its own."""

    def __init__(
        self,
        cards: tuple[Card, ...],
        stripes: Stripes,
        peers: Mapping[int, Peer],
        memory: memoryview,
        *,
        run_id: str,
        options: Options,
        ends_at: float,
    ) -> None:
        self._cards, self._stripes, self._peers, self._memory = cards, stripes, peers, memory
        self._run_id, self._options, self._ends_at = run_id, options, ends_at
        self._code = code_for(stripes.num_data, stripes.num_parity)
        self.chunk_bytes = min(options.peer_chunk_bytes, max(stripes.block_bytes, 1))
        self._buffers = [[np.empty(self.chunk_bytes, np.uint8) for _ in range(stripes.num_data)] for _ in range(2)]
        self._lanes = ThreadPoolExecutor(stripes.num_data, thread_name_prefix="ckpt-pull")
        self._begun: tuple[Step, list[NDArray[np.uint8]], list[Future[int]]] | None = None
        self.pulled_nbytes, self.pull_s, self.code_s = 0, 0.0, 0.0

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lanes.shutdown(cancel_futures=True)

    def add(self, step: Step) -> None:
        """Begin to pull what `step` needs, and code what was begun before."""
        self._buffers.reverse()
        begun = self._begin(step, self._buffers[0])
        self.finish()
        self._begun = begun

    def finish(self) -> None:
        """Code what was begun last."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        step, filled, waiting = begun
        before = time.perf_counter()
        for future in waiting:
            future.result()
        between = time.perf_counter()
        target = self._memory[step.target.start : step.target.stop]
        rows = self._code.rows(have=step.have, wanted=[step.target.piece])
        code_blocks(filled, [target], rows, tile_bytes=self._options.code_tile_bytes)
        self.pulled_nbytes += sum(len(buffer) for buffer in filled)
        self.pull_s += between - before
        self.code_s += time.perf_counter() - between

    def _begin(
        self, step: Step, into: list[NDArray[np.uint8]]
    ) -> tuple[Step, list[NDArray[np.uint8]], list[Future[int]]]:
        filled = [buffer[: source.nbytes] for source, buffer in zip(step.sources, into, strict=True)]
        waiting = [
            self._lanes.submit(self._pull, source, buffer)
            for source, buffer in zip(step.sources, filled, strict=True)
            if source.nbytes
        ]
        return step, filled, waiting

    def _pull(self, source: Block, into: NDArray[np.uint8]) -> int:
        card = self._cards[source.member]
        key = key_of(
            self._stripes, source, run_id=self._run_id, step=card.step, attempt=card.attempt, members=card.members
        )
        left_s = max(self._ends_at - time.monotonic(), 0.001)
        return self._peers[card.rank].pull(key, source.start, source.stop, into=into.data, deadline_s=left_s)


def _chunks(stripes: Stripes, member: int, chunk_bytes: int) -> Iterator[Step]:
    for step in encode_plan(stripes, member).steps:
        yield from step.chunks(chunk_bytes)
