"""ckpt: distributed checkpoints for torch.distributed training. Saved as it lies on the ranks, loaded on any layout.

Public names are imported when they are first used: torch takes seconds to import, and the command line rarely needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt import delta, lora
    from ckpt.api import Checkpointer, async_save, load, open, save
    from ckpt.config import Memory, OnlineAverage, Options
    from ckpt.convert.zarr import zarr_store
    from ckpt.engine.attempt import Saved
    from ckpt.engine.load import Loaded
    from ckpt.engine.pending import PendingSave
    from ckpt.engine.view import Checkpoint, TensorView
    from ckpt.errors import (
        AgentError,
        AlreadyExistsError,
        BudgetError,
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
    from ckpt.merge.api import merge, plan_merge, resume_merge
    from ckpt.merge.registry import merge_method
    from ckpt.merge.unmerge import unmerge
    from ckpt.search.api import search
    from ckpt.snapshot.fence import Attached, attach, fence
    from ckpt.state import FlatOptimizerState, FlatShard, annotate
    from ckpt.state.elastic import ElasticLoader, ElasticSampler
    from ckpt.state.loader import Loader
    from ckpt.state.rng import RNG

__version__ = "0.1.0"

_PLACES = {
    "Checkpointer": "ckpt.api",
    "async_save": "ckpt.api",
    "load": "ckpt.api",
    "open": "ckpt.api",
    "save": "ckpt.api",
    "Memory": "ckpt.config",
    "OnlineAverage": "ckpt.config",
    "Options": "ckpt.config",
    "zarr_store": "ckpt.convert.zarr",
    "PendingSave": "ckpt.engine.pending",
    "Loaded": "ckpt.engine.load",
    "Saved": "ckpt.engine.attempt",
    "Checkpoint": "ckpt.engine.view",
    "TensorView": "ckpt.engine.view",
    "AgentError": "ckpt.errors",
    "AlreadyExistsError": "ckpt.errors",
    "BudgetError": "ckpt.errors",
    "CheckpointError": "ckpt.errors",
    "DamagedError": "ckpt.errors",
    "InvalidInputError": "ckpt.errors",
    "MismatchError": "ckpt.errors",
    "NotFoundError": "ckpt.errors",
    "RankFailedError": "ckpt.errors",
    "SaveFailedError": "ckpt.errors",
    "StoreError": "ckpt.errors",
    "VersionError": "ckpt.errors",
    "register_codec": "ckpt.format.objects",
    "Box": "ckpt.layout.box",
    "Layout": "ckpt.layout.layout",
    "plan_merge": "ckpt.merge.api",
    "resume_merge": "ckpt.merge.api",
    "merge_method": "ckpt.merge.registry",
    "unmerge": "ckpt.merge.unmerge",
    "Attached": "ckpt.snapshot.fence",
    "attach": "ckpt.snapshot.fence",
    "fence": "ckpt.snapshot.fence",
    "FlatOptimizerState": "ckpt.state",
    "FlatShard": "ckpt.state",
    "annotate": "ckpt.state",
    "ElasticLoader": "ckpt.state.elastic",
    "ElasticSampler": "ckpt.state.elastic",
    "Loader": "ckpt.state.loader",
    "RNG": "ckpt.state.rng",
}

__all__ = [
    "AgentError",
    "AlreadyExistsError",
    "Attached",
    "Box",
    "BudgetError",
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
    "Memory",
    "MismatchError",
    "NotFoundError",
    "OnlineAverage",
    "Options",
    "PendingSave",
    "RNG",
    "RankFailedError",
    "SaveFailedError",
    "Saved",
    "StoreError",
    "TensorView",
    "VersionError",
    "annotate",
    "async_save",
    "attach",
    "delta",
    "fence",
    "load",
    "lora",
    "merge",
    "merge_method",
    "open",
    "plan_merge",
    "register_codec",
    "resume_merge",
    "save",
    "search",
    "unmerge",
    "zarr_store",
]


def __getattr__(name: str) -> Any:
    if name in ("merge", "search", "delta", "lora"):  # packages; the first two can be called
        return importlib.import_module(f"ckpt.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
