"""Make the parity that one member holds, out of the blobs of its group.

In: a card, the group's peers, memory for the parity. Out: parity in that memory and the cards that it is of. Pulls; nobody
pushes. A peer that has not sealed the step yet is asked again until the deadline. Never looks at bytes that were not verified on
arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ckpt.agent.decode import key_of
from ckpt.agent.inventory import Card, Parity
from ckpt.agent.stripes import Step, Stripes, encode_plan
from ckpt.agent.transport.client import Peer
from ckpt.config import Options
from ckpt.errors import PeerError
from ckpt.kernels.erasure import Code, code_blocks, code_for

_ASK_S = (0.005, 0.2)  # between two questions to a peer that is not as far yet: at first, and at most


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was done."""

    parity: Parity
    pulled_nbytes: int
    wait_s: float  # for peers to seal the step
    pull_s: float
    code_s: float


def nbytes_needed(blob_bytes: int, *, num_members: int, parity: int) -> int:
    """Room for the parity of a group whose largest blob has so many bytes."""
    return Stripes(image_nbytes=(blob_bytes,) * num_members, num_parity=parity).parity_nbytes


def cards_of_group(card: Card, peers: Mapping[int, Peer], *, ends_at: float) -> tuple[Card, ...]:
    """The cards of all members for the step of `card`. PeerError when one has none by `ends_at` (of `time.monotonic`)."""
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
        if len(found) == len(card.members):
            return tuple(found[rank] for rank in card.members)
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
    member, code = cards[0].members.index(rank), code_for(stripes.num_data, stripes.num_parity)
    chunk_bytes = min(options.peer_chunk_bytes, stripes.block_bytes)
    # Two sets of buffers: one is filled while the other is coded.
    buffers = [[np.empty(chunk_bytes, np.uint8) for _ in range(stripes.num_data)] for _ in range(2)]
    pulled, pull_s, code_s = 0, 0.0, 0.0
    start = time.monotonic()
    with ThreadPoolExecutor(stripes.num_data, thread_name_prefix="ckpt-pull") as lanes:

        def begin(step: Step, into: list[np.ndarray]) -> tuple[Step, list[np.ndarray], list[object]]:
            filled, waiting = [], []
            for source, buffer in zip(step.sources, into, strict=True):
                filled.append(buffer[: source.nbytes])
                if source.nbytes:
                    card = cards[source.member]
                    key = key_of(
                        stripes, source, run_id=run_id, step=card.step, attempt=card.attempt, members=card.members
                    )
                    left_s = max(ends_at - time.monotonic(), 0.001)
                    target = memoryview(filled[-1])
                    pull = peers[card.rank].pull
                    waiting.append(lanes.submit(pull, key, source.start, source.stop, into=target, deadline_s=left_s))
            return step, filled, waiting

        def finish(begun: tuple[Step, list[np.ndarray], list[object]]) -> None:
            nonlocal pulled, pull_s, code_s
            step, filled, waiting = begun
            before = time.perf_counter()
            for future in waiting:
                future.result()  # type: ignore[attr-defined]
            between = time.perf_counter()
            target = memory[step.target.start : step.target.stop]
            code_blocks(filled, [target], _rows(code, step), tile_bytes=options.code_tile_bytes)
            pulled += sum(len(buffer) for buffer in filled)
            pull_s, code_s = pull_s + between - before, code_s + time.perf_counter() - between

        begun = None
        for number, step in enumerate(_chunks(stripes, member, chunk_bytes)):
            if stopped():
                raise PeerError("the agent ends", kind="peer-stopped")
            following = begin(step, buffers[number % 2])
            if begun is not None:
                finish(begun)
            begun = following
        if begun is not None:
            finish(begun)
    parity = Parity(rank=rank, cards=cards, block_bytes=stripes.block_bytes)
    return Made(parity=parity, pulled_nbytes=pulled, wait_s=time.monotonic() - start, pull_s=pull_s, code_s=code_s)


def _rows(code: Code, step: Step) -> np.ndarray:
    return code.rows(have=step.have, wanted=[step.target.piece])


def _chunks(stripes: Stripes, member: int, chunk_bytes: int):  # type: ignore[no-untyped-def]
    for step in encode_plan(stripes, member).steps:
        yield from step.chunks(chunk_bytes)
