"""torch objects to named tensors with boxes and typed objects, and back."""

from ckpt.state.elastic import ElasticLoader, ElasticSampler
from ckpt.state.fenced import fenced_storages
from ckpt.state.flat import FlatOptimizerState, FlatShard
from ckpt.state.loader import Loader
from ckpt.state.memory import device_view
from ckpt.state.restore import LoadTarget, target
from ckpt.state.rng import RNG
from ckpt.state.rows import SavedWorld, StoredObjectRow
from ckpt.state.tensors import annotate
from ckpt.state.walk import Collector, collect

__all__ = [
    "RNG",
    "Collector",
    "ElasticLoader",
    "ElasticSampler",
    "FlatOptimizerState",
    "FlatShard",
    "LoadTarget",
    "Loader",
    "SavedWorld",
    "StoredObjectRow",
    "annotate",
    "collect",
    "device_view",
    "fenced_storages",
    "target",
]
