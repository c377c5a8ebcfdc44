"""Digests that say whether two states have the same structure.

In: a `LocalState`. Out: short digests. Pure. Never looks at values or addresses.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ckpt.format.spec import LocalState, TensorSpec
from ckpt.layout.box import BoxTable


class Digests:
    """The digests of the states of one run. Made anew only for other objects than the last ones. One owner, one thread."""

    def __init__(self) -> None:
        self._of: tuple[list[TensorSpec], BoxTable] | None = None
        self._structure = self._layout = ""

    def structure(self, local: LocalState) -> str:
        """As `structure_digest`."""
        self._update(local)
        return self._structure

    def layout(self, local: LocalState) -> str:
        """As `layout_digest`."""
        self._update(local)
        return self._layout

    def _update(self, local: LocalState) -> None:
        boxes = local.pieces.boxes
        if self._of is None or self._of[0] is not local.specs or self._of[1] is not boxes:
            self._structure, self._layout = structure_digest(local), layout_digest(local)
            self._of = (local.specs, boxes)


def structure_digest(local: LocalState) -> str:
    """Equal for states that need the same plan: the same tensors, held in the same boxes."""
    digest = hashlib.blake2b(digest_size=16)
    boxes = local.pieces.boxes
    digest.update("\n".join([f"{s.name}|{s.role}|{s.dtype}|{s.shape}|{s.aliases}" for s in local.specs]).encode())
    for column in (boxes.tensor, boxes.offsets, boxes.lengths):
        digest.update(str(column.shape).encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def layout_digest(local: LocalState) -> str:
    """Equal for ranks that hold the same parts of the same parameters; "" for a rank without parameters.

    Parameters only: whether an optimizer has its slots yet does not change where anything lives.
    """
    params = {i: spec for i, spec in enumerate(local.specs) if spec.role == "param"}
    lines = [f"{spec.name}|{spec.shape}" for spec in params.values()]
    boxes = local.pieces.boxes
    for row in np.flatnonzero(np.isin(boxes.tensor, np.array(sorted(params), np.int32))):
        spec = params[int(boxes.tensor[row])]
        box = boxes.box(int(row), len(spec.shape))
        lines.append(f"{spec.name}|{box.offsets}|{box.lengths}")
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest() if params else ""
