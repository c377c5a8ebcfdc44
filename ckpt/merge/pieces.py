"""Read runs of elements of one source, one at a time.

In: an opened source, a tensor's id and a box whose elements are one run in row-major order. Out: their bytes, verified. For work
that goes over tensors in order and needs no plan for all of them (deltas, adapters); any thread may read.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.read import run_reads
from ckpt.errors import DamagedError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable
from ckpt.layout.box import Box, BoxTable
from ckpt.merge.sources import Reader
from ckpt.plan.read import contiguous_strides, uncovered

_TABLES_KEPT = 64  # tensors whose fragments are kept: those that are worked on


class PieceReader:
    """Reads pieces of the tensors of one reader.

    Args:
        label: what the source is called in messages.
    """

    def __init__(self, reader: Reader, label: str) -> None:
        self._reader, self._label = reader, label
        self._fragments = functools.lru_cache(_TABLES_KEPT)(self._look_up)

    def read(self, tensor: int, box: Box) -> NDArray[np.uint8]:
        """The bytes of the elements of `box`. DamagedError when some are stored nowhere, or their checksum is wrong."""
        spec = self._reader.specs[tensor]
        out = np.empty(box.volume * spec.itemsize, np.uint8)
        if not len(out):
            return out
        boxes = BoxTable.build([(tensor, box)])
        address = int(out.ctypes.data)
        pieces = PieceTable(
            boxes=boxes,
            address=np.array([address], np.uint64),
            limit=np.array([address + len(out)], np.uint64),
            strides=contiguous_strides(boxes.lengths, np.array([spec.itemsize], np.int64)),
        )
        table = self._fragments(tensor)
        plan = self._reader.plan(table, pieces)
        if len(uncovered(plan.copies, pieces)):
            raise DamagedError(f"{self._label} is damaged: elements of `{spec.name}` are in no fragment")
        run_reads(self._reader.job(table, pieces, plan))
        return out

    def whole(self, tensor: int) -> NDArray[np.uint8]:
        """All bytes of a tensor."""
        shape = self._reader.specs[tensor].shape
        return self.read(tensor, Box(offsets=(0,) * len(shape), lengths=shape))

    def _look_up(self, tensor: int) -> FragmentTable:
        return self._reader.fragments(np.array([tensor]))
