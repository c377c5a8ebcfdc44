"""Write the images of the result, front to back, while later parts of them are made.

In: the bytes of the fragments of an image, in order. Out: a durable object, and the receipt for the index. Whole chunks are
summed and handed to a thread that writes them, out of a fixed number of buffers; the same thread makes an image durable while
the next one is filled. Never shows a half-written image to a reader: nothing names it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from numpy import uint8
from numpy.typing import NDArray

from ckpt import failpoints
from ckpt.config import Options
from ckpt.engine.worker import Worker
from ckpt.format.receipt import ImageTable, ObjectRow, Receipt
from ckpt.kernels import crc32c
from ckpt.merge.images import ImagePlan
from ckpt.snapshot.images import allocate
from ckpt.store.base import Store

_T = TypeVar("_T")


class _Ring:
    """Buffers that are filled and written in turn. One owner thread."""

    def __init__(self, options: Options) -> None:
        self._buffers = [allocate(options.chunk_bytes) for _ in range(options.write_buffers)]
        self._writes: list[Future[None] | None] = [None] * len(self._buffers)
        self._at = 0

    def current(self) -> NDArray[uint8]:
        """The buffer to fill: what was in it before is written."""
        write, self._writes[self._at] = self._writes[self._at], None
        if write is not None:
            write.result()
        return self._buffers[self._at]

    def written_by(self, write: Future[None]) -> None:
        """The current buffer is on its way; the next one comes up."""
        self._writes[self._at] = write
        self._at = (self._at + 1) % len(self._buffers)


class ImageWriter:
    """Writes images, one after the other, with one thread and the same buffers. `close` may be called twice."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store, self._options = store, options
        self._worker = Worker("ckpt-merge-write", 0)
        self._ring: _Ring | None = None

    def begin(self, key: str, image: ImagePlan) -> ImageOutput:
        """Start an image. The one before may still be on its way to be durable."""
        if self._ring is None:
            self._ring = _Ring(self._options)
        return ImageOutput(image, self._store, key, self._worker, self._ring, self._options)

    def close(self) -> None:
        """End the thread and let go of the buffers."""
        self._worker.close()
        self._ring = None


class ImageOutput:
    """One image on its way. Used once, by one thread."""

    def __init__(self, image: ImagePlan, store: Store, key: str, worker: Worker, ring: _Ring, options: Options) -> None:
        self.image, self._worker, self._ring = image, worker, ring
        self._program = image.program(options)
        self._packer = image.packer(self._program, [one.payload() for one in image.objects], options)
        self._writer = store.open_writer(key, nbytes=image.layout.total_bytes)
        self._writes: list[Future[None]] = []
        self._at = len(image.layout.header)  # bytes of the image: where the next fragment begins

    def append(self, data: NDArray[uint8]) -> None:
        """The next bytes of the fragments, in file order."""
        done = 0
        while done < len(data):
            start, stop = self._program.chunk_range(len(self._writes))
            if self._at >= stop:
                self._flush()
                continue
            count = min(len(data) - done, stop - self._at)
            self._ring.current()[self._at - start : self._at - start + count] = data[done : done + count]
            self._at += count
            done += count

    def finish(self, then: Callable[[], _T]) -> Future[_T]:
        """Let the image become durable, and `then` be called, both on the thread that writes."""
        layout = self.image.layout
        ends = int(layout.offsets[-1] + layout.nbytes[-1]) if len(layout.offsets) else len(layout.header)
        assert self._at == ends, "fragments are missing from an image"
        while len(self._writes) < self._program.num_chunks:
            self._flush()

        def end() -> _T:
            try:
                for write in self._writes:
                    write.result()  # over by now: one thread does them in order
                failpoints.hit("merge.before-image-commit")
                self._writer.commit()
                return then()
            except BaseException:
                self._writer.abort()
                raise

        return self._worker.submit(end)

    def abort(self) -> None:
        """Drop what was written. May be called after a failure of any kind."""
        wait(self._writes)
        self._writer.abort()

    def receipt(self, *, step: int, attempt: str, num_images: int, file: str) -> Receipt:
        """What the index needs to know of the image, when all of it is summed."""
        image, layout = self.image, self.image.layout
        places = zip(image.objects, layout.object_offsets, strict=True)
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
            objects=[_placed(one.row, image.number, at) for one, at in places],
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
        """Sum the chunk in the current buffer and let it be written."""
        chunk = len(self._writes)
        low, high = self._program.chunk_range(chunk)
        buffer = self._ring.current()[: high - low]
        self._packer.put_raw(chunk, buffer)
        self._packer.checksum(chunk, buffer)
        self._writes.append(self._worker.submit(lambda: self._writer.write(buffer.data)))
        self._ring.written_by(self._writes[-1])
        failpoints.hit("merge.in-image")


def _placed(row: ObjectRow, writer: int, byte_offset: int) -> ObjectRow:
    return ObjectRow(**{**vars(row), "writer": writer, "byte_offset": byte_offset})
