"""Write a whole checkpoint whose tensors come as streams of bytes, and publish it when all of it is durable.

In: the tensors of the result, their bytes in row-major order, objects. Out: a checkpoint, or nothing. One process; the images are
those that a merge of these tensors would have. Never holds more of a tensor than the stream yields at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckpt.commit.publish as publishing
from ckpt.commit import names
from ckpt.config import Options
from ckpt.engine.read import Progress
from ckpt.errors import CheckpointError
from ckpt.format.checksum import choose_block_bytes
from ckpt.format.receipt import Receipt
from ckpt.format.spec import TensorSpec
from ckpt.merge.images import ImagePlan, plan_images
from ckpt.merge.objects import ResultObject
from ckpt.merge.output import ImageOutput, ImageWriter
from ckpt.merge.publication import Saved, abandon, publish_images
from ckpt.store.base import Store

Bytes = NDArray[np.uint8]
Streams = Callable[[int], Iterator[Bytes]]  # number of a tensor -> its bytes, in row-major order


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is written."""

    step: int
    specs: Sequence[TensorSpec]  # sorted by name
    objects: Sequence[ResultObject] = ()
    saved: Saved = field(default_factory=Saved)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def write_result(
    into: Store,
    result: Result,
    streams: Streams,
    metadata: Callable[[], dict[str, Any]],
    *,
    options: Options,
    progress: Progress | None = None,
) -> str:
    """Write and publish; the attempt.

    Args:
        streams: called once per tensor with elements, one after the other in the order of the images.
        metadata: of the manifest; called when all streams have ended.

    Raises:
        AlreadyExistsError: the step is there. Nothing was written.
    """
    publishing.refuse_existing(into, result.step)
    attempt = names.new_attempt()
    try:
        receipts = _Writing(into, result, attempt, options, progress).run(streams)
        publish_images(into, receipts, result.saved, metadata=metadata(), options=options)
    except CheckpointError as error:
        if error.kind != "outcome-unknown":
            abandon(into, result.step, attempt, error)
        raise
    return attempt


class _Writing:
    """Used once, by one thread."""

    def __init__(self, into: Store, result: Result, attempt: str, options: Options, progress: Progress | None) -> None:
        self._into, self._result, self._attempt = into, result, attempt
        self._options, self._progress = options, progress
        self._images = plan_images(
            result.specs,
            ["element"] * len(result.specs),
            list(result.objects),
            block_bytes=choose_block_bytes(result.nbytes),
            image_bytes=options.merge_image_bytes,
        )
        self._stream: Iterator[Bytes] = iter(())
        self._of = -1  # the tensor that `_stream` is of
        self._rest = np.empty(0, np.uint8)  # of what the stream yielded last

    def run(self, streams: Streams) -> list[Receipt]:
        """The receipts of all images, durable."""
        writer = ImageWriter(self._into, self._options)
        ending: list[Future[Receipt]] = []
        try:
            for image in self._images:
                ending.append(self._write(writer, image, streams))
            self._expect_end()
            return [one.result() for one in ending]
        finally:
            wait(ending)
            writer.close()

    def _write(self, writer: ImageWriter, image: ImagePlan, streams: Streams) -> Future[Receipt]:
        folder, num = names.attempt_folder(self._result.step, self._attempt), len(self._images)
        file = names.image_name(image.number, num)
        output = writer.begin(f"{folder}/{file}", image)
        try:
            for at, rows in itertools.groupby(image.rows, key=lambda row: row[0]):
                nbytes = sum(box.volume for _, box in rows) * image.specs[at].itemsize
                self._copy(image.tensors[at], nbytes, output, streams)
        except BaseException:
            output.abort()
            raise
        step, attempt = self._result.step, self._attempt
        return output.finish(lambda: output.receipt(step=step, attempt=attempt, num_images=num, file=file))

    def _copy(self, tensor: int, nbytes: int, output: ImageOutput, streams: Streams) -> None:
        """The next bytes of a tensor."""
        if tensor != self._of:
            self._expect_end()
            self._stream, self._of = streams(tensor), tensor
        while nbytes:
            if not len(self._rest):
                self._rest = next(self._stream)
            part, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            output.append(part)
            nbytes -= len(part)
            if self._progress is not None:
                self._progress(len(part))

    def _expect_end(self) -> None:
        """Streams check themselves when they end: they must be asked."""
        assert not len(self._rest) and next(self._stream, None) is None, "a stream is longer than its tensor"
