"""Where coded chunks wait until all sizes are known: a file without a name, which is gone with the process.

In: chunks. Out: where they are, and their bytes again. One thread writes; any thread reads.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckpt.config import DELTA_SPOOL_READ_BYTES
from ckpt.delta.record import Payload
from ckpt.errors import StoreError


@dataclass(kw_only=True)
class Spooled:
    """The chunks of one tensor."""

    tensor: str
    starts: list[int] = field(default_factory=list)  # bytes of the file
    sizes: list[int] = field(default_factory=list)

    @property
    def payload(self) -> Payload:
        return Payload(tensor=self.tensor, sizes=np.array(self.sizes, np.int64))

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


class Spool:
    """The file. It lies where `tempfile` puts its own (TMPDIR says where)."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ckpt-delta-")
        self._at = 0

    def put(self, into: Spooled, chunk: bytes) -> None:
        """The next chunk of a tensor."""
        with self._told():
            self._file.write(chunk)
        into.starts.append(self._at)
        into.sizes.append(len(chunk))
        self._at += len(chunk)

    def flush(self) -> None:
        """What was put can be read now."""
        with self._told():
            self._file.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the temporary file for what is coded cannot be written after {self._at:,} bytes: {error.strerror}",
                kind="io",
                hints=(f"it lies in {tempfile.gettempdir()}; set TMPDIR to a folder with more room",),
            ) from error

    def chunk(self, of: Spooled, number: int) -> bytes:
        """One chunk."""
        return self._read(of.starts[number], of.sizes[number])

    def stream(self, of: Spooled) -> Iterator[NDArray[np.uint8]]:
        """All bytes of a tensor, in order."""
        for start, size in zip(of.starts, of.sizes, strict=True):
            for first in range(0, size, DELTA_SPOOL_READ_BYTES):
                count = min(DELTA_SPOOL_READ_BYTES, size - first)
                yield np.frombuffer(self._read(start + first, count), np.uint8)

    def _read(self, start: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, start)
        assert len(data) == size, "the temporary file is cut off"
        return data

    def close(self) -> None:
        """Let go of it. May be called twice."""
        self._file.close()
