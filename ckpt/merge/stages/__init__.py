"""The stages of the task-vector pipeline: what a recipe's `stages` may hold, and what every stage is.

In: nothing. Out: stages by family and kind (importing this package registers those that ckpt has).
"""

from __future__ import annotations

from ckpt.merge.stages import combine, consensus, curvature, pcb, rescale, scale, sparsify
from ckpt.merge.stages.stage import FAMILIES, Stage, known_stages

__all__ = [
    "FAMILIES",
    "Stage",
    "combine",
    "consensus",
    "curvature",
    "known_stages",
    "pcb",
    "rescale",
    "scale",
    "sparsify",
]
