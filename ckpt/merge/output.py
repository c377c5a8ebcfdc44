"""Write one image of the result, front to back, while later parts of it are made.

In: the bytes of its fragments, in order. Out: a durable object, and the receipt for the index. Whole chunks are summed and handed to
a thread that writes them; a fixed number of buffers, used again. Never shows a half-written image to a reader: nothing names it.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait

import numpy as np
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.config import Options
from ckpt.engine.worker import Worker
from ckpt.format.receipt import ImageTable, ObjectRow, Receipt
from ckpt.kernels import crc32c
from ckpt.merge.images import ImagePlan
from ckpt.snapshot.images import allocate
from ckpt.store.base import Store, Writer

_Buffers = list[NDArray[np.uint8]]


class ImageWriter:
    """Writes images, one after the other, with one thread and the same buffers. `close` may be called twice."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store, self._options = store, options
        self._worker = Worker("ckpt-merge-write", 0)
        self._buffers: _Buffers = []

    def begin(self, key: str, image: ImagePlan) -> ImageOutput:
        """Start an image. One at a time."""
        if not self._buffers:
            self._buffers = [allocate(self._options.chunk_bytes) for _ in range(self._options.write_buffers)]
        payloads = [one.payload() for one in image.objects]
        writer = self._store.open_writer(key, nbytes=image.layout.total_bytes)
        return ImageOutput(image, payloads, writer, self._worker, self._buffers, self._options)

    def close(self) -> None:
        """End the thread and let go of the buffers."""
        self._worker.close()
        self._buffers = []


class ImageOutput:
    """One image on its way. Used once, by one thread."""

    def __init__(
        self,
        image: ImagePlan,
        payloads: list[bytes],
        writer: Writer,
        worker: Worker,
        buffers: _Buffers,
        options: Options,
    ) -> None:
        self._image, self._writer, self._worker, self._options = image, writer, worker, options
        self._program = image.program(options)
        self._packer = image.packer(self._program, payloads, options)
        self._free = deque(buffers)
        self._pending: deque[Future[None]] = deque()
        self._chunk = 0
        self._at = len(image.layout.header)  # bytes of the image: where the next fragment begins
        self._filled = self._at  # so far; objects and the header are put in by the packer

    def append(self, data: NDArray[np.uint8]) -> None:
        """The next bytes of the fragments, in file order."""
        done = 0
        while done < len(data):
            start, stop = self._program.chunk_range(self._chunk)
            if self._at >= stop:
                self._flush()
                continue
            count = min(len(data) - done, stop - self._at)
            self._free[0][self._at - start : self._at - start + count] = data[done : done + count]
            self._at += count
            done += count

    def finish(self) -> None:
        """Make the image durable."""
        layout = self._image.layout
        ends = int(layout.offsets[-1] + layout.nbytes[-1]) if len(layout.offsets) else len(layout.header)
        assert self._at == ends, "fragments are missing from an image"
        while self._chunk < self._program.num_chunks:
            self._flush()
        while self._pending:
            self._pending.popleft().result()
        failpoints.hit("merge.before-image-commit")
        self._writer.commit()

    def abort(self) -> None:
        """Drop what was written. May be called after a failure of any kind."""
        wait(self._pending)
        self._writer.abort()

    def receipt(self, *, step: int, attempt: str, num_images: int, file: str) -> Receipt:
        """What the index needs to know of the image."""
        image, layout = self._image, self._image.layout
        return Receipt(
            rank=image.number,
            world=num_images,
            step=step,
            attempt=attempt,
            structure=str(image.number),
            file=file,
            file_bytes=layout.total_bytes,
            block_bytes=image.block_bytes,
            checksums=self._packer.checksums,
            objects=[_placed(one.row, image.number, at) for one, at in zip(image.objects, layout.object_offsets, strict=True)],
            image=ImageTable(
                specs=list(image.specs),
                rows=layout.rows,
                offsets=layout.offsets,
                nbytes=layout.nbytes,
                header_bytes=len(layout.header),
                header_crc32c=crc32c(layout.header),
            ),
        )

    def _flush(self) -> None:
        """Sum the chunk in the front buffer and let it be written."""
        low, high = self._program.chunk_range(self._chunk)
        buffer = self._free[0][: high - low]
        self._packer.put_raw(self._chunk, buffer)
        self._packer.checksum(self._chunk, buffer)
        self._free.rotate(-1)
        self._pending.append(self._worker.submit(lambda: self._writer.write(buffer.data)))
        self._chunk += 1
        if len(self._pending) == len(self._free):  # the buffer that comes next is still being written
            self._pending.popleft().result()
        failpoints.hit("merge.in-image")


def _placed(row: ObjectRow, writer: int, byte_offset: int) -> ObjectRow:
    return ObjectRow(**{**vars(row), "writer": writer, "byte_offset": byte_offset})
