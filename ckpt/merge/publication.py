"""Make images that are durable a checkpoint, or remove them.

In: the receipts of all images of one attempt, and what the manifest says beside. Out: index and manifest, in this order; or an
attempt that is gone. One process, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ckpt.commit.publish as publishing
from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.commit.complete import PROGRAM
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import CheckpointError
from ckpt.format import manifest
from ckpt.format.receipt import Receipt
from ckpt.merge.sources import Reader
from ckpt.store.base import Store


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the manifest says of the job that saved, whoever writes the images now."""

    world: int = 1
    layout: dict[str, Any] | None = None
    rank_layouts: Sequence[str] = ("",)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def like(reader: Reader) -> Saved:
        """As in another checkpoint; one process where it is a folder. Its metrics were measured of it, and stay there."""
        if not isinstance(reader, StoredCheckpoint):
            return Saved()
        found = reader.manifest
        return Saved(world=found.world, layout=found.layout, rank_layouts=found.layouts_by_rank)


def publish_images(
    into: Store, receipts: Sequence[Receipt], saved: Saved, *, metadata: dict[str, Any], options: Options
) -> None:
    """Write index and manifest. Every image is durable; receipts come in the order of the images."""
    step, attempt = receipts[0].step, receipts[0].attempt
    assembled = Assembler(PROGRAM).assemble(
        receipts, metadata=metadata, metrics=dict(saved.metrics), layout=saved.layout
    )
    record = dataclasses.replace(
        assembled.manifest,
        world=saved.world,
        rank_layouts=list(saved.rank_layouts),
        layout=saved.layout,
        structure_changed=False,
    )
    for name, data in assembled.files.items():
        failpoints.hit("merge.before-index")
        into.put(f"{names.attempt_folder(step, attempt)}/{name}", data)
    publishing.publish(into, step, attempt, manifest.pack(record), options=options)


def abandon(into: Store, step: int, attempt: str, error: BaseException) -> None:
    """Remove everything of an attempt, after a failure that trying again does not mend."""
    folder = names.attempt_folder(step, attempt)
    try:
        publishing.abort(into, step, attempt, f"it could not be made: {error}")
        keys = [entry.key for entry in into.list(folder + "/")]
        mark = names.aborted_key(step, attempt)
        into.delete([key for key in keys if key != mark])
        into.delete([mark])
    except CheckpointError as problem:
        error.add_note(f"what was written could not be removed (`ckpt gc` does): {problem.message}")
