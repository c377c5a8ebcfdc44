"""What torch.distributed.checkpoint's coordinator does for a save, with its own classes and functions, in one process.

In: numbers of ranks and tensors. Out: seconds and bytes. Its cost is linear in shards, so that a part of the ranks tells.
Rank r's plan is what `create_default_local_save_plan` gives for DTensors cut on dim 0; the pickles are the ones that its
`gather_object`, `scatter_object_list` and `.metadata` file are made of.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ckpt.format.spec import TensorSpec


def local_plan(specs: Sequence[TensorSpec], rank: int, ranks: int) -> SavePlan:
    """The plan of one rank: one shard of every tensor."""
    items = []
    for spec in specs:
        rows = spec.shape[0] // ranks
        offsets = torch.Size((rank * rows, *(0 for _ in spec.shape[1:])))
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((rows, *spec.shape[1:])))
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=torch.bfloat16), size=torch.Size(spec.shape)
        )
        items.append(WriteItem(index=MetadataIndex(spec.name, offsets), type=WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def coordinator(specs: Sequence[TensorSpec], ranks: int) -> dict[str, float]:
    """One pass of the coordinator, and of one rank that reads the result at load. Seconds and bytes."""
    out: dict[str, float] = {"ranks": ranks, "shards": ranks * len(specs)}
    gathered = [pickle.dumps(local_plan(specs, rank, ranks)) for rank in range(ranks)]
    out["gathered_bytes"] = sum(map(len, gathered))
    at = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal at
        now = time.perf_counter()
        out[name], at = now - at, now

    plans = [pickle.loads(data) for data in gathered]  # noqa: S301 - made a few lines above
    lap("unpickle gathered plans_s")
    plans, metadata = create_default_global_save_plan(plans)
    lap("create_default_global_save_plan_s")
    for plan in plans:
        pickle.dumps(plan)
    lap("pickle scattered plans_s")
    metadata.storage_data = _stored(plans, metadata)
    metadata.storage_meta = StorageMeta(checkpoint_id="run/step", save_id="0" * 36)
    at = time.perf_counter()
    text = pickle.dumps(metadata)
    lap("pickle .metadata_s")
    del plans, gathered
    out["coordinator_s"] = sum(value for name, value in out.items() if name.endswith("_s"))
    at = time.perf_counter()
    pickle.loads(text)  # noqa: S301 - made a few lines above
    lap("load, every rank: unpickle .metadata_s")
    out["metadata_bytes"] = len(text)
    out["metadata_bytes_per_shard"] = len(text) / (ranks * len(specs))
    return out


def _stored(plans: Sequence[SavePlan], metadata: Metadata) -> dict[MetadataIndex, _StorageInfo]:
    """Where the file writer says that each shard lies."""
    found: dict[MetadataIndex, _StorageInfo] = {}
    for rank, plan in enumerate(plans):
        position = 0
        for item in plan.items:
            assert item.tensor_data is not None
            length = item.tensor_data.chunk.sizes.numel() * 2 + 1200  # a torch.save archive around each shard
            found[item.index] = _StorageInfo(relative_path=f"__{rank}_0.distcp", offset=position, length=length)
            position += length
    return found
