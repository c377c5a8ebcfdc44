"""What keeps images in memory that outlives this process: the agent of this rank, as saving sees it.

In: sizes, images with their receipts. Out: shared memory to stage images in, and what became of them. `agent/tier.py` has the
real one; a run without agents has none. Never waits without a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.commit.complete import Request
from ckpt.store.base import Store

Checksums = Callable[[int], NDArray[np.uint32]]


class Follower(Protocol):
    """What is done with checkpoints once they are complete, on rank 0, by whoever finishes saves: an average that is kept up."""

    def before_retention(self, store: Store) -> None:
        """Say what it still needs, before anything is forgotten."""

    def committed(self, step: int) -> None:
        """A checkpoint is complete. Returns at once."""

    def close(self, timeout_s: float = ...) -> None:
        """Finish, within the time. May be called twice."""


@dataclass(frozen=True, kw_only=True)
class OwnImage:
    """One rank's image of a snapshot, in memory that this process reads, and the receipt that its writer made of it."""

    store: Store  # that has it, as `store.local_memory(key)`
    key: str
    attempt: str
    receipt: bytes


class Keeper(Protocol):
    """One rank's keeper. `reserve` and `begin` on the training thread, all else on whoever finishes saves."""

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Room for two images of so many bytes and their receipts, touched. All ranks call, when they have planned together.

        Raises:
            BudgetError: there is no memory for that, on this rank; the others raise RankFailedError.
        """

    def begin(self, step: int, attempt: str, nbytes: int) -> NDArray[np.uint8] | None:
        """Shared memory to stage the image of a step in. None while none is free, as the newest protected image stays, and when
        the agent does not say so within `agent_begin_timeout_s`."""

    def seal(
        self,
        memory: NDArray[np.uint8],
        *,
        image_bytes: int,
        receipt: bytes,
        request: Request,
        changed: bool,
        checksums: Checksums,
    ) -> None:
        """The image is complete: protect it with the group. The memory is no longer this process's to write.

        Args:
            checksums: CRC-32C of each so many bytes of the image, as they were when its receipt was made: for multiples of
                `piece_bytes_of(image_bytes)`.
        """

    def flush(self, memory: NDArray[np.uint8]) -> None:
        """Store the sealed image as its part of a checkpoint; the agent does so also when this process is gone."""

    def take_back(self, memory: NDArray[np.uint8]) -> bool:
        """Whether the image is this process's alone again: the agent that it was handed to is dead, or ended here and now."""

    def stored(self, step: int, attempt: str, timeout_s: float) -> bool:
        """Wait until the checkpoint is published. Whether a structure changed. Raises what stopped it."""

    def protected(self, step: int, attempt: str, timeout_s: float) -> bool:
        """Wait until each group may lose members. Whether a structure changed. PeerError when that failed."""

    def release(self, memory: NDArray[np.uint8], *, sealed: bool) -> None:
        """This process is done with the memory; what was not sealed will not be completed."""

    def leave(self) -> None:
        """The process ends: `stored` and `protected` wait no longer (SaveFailedError `left`). Any thread."""

    def close(self, *, over: bool) -> None:
        """Let go of the agent; end it when the job is over. May be called twice."""
