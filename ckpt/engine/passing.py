"""Memory through which ranks pass bytes to each other: shared between processes of one host, sent over the process group else.

In: bytes that a rank put into its slot for each other rank. Out: the addresses where the bytes for this rank lie. Shared memory
has no name: peers open it through /proc, so that nothing can be left behind, and know it by a token. All ranks make one together.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.world import World
from ckpt.layout.box import Int64Array

_PAGE = mmap.PAGESIZE
_TOKEN_BYTES = 32
_SLOTS = 2  # one is filled while the other is read
_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4) | getattr(fcntl, "F_SEAL_SEAL", 1)


class Passing:
    """Two slots of every rank, used in turn. One owner, one thread; `close` may be called twice.

    A slot is filled for round r, `swap(r)` is called by all ranks, and what it says may be read until the next but one round is
    swapped: a rank fills a slot again only after a swap that all ranks reached when they were done with it.
    """

    def __init__(self, world: World, slot_bytes: int, *, shared: bool = True) -> None:
        self._world = world
        self._slot_bytes = -(-slot_bytes // _PAGE) * _PAGE
        self._head_bytes = -(-8 * (world.size + 1) // _PAGE) * _PAGE  # where each rank's part of a slot begins
        self._span = self._head_bytes + self._slot_bytes
        self._received = np.empty(0, np.uint8)
        self._fd = -1
        memory = self._make_shared() if shared else None
        self._mine = np.empty(_SLOTS * self._span, np.uint8) if memory is None else memory[_PAGE:]
        self._peers = self._open_peers(memory)  # per rank its shared slots, None for those reached over the group

    @property
    def is_shared(self) -> bool:
        """Whether all ranks pass bytes through shared memory."""
        return all(peer is not None for rank, peer in enumerate(self._peers) if rank != self._world.rank)

    def order(self) -> Int64Array:
        """[W] place of each rank's part in a slot: those that go over the group first."""
        over_group = [peer is None and rank != self._world.rank for rank, peer in enumerate(self._peers)]
        out = np.empty(self._world.size, np.int64)
        out[np.argsort(~np.array(over_group), kind="stable")] = np.arange(self._world.size)
        return out

    def slot(self, number: int) -> NDArray[np.uint8]:
        """The memory to fill for round `number`."""
        start = number % _SLOTS * self._span + self._head_bytes
        return self._mine[start : start + self._slot_bytes]

    def announce(self, number: int, starts: Int64Array) -> None:
        """Say where in the slot each rank's part begins, by rank. Before the ranks agree that the round is read."""
        at = number % _SLOTS * self._span
        self._mine[at : at + 8 * len(starts)].view(np.int64)[:] = starts

    def swap(self, number: int, sizes: Sequence[int], incoming: Sequence[int]) -> Int64Array:
        """[W] address of the bytes that each rank has for this one. All ranks call once everything is announced and agreed on.

        Args:
            sizes: bytes in this rank's slot for each rank. incoming: bytes that each rank has for this one.
        """
        out = np.zeros(self._world.size, np.int64)
        for rank, peer in enumerate(self._peers):
            if peer is not None:
                at = number % _SLOTS * self._span
                start = int(peer[at : at + 8 * self._world.size].view(np.int64)[self._world.rank])
                assert 0 <= start <= start + incoming[rank] <= self._slot_bytes, "a peer filled its slot otherwise"
                out[rank] = peer.ctypes.data + at + self._head_bytes + start
        if self._group_needed:
            out += self._swap_over_group(number, sizes, incoming)
        return out

    def _swap_over_group(self, number: int, sizes: Sequence[int], incoming: Sequence[int]) -> Int64Array:
        remote = [peer is None and rank != self._world.rank for rank, peer in enumerate(self._peers)]
        give = [n if r else 0 for n, r in zip(sizes, remote, strict=True)]
        get = [n if r else 0 for n, r in zip(incoming, remote, strict=True)]
        if len(self._received) < sum(get):
            self._received = np.empty(sum(get), np.uint8)
        self._world.all_to_all(self.slot(number)[: sum(give)], give, self._received[: sum(get)], get)
        begin = np.cumsum(get) - np.array(get, np.int64) + self._received.ctypes.data
        return np.where(remote, begin, 0)

    def close(self) -> None:
        """Let go of the memory; it is freed when no rank looks at it any more."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._peers = [None] * self._world.size
        self._mine = np.empty(0, np.uint8)

    def _make_shared(self) -> NDArray[np.uint8] | None:
        """A page with the token, then the slots. None where the system gives no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        nbytes = _PAGE + _SLOTS * self._span
        try:
            self._fd = os.memfd_create("ckpt-passing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, nbytes)
            fcntl.fcntl(
                self._fd, getattr(fcntl, "F_ADD_SEALS", 1033), _SEALS
            )  # a peer that maps it can rely on its size
            memory = np.frombuffer(mmap.mmap(self._fd, nbytes), np.uint8)
        except OSError:
            return None
        memory[:_TOKEN_BYTES] = np.frombuffer(secrets.token_bytes(_TOKEN_BYTES), np.uint8)
        return memory

    def _open_peers(self, memory: NDArray[np.uint8] | None) -> list[NDArray[np.uint8] | None]:
        world = self._world
        place = np.array([os.getpid(), self._fd, self._span, *host_id()], np.int64).view(np.uint8)
        token = np.zeros(_TOKEN_BYTES, np.uint8) if memory is None else memory[:_TOKEN_BYTES].copy()
        answers = world.all_gather(np.concatenate([place, token]))
        own = answers[world.rank]
        found = [
            None if rank == world.rank or memory is None else self._open(answer.copy(), own)
            for rank, answer in enumerate(answers)
        ]
        reached = world.all_gather(np.array([peer is not None for peer in found], np.uint8))
        # Both ways or not at all, so that both sides know which way bytes take.
        kept = [peer if reached[rank][world.rank] else None for rank, peer in enumerate(found)]
        self._group_needed = any(not reached[a][b] for a in range(world.size) for b in range(world.size) if a != b)
        return kept

    def _open(self, answer: NDArray[np.uint8], own: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The slots of a peer on this host."""
        pid, fd, span, *host = answer[:-_TOKEN_BYTES].view(np.int64).tolist()
        if fd < 0 or host != own[:-_TOKEN_BYTES].copy().view(np.int64).tolist()[3:] or span != self._span:
            return None
        with contextlib.suppress(OSError, ValueError):
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                nbytes = _PAGE + _SLOTS * span
                status = os.fstat(opened)
                if stat.S_ISREG(status.st_mode) and status.st_size == nbytes:
                    memory = np.frombuffer(mmap.mmap(opened, nbytes, prot=mmap.PROT_READ), np.uint8)
                    if (memory[:_TOKEN_BYTES] == answer[-_TOKEN_BYTES:]).all():
                        return memory[_PAGE:]
            finally:
                os.close(opened)
        return None


def host_id() -> tuple[int, int]:
    """What two processes share that see each other's /proc: the boot of the machine and the namespace of process ids."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = int(file.read().strip().replace("-", ""), 16) >> 65
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except (OSError, ValueError):
        return 0, os.getpid()  # no other process is like this one
