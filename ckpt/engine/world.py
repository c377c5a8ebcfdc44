"""The ranks of a job, as far as saving and loading need them: who am I, and exchanges of typed arrays.

In: bytes of each rank. Out: bytes of all. `World` is what engines ask for; torch_world.py makes one of a process group.
Imports no torch: the command line starts without it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import CheckpointError, RankFailedError


class World(Protocol):
    """The ranks that save or load together."""

    rank: int
    size: int

    def all_gather(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Every rank's bytes, in rank order. All ranks call; RankFailedError at the deadline."""

    def all_to_all(
        self, send: NDArray[np.uint8], sizes: list[int], receive: NDArray[np.uint8], incoming: list[int]
    ) -> None:
        """Send the next `sizes[r]` bytes of `send` to rank r and get `incoming[r]` bytes from it. All ranks call."""


class AloneWorld:
    """One process without a process group."""

    rank = 0
    size = 1

    def all_gather(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        return [data]

    def all_to_all(
        self, send: NDArray[np.uint8], sizes: list[int], receive: NDArray[np.uint8], incoming: list[int]
    ) -> None:
        receive[:] = send


def raise_together(world: World, error: CheckpointError | None, state: str) -> None:
    """Raise `error` here and RankFailedError on every other rank; nothing when no rank has an error. All ranks call.

    Args:
        state: what is known of the target, for the message.
    """
    gather_or_raise(world, b"", error, state)


def gather_or_raise(world: World, data: bytes, error: CheckpointError | None, state: str) -> list[bytes]:
    """The `data` of every rank; when some rank has an error instead, raise as `raise_together` does. One exchange."""
    text = b"\0" + data if error is None else b"\1" + error.message.encode()
    answers = [answer.tobytes() for answer in world.all_gather(np.frombuffer(text, np.uint8))]
    if error is not None:
        raise error
    failed = [f"rank {rank}: {answer[1:].decode()}" for rank, answer in enumerate(answers) if answer[:1] == b"\1"]
    if failed:
        raise RankFailedError(f"the load failed on other ranks, {state}; {'; '.join(failed)}")
    return [answer[1:] for answer in answers]
