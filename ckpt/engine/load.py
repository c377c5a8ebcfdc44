"""Load a checkpoint into a rank's state, in place, on any layout.

In: a stored checkpoint and the user's state. Out: the state filled, or an error on every rank that lists all differences, raised
before a byte of the target changes. All ranks of the world call together; each reads what its boxes need.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.collector import collector_paused
from ckpt.engine.exchange import read_together
from ckpt.engine.read import Progress
from ckpt.engine.reader import StoredCheckpoint, ids_of
from ckpt.engine.structure import layout_digest
from ckpt.engine.world import World, raise_together
from ckpt.errors import CheckpointError, InvalidInputError, MismatchError, RankFailedError
from ckpt.events import Timeline
from ckpt.format.spec import LocalState, PieceTable, TensorSpec
from ckpt.layout.layout import Layout
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.plan.read import subset_pieces
from ckpt.state import LoadTarget, SavedWorld, StoredObjectRow, target

Rename = Mapping[str, str] | Callable[[str], str] | None

_LISTED_MAX = 40  # differences of one kind in a message


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What one rank's load did."""

    step: int
    num_tensors: int  # filled on this rank
    wanted_nbytes: int
    read_nbytes: int  # from the images, checksum blocks and gaps included
    exchanged: bool  # whether ranks read for each other
    index_nbytes: int
    missing: tuple[str, ...]  # wanted, not in the checkpoint; only with strict=False
    extra: tuple[str, ...]  # in the checkpoint, wanted by no rank; only with strict=False
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Target tensors against stored tensors."""

    ids: list[int]  # per target tensor the stored id, -1 where there is none
    same: list[int]  # stored ids of other names of target tensors: a tied weight that was saved untied
    missing: list[str]
    reshaped: list[str]
    objects: list[str]  # to load
    missing_objects: list[str]
    unwanted: NDArray[np.bool_]  # [T] stored tensors that `include` leaves out


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What of a checkpoint a load is about: all of it, or the names that match a pattern."""

    patterns: tuple[NamePattern, ...] | None

    @staticmethod
    def of(include: Sequence[str] | None, specs: Sequence[TensorSpec], stored: StoredCheckpoint) -> _Chosen:
        if include is None:
            return _Chosen(patterns=None)
        if isinstance(include, str):
            raise InvalidInputError(f"`include` is a list of patterns, found the string {include!r}")
        chosen = _Chosen(patterns=tuple(NamePattern(text) for text in include))
        if not chosen.specs(specs) and not any(chosen.has(row.name) for row in stored.objects):
            raise MismatchError(
                f"`include` matches nothing of step {stored.step}: {_listed([f'`{text}`' for text in include])}",
                hints=("`ckpt tensors` lists what is stored; `*` stands for one part of a name, `**` for any",),
            )
        return chosen

    def has(self, *names: str) -> bool:
        if self.patterns is None:
            return True
        parsed = [(name, TensorName.parse(name)) for name in names]
        return any(pattern.match(name, parts) is not None for name, parts in parsed for pattern in self.patterns)

    def specs(self, specs: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return specs if self.patterns is None else [spec for spec in specs if self.has(spec.name, *spec.aliases)]


def load_state(
    stored: StoredCheckpoint,
    state: Mapping[str, Any],
    world: World,
    *,
    layout: Layout | None = None,
    strict: bool = True,
    rename: Rename = None,
    include: Sequence[str] | None = None,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> Loaded:
    """Fill `state` from `stored`. All ranks of `world` call.

    Args:
        strict: refuse names that are missing or extra; shapes and dtypes must match in any case.
        rename: stored name -> name in `state`; names that it does not give stay.
        include: patterns of the names in `state` to fill (ckpt.layout.pattern); all others stay as they are, unread.

    Raises:
        MismatchError: with every difference, before anything changed.
        DamagedError: a block read is not what was written; what was not yet copied is untouched.
        RankFailedError: another rank failed; this rank's state must be loaded again.
    """
    start = time.perf_counter()
    timeline = timeline or Timeline()
    error: CheckpointError | None = None
    prepared: tuple[LoadTarget, _Match, list[TensorSpec]] | None = None
    try:
        with collector_paused():
            specs = _renamed(stored.specs, rename)
            chosen = _Chosen.of(include, specs, stored)
            aim = target(state, chosen.specs(specs), rank=world.rank, world=world.size, layout=layout)
            prepared = (aim, _match(aim, specs, stored, chosen), specs)
    except CheckpointError as problem:
        error = problem
    walked = time.perf_counter()
    timeline.add("walk", start, walked)
    extra, missing, same_layout = _agree(world, stored, prepared, state, error, strict=strict)
    assert prepared is not None
    aim, match, _ = prepared
    saved = SavedWorld(world=stored.manifest.world, same_layout=same_layout)
    error = None
    try:
        pieces = wanted_pieces(aim.local, match.ids)
        objects = _object_rows(stored, set(match.objects))
        aim.check(objects, saved)
    except CheckpointError as problem:
        error = problem
    raise_together(world, error, "before anything changed")
    planned = time.perf_counter()
    timeline.add("plan", walked, planned)
    done_bytes = read_together(stored, pieces, world, progress=progress)
    done = time.perf_counter()
    timeline.add("read", planned, done, nbytes=done_bytes.read, exchanged=done_bytes.exchanged)
    try:
        aim.restore(objects, saved)
    except CheckpointError as problem:
        error = problem
    raise_together(world, error, "the state is partly changed: load again")
    timeline.add("restore", done, time.perf_counter())
    return Loaded(
        step=stored.step,
        num_tensors=sum(i >= 0 for i in match.ids),
        wanted_nbytes=done_bytes.wanted,
        read_nbytes=done_bytes.read,
        exchanged=done_bytes.exchanged,
        index_nbytes=stored.index_nbytes,
        missing=tuple(missing),
        extra=tuple(extra),
        seconds=timeline.seconds() | {"total": time.perf_counter() - start},
    )


def _renamed(specs: Sequence[TensorSpec], rename: Rename) -> list[TensorSpec]:
    if rename is None:
        return list(specs)
    new = (lambda name: rename.get(name, name)) if isinstance(rename, Mapping) else rename
    out = [dataclasses.replace(s, name=new(s.name), aliases=tuple(new(a) for a in s.aliases)) for s in specs]
    seen: dict[str, str] = {}
    for old, spec in zip(specs, out, strict=True):
        if spec.name in seen:
            raise MismatchError(f"rename gives `{seen[spec.name]}` and `{old.name}` the same name `{spec.name}`")
        seen[spec.name] = old.name
    return out


def _match(aim: LoadTarget, specs: Sequence[TensorSpec], stored: StoredCheckpoint, chosen: _Chosen) -> _Match:
    ids = ids_of(specs)
    found: list[int] = []
    same: list[int] = []
    missing, reshaped = [], []
    for spec in aim.local.specs:
        i = ids.get(spec.name, -1)
        if spec.aliases:
            known = [ids[name] for name in spec.aliases if name in ids]
            same += known
            i = known[0] if i < 0 and known else i
        if chosen.patterns is not None and not chosen.has(spec.name, *spec.aliases):
            i = -1
        elif i < 0:
            missing.append(spec.name)
        elif specs[i].shape != spec.shape or specs[i].dtype != spec.dtype:
            reshaped.append(
                f"`{spec.name}`: {specs[i].dtype} {list(specs[i].shape)} in the checkpoint, "
                f"{spec.dtype} {list(spec.shape)} in the state"
            )
        found.append(i)
    names = {row.name for row in stored.objects}
    wanted = [name for name in aim.wants_objects if chosen.has(name)]
    unwanted = np.zeros(len(specs), bool)
    if chosen.patterns is not None:
        unwanted[:] = [not chosen.has(spec.name, *spec.aliases) for spec in specs]
    return _Match(
        ids=found,
        same=same,
        missing=missing,
        reshaped=reshaped,
        objects=[name for name in wanted if name in names],
        missing_objects=[name for name in wanted if name not in names],
        unwanted=unwanted,
    )


def _agree(
    world: World,
    stored: StoredCheckpoint,
    prepared: tuple[LoadTarget, _Match, list[TensorSpec]] | None,
    state: Mapping[str, Any],
    error: CheckpointError | None,
    *,
    strict: bool,
) -> tuple[list[str], list[str], bool]:
    """Exchange what each rank wants and lacks; the same verdict on every rank. Returns (extra, missing, same_layout)."""
    report: dict[str, Any] = {"error": error.message if error else "", "keys": sorted(state)}
    wanted = np.empty(0, np.int32)
    if prepared is not None:
        match = prepared[1]
        wanted = np.unique(np.array([i for i in (*match.ids, *match.same) if i >= 0], np.int32))
        report |= {"missing": match.missing, "reshaped": match.reshaped, "objects": match.missing_objects}
        report |= {"same": _has_layout(stored, prepared[0].local, world)}
    text = json.dumps(report).encode()
    head = np.array([len(text)], np.int64).view(np.uint8)
    answers = world.all_gather(np.concatenate([head, np.frombuffer(text, np.uint8), wanted.view(np.uint8)]))
    if error is not None:
        raise error
    reports, all_wanted = [], []
    for answer in answers:
        size = int(answer[:8].copy().view(np.int64)[0])
        reports.append(json.loads(answer[8 : 8 + size].tobytes()))
        all_wanted.append(np.frombuffer(answer[8 + size :].tobytes(), np.int32))
    failed = [f"rank {rank}: {r['error']}" for rank, r in enumerate(reports) if r["error"]]
    if failed:
        raise RankFailedError("; ".join(failed))
    assert prepared is not None
    specs = prepared[2]
    keys = {key for r in reports for key in r["keys"]}
    unwanted = np.ones(len(specs), bool)
    unwanted[np.concatenate(all_wanted)] = False
    unwanted &= ~prepared[1].unwanted
    extra = [specs[i].name for i in np.flatnonzero(unwanted) if specs[i].name.split("/", 1)[0] in keys]
    union = {k: sorted({x for r in reports for x in r[k]}) for k in ("missing", "reshaped", "objects")}
    _raise_mismatch(union, extra, strict=strict)
    return extra, union["missing"] + union["objects"], all(r["same"] for r in reports)


def _raise_mismatch(found: Mapping[str, Sequence[str]], extra: Sequence[str], *, strict: bool) -> None:
    parts = []
    if found["reshaped"]:
        parts.append(f"{len(found['reshaped'])} of another shape or dtype: {_listed(found['reshaped'])}")
    if strict:
        for what, items in (
            ("not in the checkpoint", found["missing"]),
            ("not in the state of any rank", extra),
            ("objects not in the checkpoint", found["objects"]),
        ):
            if items:
                parts.append(f"{len(items)} {what}: {_listed([f'`{name}`' for name in items])}")
    if parts:
        hints = ["`ckpt tensors` lists what is stored; `rename=` maps stored names to the names in the state"]
        if not found["reshaped"]:
            hints.append("`strict=False` loads what matches and reports the rest")
        raise MismatchError("checkpoint and state differ; " + "; ".join(parts), hints=tuple(hints))


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED_MAX} more" if len(items) > _LISTED_MAX else ""
    return ", ".join(items[:_LISTED_MAX]) + more


def wanted_pieces(local: LocalState, ids: Sequence[int]) -> PieceTable:
    """The pieces that the checkpoint can fill, numbered by stored id."""
    by_spec = np.array(ids, np.int32) if ids else np.empty(0, np.int32)
    tensor = by_spec[local.pieces.boxes.tensor]
    keep = (tensor >= 0) & (local.pieces.boxes.volumes() > 0)
    return subset_pieces(local.pieces, keep, tensor[keep])


def _object_rows(stored: StoredCheckpoint, wanted: Set[str]) -> dict[str, list[StoredObjectRow]]:
    """All ranks' rows of the wanted objects; equal payloads of one object are read once."""
    payloads: dict[tuple[str, str], bytes] = {}
    out: dict[str, list[StoredObjectRow]] = {name: [] for name in sorted(wanted)}
    for row in stored.objects:
        if row.name not in out:
            continue
        key = (row.name, row.digest)
        if key not in payloads:
            payloads[key] = stored.read_object(row)
        out[row.name].append(
            StoredObjectRow(
                rank=row.rank,
                dp_rank=row.dp_rank,
                dp_size=row.dp_size,
                kind=row.kind,  # type: ignore[arg-type]
                payload=payloads[key],
            )
        )
    return out


def _has_layout(stored: StoredCheckpoint, local: LocalState, world: World) -> bool:
    """Whether this rank holds the parameters that the rank of its number held."""
    layouts = stored.manifest.layouts_by_rank
    return len(layouts) == world.size and layouts[world.rank] == layout_digest(local)
