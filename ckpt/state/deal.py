"""The order of samples and how it is dealt to data-parallel ranks.

In: numbers of samples, seed, epoch, how much each rank took. Out: sample indices, stream positions, the rest. Pure:
no torch, no library's random generator, so no upgrade changes the order under a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.config import LEFT_SAMPLES_MAX
from ckpt.errors import InvalidInputError
from ckpt.layout.box import Int64Array


def epoch_order(num_samples: int, seed: int, epoch: int) -> Int64Array:
    """The order of one epoch: sample indices sorted by a 64-bit hash of their number. Read-only.

    The hash is SplitMix64 (Steele, Lea, Flood 2014) started at the first 8 bytes, little-endian, of SHA-256
    over "ckpt.order/1", seed and epoch, both numbers as 8 bytes little-endian. It is a bijection: no two
    samples tie.
    """
    digest = hashlib.sha256(b"ckpt.order/1" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")).digest()
    mixed = np.arange(1, num_samples + 1, dtype=np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.frombuffer(digest[:8], "<u8")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    order = np.argsort(mixed)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How the rest of the stream is dealt to `dp_size` ranks: item j of the rest goes to rank j mod dp_size. Pure.

    The stream is all epochs one behind the other: position p is place p mod N of epoch p div N. The rest is `left`,
    then every position from `next` on.
    """

    left: Int64Array  # positions below `next` that nobody took, ascending
    next: int  # position; all from here on are untaken
    dp_size: int

    def positions(self, dp_rank: int, start: int, stop: int) -> Int64Array:
        """Stream positions of the items `start <= i < stop` of one rank."""
        return self._at(np.arange(start, stop, dtype=np.int64) * self.dp_size + dp_rank)

    def count_below(self, position: int) -> int:
        """How many items of the rest lie below a stream position."""
        return int(np.searchsorted(self.left, position)) + max(0, position - self.next)

    def again(self, taken: Sequence[int], dp_size: int) -> Deal:
        """The rest after rank r took its first `taken[r]` items, dealt to `dp_size` ranks."""
        first, last = min(taken), max(taken)  # rounds: below `first` all is taken, from `last` on nothing
        if (last - first) * self.dp_size > LEFT_SAMPLES_MAX:
            raise InvalidInputError(
                f"the ranks are {last - first} samples apart; at most {LEFT_SAMPLES_MAX} in all are kept"
            )
        items = np.arange(first * self.dp_size, last * self.dp_size, dtype=np.int64)
        untaken = items[items // self.dp_size >= np.asarray(taken, np.int64)[items % self.dp_size]]
        num_dealt, num_left = last * self.dp_size, len(self.left)
        left = np.concatenate([self._at(untaken), self.left[num_dealt:]])
        return Deal(left=left, next=self.next + max(0, num_dealt - num_left), dp_size=dp_size)

    def _at(self, items: Int64Array) -> Int64Array:
        num_left = len(self.left)
        positions = items + (self.next - num_left)
        from_left = items < num_left
        positions[from_left] = self.left[items[from_left]]
        return positions
