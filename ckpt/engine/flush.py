"""Write one image to a store, chunk by chunk, within a rate and with a few chunks on their way at a time.

In: a staging that is being filled, or a packer that fills buffers here. Out: a durable object, or none. One write at a time;
`stop` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

import numpy as np
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.config import Options
from ckpt.engine.worker import Worker
from ckpt.errors import CheckpointError
from ckpt.snapshot.images import allocate
from ckpt.snapshot.pack import Packer, PackProgram
from ckpt.snapshot.staging import Staging
from ckpt.store.base import Store, Writer
from ckpt.store.rate import TokenBucket


class Flusher:
    """Writes the images of one rank. Keeps its thread and its buffers between steps; `close` may be called twice."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store, self._options = store, options
        self._worker = Worker("ckpt-write", options.flush_nice)
        self._buffers: list[NDArray[np.uint8]] = []
        self._stopped: CheckpointError | None = None
        self._rate = TokenBucket(
            bytes_per_s=options.write_bytes_per_s_max, burst_bytes=options.chunk_bytes, now_s=time.monotonic()
        )

    def prepare(self, num_chunks: int) -> None:
        """Start the thread that writes, and take the buffers for an image of so many chunks that is written without a staging."""
        self._worker.start()
        while len(self._buffers) < min(self._options.write_buffers, num_chunks):
            self._buffers.append(allocate(self._options.chunk_bytes))

    def write(self, key: str, program: PackProgram, packer: Packer, staging: Staging | None) -> bool:
        """Write the image as `key`: out of `staging`, or through a few buffers without one.

        Returns whether the page cache was left out. Whatever fails, no object is left that could pass for a whole one.
        """
        writer = self._store.open_writer(key, nbytes=program.layout.total_bytes)
        try:
            if staging is not None:
                self._write_staged(program, staging, writer)
            else:
                self._write_through_buffers(program, packer, writer)
            failpoints.hit("save.before-image-commit")
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        return bool(getattr(writer, "direct", False))

    def stop(self, error: CheckpointError) -> None:
        """Let the write that is on its way, and all later ones, fail with `error` at the next chunk. Any thread."""
        self._stopped = error

    def close(self) -> None:
        self._worker.close()
        self._buffers = []

    def _write_staged(self, program: PackProgram, staging: Staging, writer: Writer) -> None:
        pending: deque[Future[None]] = deque()
        with _at_rest(pending):
            for chunk in range(program.num_chunks):
                data = staging.wait_for(chunk)
                if len(pending) >= self._options.write_buffers:
                    pending.popleft().result()
                # The image stays as it is until the attempt is over: a store that can send it without a copy may do so.
                pending.append(self._submit(getattr(writer, "write_lasting", writer.write), data))
                failpoints.hit("save.in-image")

    def _write_through_buffers(self, program: PackProgram, packer: Packer, writer: Writer) -> None:
        """Fill one buffer while another is written: the host never holds more than `write_buffers` chunks."""
        self.prepare(program.num_chunks)
        free = deque(self._buffers)
        pending: deque[Future[None]] = deque()
        with _at_rest(pending):
            for chunk in range(program.num_chunks):
                if len(pending) == len(self._buffers):
                    pending.popleft().result()
                low, high = program.chunk_range(chunk)
                buffer = free[0][: high - low]
                free.rotate(-1)  # writes end in the order in which they began
                packer.pack(chunk, buffer)
                pending.append(self._submit(writer.write, buffer))
                failpoints.hit("save.in-image")

    def _submit(self, write: Callable[[memoryview], None], data: NDArray[np.uint8]) -> Future[None]:
        if self._stopped is not None:
            raise self._stopped
        time.sleep(self._rate.take(len(data), now_s=time.monotonic()))
        return self._worker.submit(lambda: write(data.data))


@contextlib.contextmanager
def _at_rest(pending: deque[Future[None]]) -> Iterator[None]:
    """Leave the block only when no write is on its way, whatever happened in it; the first error is the one to raise."""
    try:
        yield
    finally:
        wait(pending)
    for future in pending:
        future.result()
