"""A torch process group as a `World`.

In: a process group, or nothing. Out: `World`. Collectives run on a gloo group of ckpt's own, never on a group that training uses,
and only when a structure is seen for the first time, or at a load. Nothing is pickled. Every wait has a deadline.
"""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

from ckpt.engine.world import AloneWorld, World
from ckpt.errors import RankFailedError

_SHORT_BYTES = 4088  # of a message that goes with its size

# Per default group and set of ranks: how many worlds were made of it.
_num_made: WeakKeyDictionary[dist.ProcessGroup, Counter[tuple[int, ...]]] = WeakKeyDictionary()


class TorchWorld:
    """The ranks of a torch process group, over a gloo group of our own. Made by all ranks of `group` together."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._timeout_s = timeout_s
        self._group = self._own_group(dist.get_process_group_ranks(group))

    def _own_group(self, ranks: list[int]) -> Any:
        """A gloo group that only its members make, so that a sub-group can save by itself.

        Not `new_group(use_local_synchronization=True)`: it names the group by how many groups the calling process is
        in, so that members that are in different numbers of groups wait for each other under different names.
        """
        made = _num_made.setdefault(_get_default_group(), Counter())
        name = f"ckpt/{'_'.join(map(str, ranks))}/{made[tuple(ranks)]}"
        made[tuple(ranks)] += 1
        timeout = datetime.timedelta(seconds=self._timeout_s)
        try:
            store = dist.PrefixStore(name, _get_default_store())  # type: ignore[attr-defined]
            return dist.ProcessGroupGloo(store, self.rank, self.size, timeout)
        except RuntimeError as error:  # a member that never came, or that cannot be reached
            raise self._missing(error) from error

    def all_gather(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Sizes and what is short in one round of the group, what is longer in a second one: a round takes milliseconds."""
        head = torch.zeros(8 + _SHORT_BYTES, dtype=torch.uint8)
        head[:8] = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
        whole = torch.from_numpy(np.array(data))  # a copy: the caller's may be read-only
        head[8 : 8 + len(data)] = whole[:_SHORT_BYTES]
        heads = self._round(head)
        sizes = [int(one[:8].view(torch.int64)[0]) for one in heads]
        longest = max(sizes)
        if longest <= _SHORT_BYTES:
            return [one.numpy()[8 : 8 + size] for one, size in zip(heads, sizes, strict=True)]
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = whole
        return [one.numpy()[:size] for one, size in zip(self._round(padded), sizes, strict=True)]

    def _round(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """What every rank has of the same size."""
        out = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(self._group.allgather(out, mine))
        return out

    def all_to_all(
        self, send: NDArray[np.uint8], sizes: list[int], receive: NDArray[np.uint8], incoming: list[int]
    ) -> None:
        self._wait(self._group.alltoall_base(torch.from_numpy(receive), torch.from_numpy(send), incoming, sizes))

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:  # gloo says which peer it lost, or that its time is up
            raise self._missing(error) from error

    def _missing(self, error: RuntimeError) -> RankFailedError:
        return RankFailedError(
            f"rank {self.rank} of {self.size} waited for the other ranks for up to {self._timeout_s:.0f} s: {error}",
            kind="rank-missing",
            hints=("every rank must call save or load for the same step; look for the first error in the other ranks",),
        )


def current_world(group: dist.ProcessGroup | None, timeout_s: float) -> World:
    """The world of `group`, of the default group, or of this process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return AloneWorld()
    return TorchWorld(group, timeout_s)
