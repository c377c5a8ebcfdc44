"""torch objects to named tensors with boxes and typed objects, and back."""

from ckpt.state.flat import FlatOptimizerState, FlatShard
from ckpt.state.restore import LoadTarget, target
from ckpt.state.rows import SavedWorld, StoredObjectRow
from ckpt.state.tensors import annotate
from ckpt.state.walk import collect

__all__ = [
    "FlatOptimizerState",
    "FlatShard",
    "LoadTarget",
    "SavedWorld",
    "StoredObjectRow",
    "annotate",
    "collect",
    "target",
]
