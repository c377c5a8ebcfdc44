"""A chunk packed and summed in one pass has the bytes and checksums of one that is filled first and summed then.

Method: pieces of odd sizes, strided ones among them, laid out over chunks that cut rows, blocks and objects.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.format.checksum import block_ranges
from ckpt.format.image import lay_out
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.kernels import crc32c
from ckpt.layout.box import BoxTable
from ckpt.snapshot.pack import Packer, bind, make_program

ARRAYS = [
    np.random.default_rng(0).standard_normal((300, 70)).astype(np.float32),
    np.random.default_rng(1).standard_normal((90, 110)).astype(np.float32).T,
    np.random.default_rng(2).standard_normal((1, 40_001)).astype(np.float32),
    np.random.default_rng(3).standard_normal((3, 1)).astype(np.float32),
]


def pieces_of(arrays: list[NDArray[np.float32]]) -> tuple[list[TensorSpec], PieceTable]:
    lengths = np.array([array.shape for array in arrays], np.int64)
    boxes = BoxTable(tensor=np.arange(len(arrays)), offsets=np.zeros_like(lengths), lengths=lengths)
    table = PieceTable(
        boxes=boxes,
        address=np.array([array.ctypes.data for array in arrays], np.uint64),
        limit=np.array([np.lib.array_utils.byte_bounds(array)[1] for array in arrays], np.uint64),
        strides=np.array([array.strides for array in arrays], np.int64),
    )
    return [TensorSpec(name=f"t{i}", dtype="float32", shape=a.shape, role="param") for i, a in enumerate(arrays)], table


@pytest.mark.parametrize("chunk_bytes", [4096, 20480, 1 << 20])
@pytest.mark.parametrize("block_bytes", [4096, 8192, 1 << 16])
def test_one_pass_gives_the_same_image_and_checksums(chunk_bytes: int, block_bytes: int) -> None:
    specs, pieces = pieces_of(ARRAYS)
    payloads = [bytes(range(64)) * 100]
    layout = lay_out(specs, pieces.boxes, [("object", len(payloads[0]))])
    program = make_program(
        layout, specs, pieces.boxes, np.asarray(layout.source), chunk_bytes=chunk_bytes, block_bytes=block_bytes
    )
    images = []
    for one_pass in (True, False):
        packer = Packer(bind(program, pieces), payloads, threads=2)
        image = np.zeros(layout.total_bytes, np.uint8)
        for chunk in range(program.num_chunks):
            low, high = program.chunk_range(chunk)
            if one_pass:
                packer.pack(chunk, image[low:high])
            else:
                packer.fill(chunk, image[low:high])
                packer.checksum(chunk, image[low:high])
        images.append((image.tobytes(), packer.checksums.tolist()))
    starts, stops = block_ranges(layout.offsets, layout.nbytes, block_bytes)
    data = images[0][0]
    assert images[0] == images[1]
    assert images[0][1] == [crc32c(data[a:b]) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    assert data[layout.offsets[0] :][: ARRAYS[layout.source[0]].nbytes] == ARRAYS[layout.source[0]].tobytes()


@pytest.mark.parametrize("chunk_bytes", [4096, 20480, 50_000, 1 << 20])
@pytest.mark.parametrize(("cut_bytes", "step_bytes"), [(4096, 4096), (4096, 1 << 16), (1 << 16, 1 << 17)])
def test_checksums_between_multiples_are_those_of_the_image(chunk_bytes: int, cut_bytes: int, step_bytes: int) -> None:
    """Headers and objects are in them, and nothing is read again."""
    specs, pieces = pieces_of(ARRAYS)
    payloads = [bytes(range(64)) * 100, b"short"]
    layout = lay_out(specs, pieces.boxes, [("object", len(payloads[0])), ("other", len(payloads[1]))])
    program = make_program(
        layout,
        specs,
        pieces.boxes,
        np.asarray(layout.source),
        chunk_bytes=chunk_bytes,
        block_bytes=8192,
        cut_bytes=cut_bytes,
    )
    packer = Packer(bind(program, pieces), payloads, threads=2)
    image = np.random.default_rng(5).integers(0, 256, layout.total_bytes, np.uint8)  # what an earlier step left
    for chunk in range(program.num_chunks):
        low, high = program.chunk_range(chunk)
        packer.fill(chunk, image[low:high])
        packer.checksum(chunk, image[low:high])
    data = image.tobytes()
    starts, stops = block_ranges(layout.offsets, layout.nbytes, 8192)
    assert packer.checksums.tolist() == [
        crc32c(data[a:b]) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    expected = [crc32c(data[low : low + step_bytes]) for low in range(0, len(data), step_bytes)]
    assert packer.checksums_between(step_bytes).tolist() == expected


def test_there_are_no_checksums_between_multiples_that_nothing_was_cut_at() -> None:
    specs, pieces = pieces_of(ARRAYS)
    layout = lay_out(specs, pieces.boxes, [])
    for cut_bytes, step_bytes in ((0, 4096), (8192, 4096)):
        program = make_program(
            layout,
            specs,
            pieces.boxes,
            np.asarray(layout.source),
            chunk_bytes=4096,
            block_bytes=8192,
            cut_bytes=cut_bytes,
        )
        with pytest.raises(InvalidInputError, match="is cut at"):
            Packer(bind(program, pieces), [], threads=1).checksums_between(step_bytes)
