"""Remove what no checkpoint needs: data of forgotten steps and of attempts that were never published.

In: a store. Out: a plan, and, when it is carried out, a report. Never removes an attempt that a manifest names, never
one that may still be written, never a key that is none of ours. Can be stopped anywhere and run again.

Ages are differences of time stamps of the store itself (a marker is written and listed), never of the local clock.

One dead attempt goes in this order:

    1. its `aborted.json` is durable: a committer that wakes up late now gives up (publish.py), `unforget` too
    2. the manifest is looked at once more: if it names the attempt, the mark goes and everything else stays
    3. of a forgotten step, `forgotten.json` is deleted: it cannot be brought back any more
    4. its objects are deleted
    5. `aborted.json` is deleted, last, so that a crash in between leaves the mark for the next run
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.find import Attempt, StepContents, contents, step_folders
from ckpt.commit.publish import mark_aborted, published_attempt
from ckpt.config import Options
from ckpt.errors import DamagedError
from ckpt.store.base import Store

_DELETE_AT_ONCE = 64
_MARKERS = ".ckpt-gc/"


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One attempt to remove, and why."""

    step: int
    attempt: str
    reason: str
    keys: tuple[str, ...]
    nbytes: int
    forgotten: bool  # the step's forgotten.json names this attempt


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One attempt without a manifest that stays, and why."""

    step: int
    attempt: str
    reason: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GcPlan:
    """What gc would do."""

    removals: tuple[Removal, ...]
    kept: tuple[Kept, ...]
    leftovers: tuple[str, ...]  # keys of ours that nothing needs: dead claims, a copy of a manifest beside the manifest


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What gc did; with `dry_run`, what it would do."""

    plan: GcPlan
    dry_run: bool
    nbytes: int  # of the attempts removed
    num_objects: int
    num_swept: int  # unfinished files and uploads
    spared: tuple[str, ...]  # attempts that got a manifest after the plan was made


def collect_garbage(
    store: Store, *, options: Options, dry_run: bool = False, force_unfinished: bool = False
) -> GcReport:
    """Remove what no checkpoint needs. One process, while others may save and load.

    Args:
        dry_run: change nothing (but for the marker that tells the store's time).
        force_unfinished: also remove unpublished attempts younger than `gc_grace_s`. The user's word that no save runs;
            one that does run fails with a clear error and loses nothing that was reported saved.
    """
    folders = step_folders(store)
    now_s = _store_time_s(store) if folders else 0.0
    found = [contents(store, step) for step in folders]
    plan = make_plan(found, now_s=now_s, options=options, force_unfinished=force_unfinished)
    if dry_run:
        return GcReport(plan=plan, dry_run=True, nbytes=0, num_objects=0, num_swept=0, spared=())
    return _act(store, plan, found, 0.0 if force_unfinished else options.gc_grace_s)


def make_plan(found: list[StepContents], *, now_s: float, options: Options, force_unfinished: bool = False) -> GcPlan:
    """Decide. Pure. `now_s` is the store's time; 0.0 when it has none, then no attempt is old."""
    removals: list[Removal] = []
    kept: list[Kept] = []
    leftovers: list[str] = []
    for step in found:
        for attempt in step.attempts:
            remove, reason = _judge(step, attempt, now_s, options, force_unfinished)
            if remove:
                removals.append(_removal(attempt, reason, attempt.attempt == step.forgotten))
            elif reason:
                record = Kept(step=step.step, attempt=attempt.attempt, reason=reason, nbytes=attempt.nbytes)
                kept.append(record)
        leftovers += _leftovers(step, now_s, options, force_unfinished)
    return GcPlan(removals=tuple(removals), kept=tuple(kept), leftovers=tuple(leftovers))


def _judge(
    step: StepContents, attempt: Attempt, now_s: float, options: Options, force_unfinished: bool
) -> tuple[bool, str]:
    """Whether to remove an attempt, and why (or why not)."""
    if attempt.attempt == step.complete:
        return False, ""
    if step.complete == "" or step.forgotten == "":
        return False, "the manifest of this step cannot be read, so it is not known whose data these are"
    if attempt.state == "aborted":
        return True, "aborted"
    if attempt.state == "forgotten":
        return True, "forgotten"
    if force_unfinished:
        return True, "unpublished, removal forced"
    if now_s <= 0 or attempt.modified_s <= 0:
        return False, "unpublished, and the store does not tell times"
    age_s = now_s - attempt.modified_s
    if age_s < options.gc_grace_s:
        return False, f"unpublished, last written {max(age_s, 0.0):.0f} s ago: a save may be running"
    return True, f"unpublished, last written {age_s:.0f} s ago"


def _removal(attempt: Attempt, reason: str, forgotten: bool) -> Removal:
    return Removal(
        step=attempt.step,
        attempt=attempt.attempt,
        reason=reason,
        keys=attempt.keys,
        nbytes=attempt.nbytes,
        forgotten=forgotten,
    )


def _leftovers(step: StepContents, now_s: float, options: Options, force_unfinished: bool) -> list[str]:
    keys = [
        claim.key
        for claim in step.claims
        if force_unfinished or (claim.modified_s > 0 and now_s - claim.modified_s > options.claim_ttl_s)
    ]
    # `forget` stopped half-way and the step is complete, or there are no data to bring back.
    if step.forgotten and step.forgotten not in {a.attempt for a in step.attempts if a.attempt != step.complete}:
        keys.append(names.forgotten_key(step.step))
    return keys


def _act(store: Store, plan: GcPlan, found: list[StepContents], sweep_age_s: float) -> GcReport:
    nbytes = num_objects = 0
    spared: list[str] = []
    for removal in plan.removals:
        if _remove(store, removal):
            nbytes += removal.nbytes
            num_objects += len(removal.keys)
        else:
            spared.append(removal.attempt)
    store.delete(plan.leftovers)
    num_swept = sum(store.sweep(f"{names.step_folder(step.step)}/", older_than_s=sweep_age_s) for step in found)
    return GcReport(
        plan=plan,
        dry_run=False,
        nbytes=nbytes,
        num_objects=num_objects,
        num_swept=num_swept,
        spared=tuple(spared),
    )


def _remove(store: Store, removal: Removal) -> bool:
    """Steps 1 to 5 of the module's text; False when the attempt is published after all."""
    mark_aborted(store, removal.step, removal.attempt, f"removed by gc: {removal.reason}")
    failpoints.hit("gc.after-verdict")
    try:
        published = published_attempt(store, removal.step) == removal.attempt
    except DamagedError:
        published = True  # not known whose it is
    mark = names.aborted_key(removal.step, removal.attempt)
    if published:
        store.delete([mark])
        return False
    if removal.forgotten:
        store.delete([names.forgotten_key(removal.step)])
    keys = [key for key in removal.keys if key != mark]
    for start in range(0, len(keys), _DELETE_AT_ONCE):
        store.delete(keys[start : start + _DELETE_AT_ONCE])
        failpoints.hit("gc.between-deletes")
    store.delete([mark])
    return True


def _store_time_s(store: Store) -> float:
    """The time by the store's own clock: that of an object written this moment. 0.0 where it has none.

    Taken before the attempts are listed, so that an age is never too big. A marker that another gc took away counts as
    no clock, and then nothing is old.
    """
    key = f"{_MARKERS}{secrets.token_hex(8)}"
    store.put(key, b"")
    entries = store.list(_MARKERS)
    store.delete([entry.key for entry in entries])  # ours, and those of runs that died here
    return max((entry.modified_s for entry in entries if entry.key == key), default=0.0)
