"""ckpt: distributed checkpoints for torch.distributed training. Saved as it lies on the ranks, loaded on any layout."""

from typing import TYPE_CHECKING, Any

from ckpt.api import Checkpointer, async_save, load, open, save  # noqa: A004 - `ckpt.open` reads like what it does
from ckpt.config import Options
from ckpt.engine.background import PendingSave
from ckpt.engine.load import Loaded
from ckpt.engine.save import Saved
from ckpt.engine.view import Checkpoint, TensorView
from ckpt.errors import (
    AlreadyExistsError,
    CheckpointError,
    DamagedError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
    RankFailedError,
    SaveFailedError,
    StoreError,
    VersionError,
)
from ckpt.format.objects import register_codec
from ckpt.layout.box import Box
from ckpt.layout.layout import Layout
from ckpt.state import FlatOptimizerState, FlatShard, annotate
from ckpt.state.elastic import ElasticLoader, ElasticSampler
from ckpt.state.loader import Loader
from ckpt.state.rng import RNG

if TYPE_CHECKING:
    from ckpt.convert.zarr import zarr_store

__version__ = "0.1.0"

__all__ = [
    "RNG",
    "AlreadyExistsError",
    "Box",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "DamagedError",
    "ElasticLoader",
    "ElasticSampler",
    "FlatOptimizerState",
    "FlatShard",
    "InvalidInputError",
    "Layout",
    "Loaded",
    "Loader",
    "MismatchError",
    "NotFoundError",
    "Options",
    "PendingSave",
    "RankFailedError",
    "SaveFailedError",
    "Saved",
    "StoreError",
    "TensorView",
    "VersionError",
    "annotate",
    "async_save",
    "load",
    "open",
    "register_codec",
    "save",
    "zarr_store",
]


def __getattr__(name: str) -> Any:
    """`zarr_store` on first use: importing zarr would double the time that `import ckpt` takes."""
    if name == "zarr_store":
        from ckpt.convert.zarr import zarr_store

        return zarr_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
