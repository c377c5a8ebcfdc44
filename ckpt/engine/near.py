"""Load a snapshot of which every rank finds its whole part in memory of its own, without an index and without its peers' bytes.

In: this rank's image with its receipt, and the state. Out: the state filled, or nothing where some rank needs more than its own
image: parts of it were saved by another rank, the layout or the world is another one, or names differ. Then nothing has changed,
and the way that serves every layout (engine/load.py) also says what is wrong. All ranks call together.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt.collector import collector_paused
from ckpt.commit.assemble import blocks_in_order, distinct_in_order
from ckpt.config import Options
from ckpt.engine.keeper import OwnImage
from ckpt.engine.load import Loaded, wanted_pieces
from ckpt.engine.read import ReadJob, read_bytes_max, run_reads
from ckpt.engine.reader import ids_of
from ckpt.engine.structure import layout_digest
from ckpt.engine.world import World, raise_together
from ckpt.errors import CheckpointError, DamagedError
from ckpt.events import Timeline
from ckpt.format import receipt
from ckpt.format.checksum import num_blocks, sha256
from ckpt.format.index import FragmentTable
from ckpt.format.receipt import ImageTable, ObjectRow, Receipt
from ckpt.format.spec import PieceTable
from ckpt.layout.layout import Layout
from ckpt.plan.read import ReadPlan, plan_read, uncovered
from ckpt.state import LoadTarget, SavedWorld, StoredObjectRow, target

_OBJECTS_BYTES_MAX = 1 << 20  # of one rank, and
_ALL_OBJECTS_BYTES_MAX = 64 << 20  # of all ranks together: each gets the objects of all
_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """This rank's part, found to be all that it wants."""

    image: OwnImage
    receipt: Receipt
    aim: LoadTarget
    pieces: PieceTable
    fragments: FragmentTable
    plan: ReadPlan
    objects: list[tuple[ObjectRow, bytes]]


def load_near(
    own: OwnImage | None,
    state: Mapping[str, Any],
    world: World,
    options: Options,
    *,
    layout: Layout | None = None,
    timeline: Timeline | None = None,
) -> Loaded | None:
    """Fill `state` from every rank's own image; None when that is not enough on some rank: nothing has changed then.

    Args:
        own: None where this rank has no image.

    Raises:
        MismatchError: the objects of all ranks together do not fit the state of this one, which has not changed.
        DamagedError: a block is not what was written; the state is partly changed.
        RankFailedError: as either, on another rank; the state is partly changed.
    """
    start = time.perf_counter()
    timeline = timeline or Timeline()
    part = None if own is None else _part(own, state, world, options, layout)
    walked = time.perf_counter()
    timeline.add("walk", start, walked)
    saved = SavedWorld(world=world.size, same_layout=True)
    objects = _exchange_objects(part, state, world)
    if objects is None:
        return None
    assert part is not None
    error: CheckpointError | None = None
    try:
        part.aim.check(objects, saved)
        planned = time.perf_counter()
        timeline.add("plan", walked, planned)
        run_reads(_job(part, options))
        done = time.perf_counter()
        timeline.add("read", planned, done, nbytes=part.plan.read_nbytes, exchanged=False)
        part.aim.restore(objects, saved)
        timeline.add("restore", done, time.perf_counter())
    except CheckpointError as problem:
        error = problem
    raise_together(world, error, "the state is partly changed: load again")
    return Loaded(
        step=part.receipt.step,
        num_tensors=len(part.aim.local.specs),
        wanted_nbytes=part.plan.wanted_nbytes,
        read_nbytes=part.plan.read_nbytes,
        exchanged=False,
        index_nbytes=0,
        missing=(),
        extra=(),
        seconds=timeline.seconds() | {"total": time.perf_counter() - start},
    )


def _part(
    own: OwnImage, state: Mapping[str, Any], world: World, options: Options, layout: Layout | None
) -> _Part | None:
    """None when this rank wants more, less or something else than its image has."""
    try:
        with collector_paused():
            return _found(own, state, world, options, layout)
    except CheckpointError as error:  # whose words are for the user: those of the other way, which meets it as well
        _log.debug("rank %d does not load its own image alone: %s", world.rank, error.message)
        return None


