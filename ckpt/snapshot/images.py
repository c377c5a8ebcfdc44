"""The host memory that images are staged in: a fixed number of buffers, used again and again.

In: sizes. Out: page-aligned buffers, registered with CUDA where the state lies on one (so that copies need no hidden buffer of
the driver's). Never more than `images_max` at a time: who asks for one more waits for it elsewhere. One owner; any thread.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import numpy as np
from numpy.typing import NDArray

from ckpt.snapshot import pinned as pins


def allocate(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory, every page touched once (a first touch costs ten times a reuse)."""
    buffer = _reserve(nbytes)
    buffer[:: mmap.PAGESIZE] = 0
    return buffer


def _reserve(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory; the system gives each page when it is first touched, by whichever thread that is."""
    pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(
        OSError, AttributeError
    ):  # huge pages: fewer faults and TLB misses, where the system has them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class Images:
    """The buffers of one run."""

    def __init__(self, images_max: int) -> None:
        self._images_max = images_max
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []
        self._num_out = 0

    def take(self, nbytes: int, *, pinned: bool, touched: bool = False) -> NDArray[np.uint8]:
        """A buffer of at least `nbytes`. A free one that is too small, or not pinned as wanted, makes way for a new one.

        Args:
            touched: touch every page now rather than while it is filled.
        """
        with self._lock:
            assert self._num_out < self._images_max, "more images at a time than the budget has"
            self._num_out += 1
            found = self._free.pop() if self._free else None
        try:
            return self._fit(found, nbytes, pinned=pinned, touched=touched)
        except BaseException:
            with self._lock:
                self._num_out -= 1
            raise

    def _fit(self, found: NDArray[np.uint8] | None, nbytes: int, *, pinned: bool, touched: bool) -> NDArray[np.uint8]:
        if found is not None and len(found) >= nbytes and (not pinned or pins.is_registered(found)):
            return found
        if found is not None:
            pins.unregister(found)
            del found  # before the next one is made: the budget holds at every moment
        image = allocate(nbytes) if touched else _reserve(nbytes)
        if pinned:
            pins.register(image, owner=image)
        return image

    def give_back(self, image: NDArray[np.uint8]) -> None:
        """The buffer is no longer used by anyone."""
        with self._lock:
            self._num_out -= 1
            self._free.append(image)

    def close(self) -> None:
        """Let go of all free buffers. May be called twice."""
        with self._lock:
            free, self._free = self._free, []
        for image in free:
            pins.unregister(image)
