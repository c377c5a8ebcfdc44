"""Remove what no checkpoint needs: data of forgotten steps and of attempts that were never published.

In: a store. Out: a plan, and, when it is carried out, a report. Never removes an attempt that a manifest names, never
one that may still be written, never a key that is none of ours. Can be stopped anywhere and run again.

Ages are differences of time stamps of the store itself (a marker is written and listed), never of the local clock.

What is dead goes in this order:

    1. `aborted.json` of the attempt is durable: a committer that wakes up late now gives up (publish.py), `unforget` too
    2. the manifest is looked at once more: if it names the attempt, the mark goes and everything else stays
    3. of a forgotten step, `forgotten.json` is deleted: it cannot be brought back any more
    4. when all attempts are through 1 to 3: `removing.json` names the images that are to go: a save that is about to refer
       to one of them now gives up (references.py)
    5. all manifests and pins are looked at once more: an image that one of them needs stays, with the mark of 1
    6. the other objects are deleted
    7. `removing.json`, then, where no image stays, `aborted.json` is deleted, last, so that a crash in between leaves the mark
       for the next run

That 3 is done for all before 6 for any keeps `unforget` from bringing a step back whose references are gone.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt import failpoints
from ckpt.commit import names, pins, references
from ckpt.commit.find import Attempt, StepContents, contents, step_folders
from ckpt.commit.publish import mark_aborted, published_attempt
from ckpt.config import Options
from ckpt.errors import DamagedError
from ckpt.store.base import Store

_DELETE_AT_ONCE = 64
_LISTED_STEPS_MAX = 8  # in one reason
_MARKERS = ".ckpt-gc/"


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One attempt to remove, and why."""

    step: int
    attempt: str
    reason: str
    keys: tuple[str, ...]  # but those that are needed by others
    sizes: tuple[int, ...]  # bytes of each key
    forgotten: bool  # the step's forgotten.json names this attempt
    holds_images: bool  # some stay, for others

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One attempt without a manifest that stays, or images of one, and why."""

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
    pinned = pins.pinned(store, [step.step for step in found if step.complete or step.forgotten])
    plan = make_plan(found, now_s=now_s, options=options, force_unfinished=force_unfinished, pinned=pinned)
    if dry_run:
        return GcReport(plan=plan, dry_run=True, nbytes=0, num_objects=0, num_swept=0, spared=())
    return _act(store, plan, found, 0.0 if force_unfinished else options.gc_grace_s)


def make_plan(
    found: list[StepContents],
    *,
    now_s: float,
    options: Options,
    force_unfinished: bool = False,
    pinned: Mapping[int, str] | None = None,
) -> GcPlan:
    """Decide. Pure.

    Args:
        now_s: the store's time; 0.0 when it has none, then no attempt is old.
        pinned: forgotten steps whose data stay, and why (pins.py).
    """
    removals: list[Removal] = []
    kept: list[Kept] = []
    leftovers: list[str] = []
    needs = _Needs()
    going: list[tuple[Attempt, str, bool]] = []
    for step in found:
        needs.add_step(step)
        for attempt in step.attempts:
            remove, reason = _judge(step, attempt, now_s, options, force_unfinished)
            if attempt.attempt == step.forgotten and step.step in (pinned or {}):
                remove, reason = False, f"forgotten, but {(pinned or {})[step.step]}"
                needs.add(step.step, step.forgotten_needed or ())
            if remove:
                going.append((attempt, reason, attempt.attempt == step.forgotten))
            elif reason:
                needs.add(step.step, attempt.pinned)
                record = Kept(step=step.step, attempt=attempt.attempt, reason=reason, nbytes=attempt.nbytes)
                kept.append(record)
        leftovers += _leftovers(step, now_s, options, force_unfinished)
    for attempt, reason, forgotten in going:
        removal, held = _split(attempt, reason, forgotten, needs)
        removals += [removal] if removal is not None else []
        kept += [held] if held is not None else []
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


class _Needs:
    """Which images are needed by steps whose attempt did not write them. Filled once, then only asked."""

    def __init__(self) -> None:
        self._steps: dict[str, set[int]] = {}
        self._unreadable: int | None = None  # a step whose manifest does not say what it needs

    def add(self, step: int, keys: Iterable[str]) -> None:
        for key in keys:
            self._steps.setdefault(key, set()).add(step)

    def add_step(self, step: StepContents) -> None:
        """A forgotten step needs nothing: it goes in this very run, unless it cannot be read."""
        if step.needed is None or step.forgotten_needed is None:
            self._unreadable = step.step
        self.add(step.step, step.needed or ())

    def of(self, attempt: Attempt) -> dict[str, set[int]]:
        """The images of an attempt that others need or may need, and the steps that do."""
        images = [key for key in attempt.keys if _is_image(key)]
        if self._unreadable is not None:
            return {key: self._steps.get(key, set()) for key in images}
        return {key: self._steps[key] for key in images if key in self._steps}

    def reason(self, held: Mapping[str, set[int]]) -> str:
        steps = sorted(set().union(*held.values()))
        if not steps:
            return f"the manifest of step {self._unreadable} cannot be read, so it is not known which images it needs"
        shown = ", ".join(str(step) for step in steps[:_LISTED_STEPS_MAX])
        more = f" and {len(steps) - _LISTED_STEPS_MAX} more" if len(steps) > _LISTED_STEPS_MAX else ""
        return f"{len(held)} of its images needed by step{'s' if len(steps) > 1 else ''} {shown}{more}"


def _is_image(key: str) -> bool:
    return key.count("/") == 2 and names.parse_ranked(key.rsplit("/", 1)[1], "safetensors") is not None


def _split(attempt: Attempt, reason: str, forgotten: bool, needs: _Needs) -> tuple[Removal | None, Kept | None]:
    """What of a dead attempt goes, and which of its images stay for others."""
    held = needs.of(attempt)
    sizes = dict(zip(attempt.keys, attempt.sizes, strict=True))
    mark = names.aborted_key(attempt.step, attempt.attempt)
    going = [key for key in attempt.keys if key not in held and not (held and key == mark)]
    removal = Removal(
        step=attempt.step,
        attempt=attempt.attempt,
        reason=reason,
        keys=tuple(going),
        sizes=tuple(sizes[key] for key in going),
        forgotten=forgotten,
        holds_images=bool(held),
    )
    nbytes = sum(sizes[key] for key in held)
    kept = Kept(step=attempt.step, attempt=attempt.attempt, reason=needs.reason(held), nbytes=nbytes) if held else None
    return removal if going or forgotten else None, kept


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
    spared = [removal.attempt for removal in plan.removals if not _condemn(store, removal)]  # 1 to 3
    dead = [removal for removal in plan.removals if removal.attempt not in spared]
    needed = _look_again(store, dead)  # 4, 5
    for removal in dead:
        gone = _delete(store, removal, needed)  # 6, 7
        nbytes += sum(gone)
        num_objects += len(gone)
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


def _condemn(store: Store, removal: Removal) -> bool:
    """Steps 1 to 3 of the module's text; False when the attempt is published after all."""
    mark_aborted(store, removal.step, removal.attempt, f"removed by gc: {removal.reason}")
    failpoints.hit("gc.after-verdict")
    try:
        published = published_attempt(store, removal.step) == removal.attempt
    except DamagedError:
        published = True  # not known whose it is
    if published:
        store.delete([names.aborted_key(removal.step, removal.attempt)])
        return False
    if removal.forgotten:
        store.delete([names.forgotten_key(removal.step)])
    return True


