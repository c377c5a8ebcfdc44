"""How the result lies: which fragments there are, and in which image each is.

In: the tensors of the result. Out: one `ImagePlan` per image. Pure: follows from names, shapes and dtypes alone, so the result is
the same whatever its sources looked like and however many processes write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ckpt.config import MERGE_FRAGMENT_ELEMENTS, MERGE_IMAGES_MAX, Options
from ckpt.format.image import ImageLayout, lay_out, object_key
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.layout.box import Box, BoxTable
from ckpt.merge.method import Unit
from ckpt.merge.objects import ResultObject
from ckpt.merge.tiles import cut
from ckpt.snapshot.pack import Packer, PackProgram, bind, make_program


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """One image of the result."""

    number: int
    tensors: tuple[int, ...]  # which tensors of the result it has parts of, ascending
    specs: tuple[TensorSpec, ...]  # of these; of the first image also all tensors without elements
    rows: tuple[tuple[int, Box], ...]  # (place in `specs`, fragment), in file order
    objects: tuple[ResultObject, ...]
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Of the fragments."""
        return sum(box.volume * self.specs[at].itemsize for at, box in self.rows)

    @cached_property
    def layout(self) -> ImageLayout:
        table = BoxTable.build(self.rows)
        sizes = [(object_key(o.row.name, rank=o.row.rank, writer=self.number), o.row.nbytes) for o in self.objects]
        made = lay_out(self.specs, table, sizes)
        assert made.source.tolist() == list(range(len(self.rows))), "fragments are not in file order"
        return made

    def program(self, options: Options) -> PackProgram:
        """Chunks and blocks of the image."""
        rows = self.layout.rows
        return make_program(
            self.layout,
            self.specs,
            rows,
            self.layout.source,
            chunk_bytes=options.chunk_bytes,
            block_bytes=self.block_bytes,
        )

    def packer(self, program: PackProgram, payloads: Sequence[bytes], options: Options) -> Packer:
        """For the checksums of chunks and for what lies in them beside fragments: the fragments are put there by others."""
        boxes = program.layout.rows
        nowhere = np.zeros(len(boxes), np.uint64)
        pieces = PieceTable(boxes=boxes, address=nowhere, limit=nowhere, strides=np.zeros_like(boxes.offsets))
        return Packer(bind(program, pieces), payloads, threads=options.copy_threads)


def plan_images(
    specs: Sequence[TensorSpec],
    units: Sequence[Unit],
    objects: Sequence[ResultObject],
    *,
    block_bytes: int,
    image_bytes: int,
) -> list[ImagePlan]:
    """Deal out the fragments of all tensors, in file order, to images of about equal size; objects go into the first.

    Args:
        specs: sorted by name.
        units: what may not be cut, of each tensor.
        image_bytes: of one image, about.
    """
    total = sum(spec.nbytes for spec in specs)
    target = max(image_bytes, -(-total // MERGE_IMAGES_MAX))
    order = sorted(range(len(specs)), key=lambda i: (-specs[i].itemsize, i))
    groups: list[list[tuple[int, Box]]] = [[]]
    held = 0
    for i in order:
        for box in _fragments(specs[i], units[i]):
            nbytes = box.volume * specs[i].itemsize
            if held and held + nbytes > target:
                groups.append([])
                held = 0
            groups[-1].append((i, box))
            held += nbytes
    empty = [i for i, spec in enumerate(specs) if not spec.nbytes]
    return [
        _image(number, group, specs, empty if number == 0 else [], tuple(objects) if number == 0 else (), block_bytes)
        for number, group in enumerate(groups)
    ]


def _fragments(spec: TensorSpec, unit: Unit) -> list[Box]:
    if not spec.nbytes:
        return []
    if unit == "matrix":
        return [Box(offsets=(0,) * len(spec.shape), lengths=spec.shape)]
    return list(cut(spec.shape, MERGE_FRAGMENT_ELEMENTS, whole_rows=unit == "row"))


def _image(
    number: int,
    rows: Sequence[tuple[int, Box]],
    specs: Sequence[TensorSpec],
    empty: Sequence[int],
    objects: tuple[ResultObject, ...],
    block_bytes: int,
) -> ImagePlan:
    tensors = tuple(sorted({*(i for i, _ in rows), *empty}))
    place = {i: at for at, i in enumerate(tensors)}
    return ImagePlan(
        number=number,
        tensors=tensors,
        specs=tuple(specs[i] for i in tensors),
        rows=tuple((place[i], box) for i, box in rows),
        objects=objects,
        block_bytes=block_bytes,
    )
