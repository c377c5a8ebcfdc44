"""Which checkpoints a run holds.

In: a store. Out: complete steps, and the attempts that are not (yet, or any more). Never calls anything a checkpoint
that has no manifest, never fails over what is not ours: foreign files and folders are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ckpt.commit import names, references
from ckpt.commit.publish import attempt_of
from ckpt.errors import DamagedError, InvalidInputError, NotFoundError, VersionError
from ckpt.store.base import Entry, Store

State = Literal["complete", "unpublished", "aborted", "forgotten"]
_LOOKS_AT_ONCE = 8
_LISTED_STEPS_MAX = 20  # in one message


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a step, with what lies there."""

    step: int
    attempt: str
    state: State
    keys: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes of each key
    nbytes: int
    modified_s: float  # newest object, seconds since the epoch by the store's clock; 0.0 where it has none
    pinned: frozenset[str]  # images of other attempts that it is going to refer to, while it is not published


@dataclass(frozen=True, kw_only=True)
class StepContents:
    """All that lies in one step folder."""

    step: int
    attempts: tuple[Attempt, ...]  # sorted by id
    claims: tuple[Entry, ...]
    complete: str | None  # the attempt that the manifest names; "" when the manifest cannot be read
    forgotten: str | None  # the attempt that forgotten.json names; "" when it cannot be read
    foreign: tuple[str, ...]  # keys that are none of ours
    needed: frozenset[str] | None  # images of other attempts that the manifest refers to; None: it cannot be read
    forgotten_needed: frozenset[str] | None  # the same of forgotten.json


def steps(store: Store) -> list[int]:
    """Complete steps, ascending."""
    candidates = _step_folders(store)
    if len(candidates) <= 1:
        return [step for step in candidates if store.exists(names.manifest_key(step))]
    with ThreadPoolExecutor(_LOOKS_AT_ONCE, thread_name_prefix="ckpt-find") as pool:
        present = list(pool.map(lambda step: store.exists(names.manifest_key(step)), candidates))
    return [step for step, there in zip(candidates, present, strict=True) if there]


def latest(store: Store, *, below: int | None = None) -> int | None:
    """The newest complete step (before `below`), None when there is none. Looks from the newest backwards."""
    for step in reversed(_step_folders(store)):
        if (below is None or step < below) and store.exists(names.manifest_key(step)):
            return step
    return None


def resolve(store: Store, step: int | Literal["latest"]) -> int:
    """The step that the user means, if it is complete.

    Raises:
        NotFoundError: `no-run` when there is no step folder at all, `no-checkpoint` with the steps that there are.
    """
    if step == "latest":
        found = latest(store)
        if found is not None:
            return found
    elif isinstance(step, bool) or not isinstance(step, int):
        raise InvalidInputError(f'a step is a number or "latest", found {step!r}')
    elif store.exists(names.manifest_key(step)):
        return step
    raise _not_found(store, step)


def contents(store: Store, step: int) -> StepContents:
    """Everything in the folder of `step`, sorted into what it is. One listing."""
    prefix = names.step_folder(step) + "/"
    by_attempt: dict[str, list[Entry]] = {}
    claims, foreign = [], []
    present: set[str] = set()
    for entry in store.list(prefix):
        first, _, rest = entry.key.removeprefix(prefix).partition("/")
        if rest and names.is_attempt(first):
            by_attempt.setdefault(first, []).append(entry)
        elif rest and first == "claims" and names.parse_claim(rest) is not None:
            claims.append(entry)
        elif not rest and first in (names.MANIFEST, names.FORGOTTEN):
            present.add(first)
        else:
            foreign.append(entry.key)
    nothing: tuple[str | None, frozenset[str] | None] = (None, frozenset())
    complete, needed = _said_by(store, names.manifest_key(step)) if names.MANIFEST in present else nothing
    forgotten, forgotten_needed = _said_by(store, names.forgotten_key(step)) if names.FORGOTTEN in present else nothing
    found = [_attempt(store, step, name, entries, complete, forgotten) for name, entries in sorted(by_attempt.items())]
    return StepContents(
        step=step,
        attempts=tuple(found),
        claims=tuple(claims),
        complete=complete,
        forgotten=forgotten,
        foreign=tuple(foreign),
        needed=needed,
        forgotten_needed=forgotten_needed,
    )


def attempts(store: Store) -> list[Attempt]:
    """Every attempt at every step, by step and id; for `ckpt ls --all` and `gc`."""
    return [attempt for step in _step_folders(store) for attempt in contents(store, step).attempts]


def step_folders(store: Store) -> list[int]:
    """Every step that has a folder, complete or not, ascending."""
    return _step_folders(store)


def _step_folders(store: Store) -> list[int]:
    parsed = (names.parse_step_folder(name) for name in store.list_folders(""))
    return sorted(step for step in parsed if step is not None)


def _said_by(store: Store, key: str) -> tuple[str | None, frozenset[str] | None]:
    """The attempt that a manifest names and the images of others that it needs.

    "" and None when that is damaged or newer: then nothing of the step, and no image of another one, is anybody's to delete.
    """
    try:
        data = store.read(key)
    except NotFoundError:
        return None, frozenset()
    try:
        attempt = attempt_of(data)
    except DamagedError:
        return "", None
    try:
        return attempt, frozenset(references.needed_by(data, name=key))
    except (DamagedError, VersionError):
        return attempt, None


def _attempt(
    store: Store, step: int, name: str, entries: Sequence[Entry], complete: str | None, forgotten: str | None
) -> Attempt:
    keys = tuple(entry.key for entry in entries)
    state: State = "unpublished"
    if name == complete:
        state = "complete"
    elif names.aborted_key(step, name) in keys:
        state = "aborted"
    elif name == forgotten:
        state = "forgotten"
    will_refer = state == "unpublished" and names.pins_key(step, name) in keys
    return Attempt(
        step=step,
        attempt=name,
        state=state,
        keys=keys,
        sizes=tuple(entry.nbytes for entry in entries),
        nbytes=sum(entry.nbytes for entry in entries),
        modified_s=max(entry.modified_s for entry in entries),
        pinned=_pinned(store, step, name) if will_refer else frozenset(),
    )


def _pinned(store: Store, step: int, attempt: str) -> frozenset[str]:
    try:
        return frozenset(references.pinned(store, step, attempt))
    except DamagedError:  # gc looks again before it removes an image, and then keeps them all
        return frozenset()


def _not_found(store: Store, step: int | str) -> NotFoundError:
    if not _step_folders(store):
        return NotFoundError(
            f"no run at {store.url}: there is no step folder",
            kind="no-run",
            hints=("name the folder that holds the `step-...` folders",),
        )
    there = steps(store)
    shown = ", ".join(str(number) for number in there[-_LISTED_STEPS_MAX:])
    more = f" (and {len(there) - _LISTED_STEPS_MAX} older)" if len(there) > _LISTED_STEPS_MAX else ""
    what = "no complete checkpoint" if step == "latest" else f"no complete checkpoint of step {step}"
    have = f"complete steps: {shown}{more}" if there else "no step is complete"
    return NotFoundError(f"{what} in {store.url}; {have}", kind="no-checkpoint", hints=(f"ckpt ls {store.url}",))