def _look_again(store: Store, dead: Sequence[Removal]) -> set[str]:
    """Steps 4 and 5: keys of the images that stay, because they are needed or because that is not known."""
    images = {removal.attempt: [key for key in removal.keys if _is_image(key)] for removal in dead}
    if not any(images.values()):
        return set()
    for removal in dead:
        if images[removal.attempt]:
            references.mark_removing(store, removal.step, removal.attempt, images[removal.attempt])
    failpoints.hit("gc.after-marks")
    needed = references.needed_in(store, step_folders(store))
    return {key for keys in images.values() for key in keys} if needed is None else needed


def _delete(store: Store, removal: Removal, needed: set[str]) -> list[int]:
    """Steps 6 and 7; sizes of what was deleted."""
    marks = [names.removing_key(removal.step, removal.attempt), names.aborted_key(removal.step, removal.attempt)]
    sizes = dict(zip(removal.keys, removal.sizes, strict=True))
    keys = [key for key in removal.keys if key not in needed and key not in marks]
    for start in range(0, len(keys), _DELETE_AT_ONCE):
        store.delete(keys[start : start + _DELETE_AT_ONCE])
        failpoints.hit("gc.between-deletes")
    store.delete(marks[:1])
    if not removal.holds_images and not needed.intersection(removal.keys):
        store.delete(marks[1:])
    return [sizes[key] for key in keys]


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
