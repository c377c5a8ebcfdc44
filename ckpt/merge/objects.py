"""The objects of a merged checkpoint: those of the newest source, random streams seeded anew.

In: the newest source and the recipe's policy. Out: rows with their payloads (read when they are wanted). Hyperparameters of the
optimizer go with its tensors. Nothing is averaged: a schedule or a position belongs to one step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckpt.engine.reader import StoredCheckpoint
from ckpt.format.checksum import sha256
from ckpt.format.image import padded_object
from ckpt.format.objects import encode
from ckpt.format.receipt import ObjectRow
from ckpt.merge.recipe import State
from ckpt.merge.sources import Source


@dataclass(frozen=True, kw_only=True)
class ResultObject:
    """One object of the result; `row` lacks its place."""

    row: ObjectRow
    payload: Callable[[], bytes]  # padded


def objects_of(newest: Source, state: State, *, seed: int, merge_id: str) -> list[ResultObject]:
    """All objects, sorted by name and rank.

    Args:
        merge_id: of what is merged; with `seed` and the rank it makes the seeds of random streams.
    """
    stored = newest.reader
    if not isinstance(stored, StoredCheckpoint):
        return []
    kept = [row for row in stored.objects if _is_kept(row, state)]
    return [
        _reseeded(row, seed, merge_id) if row.kind == "rank" and state.rng == "reseed" else _copied(row, stored)
        for row in sorted(kept, key=lambda row: (row.name, row.rank))
    ]


def _is_kept(row: ObjectRow, state: State) -> bool:
    if row.kind == "optimizer":
        return state.optimizer != "drop"
    return state.rng != "drop" if row.kind == "rank" else state.objects != "drop"


def _copied(row: ObjectRow, stored: StoredCheckpoint) -> ResultObject:
    return ResultObject(row=row, payload=lambda: stored.read_object(row))


def _reseeded(row: ObjectRow, seed: int, merge_id: str) -> ResultObject:
    text = f"ckpt.merge.rng/1\0{seed}\0{merge_id}\0{row.name}\0{row.rank}"
    payload = padded_object(encode({"seed": hashlib.sha256(text.encode()).hexdigest()}, name=row.name))
    made = ObjectRow(**{**vars(row), "nbytes": len(payload), "digest": sha256(payload)})
    return ResultObject(row=made, payload=lambda: payload)


def sizes_of(objects: Sequence[ResultObject]) -> list[int]:
    """Padded bytes of each."""
    return [one.row.nbytes for one in objects]