def _found(
    own: OwnImage, state: Mapping[str, Any], world: World, options: Options, layout: Layout | None
) -> _Part | None:
    made = receipt.unpack(own.receipt, name=own.key)
    image = made.image
    if image is None or image.holder is not None or (made.rank, made.world) != (world.rank, world.size):
        return None
    aim = target(state, image.specs, rank=world.rank, world=world.size, layout=layout)
    ids = _same_tensors(image, aim, state)
    objects = [row for row in made.objects if row.name.split("/", 1)[0] in state]
    is_same = ids is not None and layout_digest(aim.local) == made.extra.get("layout")
    if not is_same or sorted(row.name for row in objects) != aim.wants_objects:
        return None
    assert ids is not None
    pieces, fragments = wanted_pieces(aim.local, ids), _fragments(made, image)
    plan = plan_read(
        fragments,
        image.specs,
        pieces,
        block_bytes=made.block_bytes,
        read_bytes_max=read_bytes_max(own.store, options),
        gap_bytes_max=options.read_gap_bytes_max,
    )
    if len(uncovered(plan.copies, pieces)):
        return None  # of what several ranks hold alike each stores a share
    return _Part(
        image=own,
        receipt=made,
        aim=aim,
        pieces=pieces,
        fragments=fragments,
        plan=plan,
        objects=[(row, _payload(own, row)) for row in objects],
    )


def _same_tensors(image: ImageTable, aim: LoadTarget, state: Mapping[str, Any]) -> list[int] | None:
    """The stored id of each wanted tensor; None unless wanted and stored tensors are the same."""
    ids, out = ids_of(image.specs), []
    for spec in aim.local.specs:
        i = ids.get(spec.name, -1)
        if i < 0 or (image.specs[i].shape, image.specs[i].dtype) != (spec.shape, spec.dtype):
            return None
        out.append(i)
    stored = {i for i, spec in enumerate(image.specs) if spec.name.split("/", 1)[0] in state}
    return out if stored == set(out) else None


def _fragments(made: Receipt, image: ImageTable) -> FragmentTable:
    """What the image holds; DamagedError when the receipt is not of one piece."""
    if int(num_blocks(image.nbytes, made.block_bytes).sum()) != len(made.checksums):
        raise DamagedError(f"the receipt of rank {made.rank} has {len(made.checksums)} checksums, expected others")
    order = distinct_in_order(image.specs, image.rows)
    blocks, block_starts = blocks_in_order(image.nbytes, order, made.block_bytes)
    return FragmentTable(
        boxes=image.rows.take(order),
        writer=np.zeros(len(order), np.int32),
        offsets=image.offsets[order],
        nbytes=image.nbytes[order],
        checksums=made.checksums[blocks],
        block_starts=block_starts,
    )


def _payload(own: OwnImage, row: ObjectRow) -> bytes:
    data = own.store.read(own.key, row.byte_offset, row.byte_offset + row.nbytes)
    if sha256(data) != row.digest:
        raise DamagedError(f"object `{row.name}` of rank {row.rank} is damaged in `{own.key}`")
    return data


def _job(part: _Part, options: Options) -> ReadJob:
    assert part.receipt.image is not None
    return ReadJob(
        store=part.image.store,
        keys=[part.image.key],
        plan=part.plan,
        fragments=part.fragments,
        specs=part.receipt.image.specs,
        pieces=part.pieces,
        options=options,
    )


def _exchange_objects(
    part: _Part | None, state: Mapping[str, Any], world: World
) -> dict[str, list[StoredObjectRow]] | None:
    """The objects of all ranks, by name; None when some rank needs more than its own image. All ranks call."""
    found = [] if part is None else part.objects
    nbytes = sum(len(payload) for _, payload in found)
    fits = part is not None and nbytes <= min(_OBJECTS_BYTES_MAX, _ALL_OBJECTS_BYTES_MAX // world.size)
    rows = [_row_fields(row, payload) for row, payload in found] if fits else []
    head = json.dumps({"fits": fits, "keys": sorted(state), "objects": rows}).encode()
    body = b"".join([payload for _, payload in found] if fits else [])
    answers = world.all_gather(np.frombuffer(len(head).to_bytes(8, "little") + head + body, np.uint8))
    told = [_told(answer.tobytes()) for answer in answers]
    if not all(head["fits"] and head["keys"] == told[0][0]["keys"] for head, _ in told):
        return None
    out: dict[str, list[StoredObjectRow]] = {}
    for fields, payloads in told:
        for row, payload in zip(fields["objects"], payloads, strict=True):
            del row["nbytes"]
            out.setdefault(row.pop("name"), []).append(StoredObjectRow(**row, payload=payload))
    return out


def _row_fields(row: ObjectRow, payload: bytes) -> dict[str, Any]:
    names = ("name", "rank", "kind", "dp_rank", "dp_size")
    return {name: getattr(row, name) for name in names} | {"nbytes": len(payload)}


def _told(answer: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What one rank said: its head, and the payloads of its objects."""
    at = 8 + int.from_bytes(answer[:8], "little")
    head, payloads = json.loads(answer[8:at]), []
    for row in head["objects"]:
        payloads.append(answer[at : at + row["nbytes"]])
        at += row["nbytes"]
    return head, payloads
