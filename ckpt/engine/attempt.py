"""One save on its way: what was asked, what lies where, and what came of it. Records; they do nothing.

In: a request and a plan of this rank. Out: what the steps of a save (engine/save.py, engine/outcome.py) hand to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.commit.complete import Request
from ckpt.engine.incremental import Thinned
from ckpt.events import Timeline
from ckpt.format import receipt
from ckpt.snapshot.pack import Packer, PackProgram
from ckpt.snapshot.staging import Staging


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one rank's save did."""

    step: int
    attempt: str
    nbytes: int  # of this rank's image, as written
    seconds: dict[str, float]  # by phase (ckpt/events.py)
    direct: bool = False  # whether the image was written around the page cache
    structure_changed: bool = False  # on some rank, since the ranks planned together
    tier: str = "store"  # or memory: of the agents alone


@dataclass(kw_only=True)
class Attempt:
    """One save on its way. Owned by one thread at a time: staged by the trainer, then handed to whoever finishes it."""

    request: Request
    id: str
    packer: Packer
    program: PackProgram
    image_digest: str
    image: receipt.ImageTable
    objects: list[receipt.ObjectRow]
    block_bytes: int
    layout_digest: str
    describe: Callable[[], dict[str, Any] | None]
    changed: bool
    timeline: Timeline
    staging: Staging | None = None
    expected: NDArray[np.uint32] | None = None  # checksums of the state as it was in the call
    keep_alive: tuple[object, ...] = ()
    decided: bool = False  # this rank has begun to publish it
    abandoned: bool = False
    to_store: bool = True  # else only into the memory of agents
    kept: bool = False  # staged in memory of the rank's agent
    sealed: bool = False  # and handed over to it
    thinned: Thinned | None = None  # what an incremental save writes instead of the whole image

    @property
    def written(self) -> PackProgram:
        """The image as it is in the store."""
        return self.thinned.program if self.thinned is not None else self.program

    @property
    def structure(self) -> str:
        """Equal for attempts of equal image tables."""
        return self.image_digest + (f"-{self.thinned.key}" if self.thinned is not None else "")
