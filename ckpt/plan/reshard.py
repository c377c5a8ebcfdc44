"""Decide which target rank writes what, when a checkpoint is laid out anew.

In: the boxes that each target rank holds. Out: the boxes that each writes: every element once, bytes even over the holders.
Pure. The same plan as that of a save by those ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.layout.box import BoxTable, pad_dims
from ckpt.plan.cover import not_tiled
from ckpt.plan.records import make_records
from ckpt.plan.save import plan_save, rows_of_rank

_LISTED_MAX = 20


def plan_targets(specs: Sequence[TensorSpec], held: Sequence[BoxTable]) -> list[BoxTable]:
    """Per target rank the boxes that it writes; `boxes.tensor` indexes `specs`.

    Raises InvalidInputError (`not-tiled`) when the target ranks together do not hold every element.
    """
    filled = [boxes.take(boxes.volumes() > 0) for boxes in held]
    plan = plan_save([make_records(specs, boxes) for boxes in filled])
    rows = [rows_of_rank(plan, rank, specs, boxes)[0] for rank, boxes in enumerate(filled)]
    _check_tiled(specs, rows)
    return rows


def _check_tiled(specs: Sequence[TensorSpec], rows: Sequence[BoxTable]) -> None:
    wrong = not_tiled(specs, _joined(rows))
    if wrong:
        shown = ", ".join(f"`{specs[tensor].name}` ({covered} elements)" for tensor, covered in wrong[:_LISTED_MAX])
        more = f" and {len(wrong) - _LISTED_MAX} more" if len(wrong) > _LISTED_MAX else ""
        raise InvalidInputError(
            f"the layout does not hold every element of {len(wrong)} tensors once: {shown}{more}", kind="not-tiled"
        )


def _joined(tables: Sequence[BoxTable]) -> BoxTable:
    num_dims = max((table.num_dims for table in tables), default=1)
    return BoxTable(
        tensor=np.concatenate([table.tensor for table in tables]),
        offsets=np.concatenate([pad_dims(table.offsets, num_dims, 0) for table in tables]),
        lengths=np.concatenate([pad_dims(table.lengths, num_dims, 1) for table in tables]),
    )
