"""What one rank writes of a structure: planned with the other ranks once, and kept while the structure stays.

In: a rank's `LocalState`. Out: `Planned` and the pack program of its image. `plan_together` is the only place of a save that
makes collective calls; everything here runs on the training thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.collector import collector_paused
from ckpt.engine.agree import agree, find_disagreements, names_by_hash
from ckpt.engine.structure import Digests
from ckpt.engine.world import World
from ckpt.errors import CheckpointError, RankFailedError
from ckpt.format.checksum import choose_block_bytes, piece_bytes_of
from ckpt.format.image import lay_out
from ckpt.format.spec import LocalState, TensorSpec
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.records import box_keys, make_records, mix
from ckpt.plan.save import plan_save, rows_of_rank
from ckpt.snapshot.pack import PackProgram, make_program


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a structure needs; made once per structure."""

    structure: str
    keys: NDArray[np.uint64]  # [N] of the pieces
    rows: BoxTable
    piece_of_row: Int64Array
    block_bytes: int
    layout_digest: str


class Planner:
    """The plan of the structure that one rank saves. One owner, on the training thread."""

    def __init__(self, world: World, chunk_bytes: int, *, kept: bool = False) -> None:
        """
        Args:
            kept: a keeper gets images, and wants to know checksums of their pieces.
        """
        self._world, self._chunk_bytes, self._kept = world, chunk_bytes, kept
        self._digests = Digests()
        self._planned: Planned | None = None
        self._unproven = False  # planned ahead: whether this is the structure that all ranks save is not yet known
        self._program: tuple[tuple[object, ...], PackProgram] | None = None
        self.session = ""  # id that all ranks share since they last planned together

    def forget(self) -> None:
        """Plan together again at the next call. All ranks must do so before the same save."""
        self._planned = None

    def plan(
        self, local: LocalState, *, step: int, target: str, error: BaseException | None, ahead: bool = False
    ) -> tuple[Planned, bool]:
        """The plan for `local`, and whether the structure has changed since it was made. All ranks call.

        Args:
            error: why this rank has nothing to save. Raised here when ranks plan together (they then all raise), else not.
            ahead: this is no save yet; the first save then asks once whether all ranks still have this structure.
        """
        unproven, self._unproven = self._unproven, ahead
        if self._planned is not None and unproven and not self._all_unchanged(local, error):
            self._planned = None
        if self._planned is None:
            self._planned = self._plan_together(local, step, target, error)
        planned = self._planned
        changed = error is None and planned.structure != self._digests.structure(local)
        return (self._plan_alone(local, planned) if changed else planned), changed

    def _all_unchanged(self, local: LocalState, error: BaseException | None) -> bool:
        assert self._planned is not None
        same = error is None and self._planned.structure == self._digests.structure(local)
        return all(bool(answer[0]) for answer in self._world.all_gather(np.array([same], np.uint8)))

    def _plan_together(self, local: LocalState, step: int, target: str, error: BaseException | None) -> Planned:
        """Agree with all ranks on the plan of this structure."""
        records = None
        if error is None:
            try:
                with collector_paused():
                    records = make_records(local.specs, local.pieces.boxes)
            except CheckpointError as problem:
                error = problem
        agreement = agree(self._world, step=step, target=target, records=records, error=error)
        assert records is not None
        known = names_by_hash([spec.name for spec in local.specs])
        differing = find_disagreements(agreement.records, known)
        if differing:
            raise RankFailedError(
                f"ranks disagree on dtype, global shape or role of {', '.join(differing[:20])};"
                f" rank {self._world.rank} has {_described(local.specs, differing)}",
                kind="rank-disagrees",
                hints=("a tensor cut over ranks must be a DTensor, or be described by `layout=` or ckpt.annotate",),
            )
        self.session = agreement.session
        plan = plan_save(agreement.records)
        rows, piece_of_row = rows_of_rank(plan, self._world.rank, local.specs, local.pieces.boxes)
        return Planned(
            structure=self._digests.structure(local),
            keys=_piece_keys(records),
            rows=rows,
            piece_of_row=piece_of_row,
            block_bytes=choose_block_bytes(int(plan.load.sum())),
            layout_digest=self._digests.layout(local),
        )

    def _plan_alone(self, local: LocalState, old: Planned) -> Planned:
        """A structure that changed since the plan: keep what the plan says of the pieces that it knows, write all others.

        No collective call. Replicas of a new piece are then written by each holder and the committer keeps one; the next
        save plans together again, because the manifest says that a structure changed.
        """
        keys = _piece_keys(make_records(local.specs, local.pieces.boxes))
        order = np.argsort(old.keys)
        at = np.minimum(np.searchsorted(old.keys, keys, sorter=order), max(len(order) - 1, 0))
        known = old.keys[order[at]] == keys if len(order) else np.zeros(len(keys), bool)
        new_of_old = np.full(len(old.keys), -1, np.int64)
        new_of_old[order[at[known]]] = np.flatnonzero(known)
        kept = np.flatnonzero(new_of_old[old.piece_of_row] >= 0)
        pieces = np.concatenate([new_of_old[old.piece_of_row[kept]], np.flatnonzero(~known)])
        offsets, lengths = local.pieces.boxes.offsets[pieces].copy(), local.pieces.boxes.lengths[pieces].copy()
        width = min(offsets.shape[1], old.rows.num_dims)
        offsets[: len(kept), :width] = old.rows.offsets[kept, :width]
        lengths[: len(kept), :width] = old.rows.lengths[kept, :width]
        rows = BoxTable(tensor=local.pieces.boxes.tensor[pieces], offsets=offsets, lengths=lengths)
        return dataclasses.replace(
            old,
            structure=self._digests.structure(local),
            layout_digest=self._digests.layout(local),
            keys=keys,
            rows=rows,
            piece_of_row=pieces,
        )

    def program(self, local: LocalState, planned: Planned, payloads: Sequence[bytes]) -> PackProgram:
        """How to fill this rank's image; the last one when nothing that it depends on has changed."""
        objects = [(obj.name, len(data)) for obj, data in zip(local.objects, payloads, strict=True)]
        rows = planned.rows
        key = (
            planned.structure,
            planned.block_bytes,
            len(rows),
            rows.offsets.tobytes(),
            rows.lengths.tobytes(),
            rows.tensor.tobytes(),
            planned.piece_of_row.tobytes(),
            *objects,
        )
        if self._program is None or self._program[0] != key:
            layout = lay_out(local.specs, planned.rows, objects)
            program = make_program(
                layout,
                local.specs,
                local.pieces.boxes,
                planned.piece_of_row[layout.source],
                chunk_bytes=self._chunk_bytes,
                block_bytes=planned.block_bytes,
                cut_bytes=piece_bytes_of(layout.total_bytes) if self._kept else 0,
            )
            self._program = (key, program)
        return self._program[1]


def _piece_keys(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N] one key per box of a tensor of this dtype and shape: the corners alone also fit a tensor of another shape."""
    return mix(box_keys(records) ^ mix(records["size"]))


def _described(specs: list[TensorSpec], differing: list[str]) -> str:
    text = " ".join(differing)
    found = [f"`{s.name}` {s.dtype} {list(s.shape)} {s.role}" for s in specs if f"`{s.name}`" in text]
    return ", ".join(found[:20]) or "none of them"
