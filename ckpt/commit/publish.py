"""Make one attempt the checkpoint of its step, once, or make sure that it never will be.

In: a store, and a manifest made elsewhere (JSON with at least `attempt`). Out: the manifest in place, or an error that
says what is known. Never touches data, never replaces a manifest, never says "failed" about what may have landed.

The save, in durable order (docs/explanation/commit.md has the reasons, tests/commit one crash test for each number):

    1. each rank       its image is durable under the attempt id
    2. each rank       its receipt is durable                                  leave_receipt
    3. the committer   has all receipts of one attempt, and they agree         collect_receipts
    4. the committer   the index is durable under the attempt id
    5. the committer   nobody else has the step: no manifest, no abort, the
                       images that it refers to stay (references.py), and on
                       a store without conditional writes a claim              publish
    6. the committer   the manifest is created once: THE COMMIT POINT          publish
    7. the other ranks see the manifest, or the abort, or their deadline       await_outcome
"""

from __future__ import annotations

import contextlib
import json

from ckpt import failpoints
from ckpt.commit import names, references
from ckpt.commit.claims import Claim
from ckpt.commit.receipts import read_record
from ckpt.commit.waiting import SYSTEM_CLOCK, Clock, looks
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, DamagedError, NotFoundError, RankFailedError, StoreError
from ckpt.store.base import Store


def refuse_existing(store: Store, step: int) -> None:
    """AlreadyExistsError when `step` is complete. Call it before anything is written."""
    if store.exists(names.manifest_key(step)):
        raise _exists_error(store, step)


def publish(
    store: Store, step: int, attempt: str, manifest: bytes, *, options: Options, clock: Clock = SYSTEM_CLOCK
) -> None:
    """Steps 5 and 6: create the manifest of `step`. The committer only, once, when 1 to 4 are done.

    Raises:
        AlreadyExistsError: another attempt has the step, or (`held`) is about to. Nothing was published.
        RankFailedError: `aborted`: this attempt was marked as dead, by `gc` for instance; `base-removed`: an image of an
            earlier attempt that it refers to is gone or about to go. Nothing was published.
        StoreError: nothing was published, except for the kind `outcome-unknown`: the store went away between the
            question and the answer. Do not `abort` then; the next look at the step tells.
    """
    if attempt_of(manifest) != attempt:
        raise AssertionError("the manifest names another attempt")
    names.attempt_folder(step, attempt)
    _refuse_aborted(store, step, attempt)
    if refuse_existing_other(store, step, attempt):
        return
    references.pin(store, step, attempt, manifest)
    if store.conditional_create:
        failpoints.hit("commit.before-manifest")
        _create(store, step, attempt, manifest)
    else:
        _put_under_claim(store, step, attempt, manifest, Claim(store, step, attempt, options=options, clock=clock))
    failpoints.hit("commit.after-manifest")
    _withdraw_if_aborted(store, step, attempt)
    references.unpin(store, step, attempt, manifest)


def abort(store: Store, step: int, attempt: str, reason: str) -> None:
    """Say that `attempt` will never be published, so that the other ranks need not wait and `gc` may have the data.

    The committer only, and never after `outcome-unknown`. AlreadyExistsError when the attempt is published after all.
    """
    failpoints.hit("commit.before-abort")
    if published_attempt(store, step) == attempt:
        raise AlreadyExistsError(f"step {step} in {store.url} is complete, it cannot be aborted")
    mark_aborted(store, step, attempt, reason)


def await_outcome(
    store: Store, step: int, attempt: str, *, timeout_s: float, options: Options, clock: Clock = SYSTEM_CLOCK
) -> None:
    """Step 7: return when `attempt` is the checkpoint of `step`. Ranks other than the committer; any may call it.

    Raises:
        AlreadyExistsError: another attempt is the checkpoint of this step.
        RankFailedError: `aborted` with the committer's reason; `outcome-unknown` after `timeout_s`.
    """
    trouble = ""
    for _ in looks(timeout_s, options=options, clock=clock):
        try:
            winner = published_attempt(store, step)
            if winner is not None and winner != attempt:
                raise _exists_error(store, step)
            _refuse_aborted(store, step, attempt)
        except StoreError as error:  # one look that failed says nothing of the outcome, which all ranks must agree on
            trouble = f"; the last look failed: {error.message}"
            continue
        trouble = ""
        if winner == attempt:
            return
    raise RankFailedError(
        f"no outcome of step {step} (attempt {attempt}) after {timeout_s:.1f} s: the committer is missing{trouble}",
        kind="outcome-unknown",
        hints=(f"`ckpt ls {store.url}` shows whether step {step} is complete; the step before it is untouched",),
    )


def attempt_of(manifest: bytes) -> str:
    """The attempt that a manifest names."""
    attempt = read_record(manifest).get("attempt")
    if not isinstance(attempt, str) or not names.is_attempt(attempt):
        raise DamagedError("not a manifest: it names no attempt", kind="bad-manifest")
    return attempt


def published_attempt(store: Store, step: int) -> str | None:
    """The attempt that is the checkpoint of `step`, None when there is none."""
    try:
        return attempt_of(store.read(names.manifest_key(step)))
    except NotFoundError:
        return None


def mark_aborted(store: Store, step: int, attempt: str, reason: str) -> None:
    """Leave `aborted.json`, once; a second one, with whatever reason, changes nothing."""
    with contextlib.suppress(AlreadyExistsError):
        store.create(names.aborted_key(step, attempt), json.dumps({"attempt": attempt, "reason": reason}).encode())


def abort_reason(store: Store, step: int, attempt: str) -> str | None:
    """Why `attempt` is aborted; None when it is not."""
    try:
        record = read_record(store.read(names.aborted_key(step, attempt)))
    except NotFoundError:
        return None
    return str(record.get("reason", "no reason given"))


def refuse_existing_other(store: Store, step: int, attempt: str) -> bool:
    """AlreadyExistsError when another attempt is the checkpoint of `step`; else whether this one is already."""
    winner = published_attempt(store, step)
    if winner is not None and winner != attempt:
        raise _exists_error(store, step)
    return winner == attempt


def _create(store: Store, step: int, attempt: str, manifest: bytes) -> None:
    """Step 6 with conditional writes. `Store.create` has read back after a refusal; a lost answer is resolved here."""
    try:
        store.create(names.manifest_key(step), manifest)
    except AlreadyExistsError:
        raise _exists_error(store, step) from None
    except StoreError as error:
        _resolve_lost_answer(store, step, attempt, error)


def _put_under_claim(store: Store, step: int, attempt: str, manifest: bytes, claim: Claim) -> None:
    """Steps 5 and 6 without conditional writes (ckpt/commit/claims.py)."""
    claim.take()
    failpoints.hit("commit.after-claim")
    claim.check_fresh()
    failpoints.hit("commit.before-manifest")
    try:
        store.put(names.manifest_key(step), manifest)
    except StoreError as error:
        if error.kind != "unreachable":
            claim.release()
        _resolve_lost_answer(store, step, attempt, error)
    try:
        landed = refuse_existing_other(store, step, attempt)
    except StoreError as error:
        raise _unknown_error(step, error.message) from error
    if not landed:
        raise _unknown_error(step, "the manifest was written and then not found")
    claim.release()


def _resolve_lost_answer(store: Store, step: int, attempt: str, error: StoreError) -> None:
    """Return when the manifest is ours in spite of `error`; raise what is known when not."""
    if error.kind not in ("unreachable", "io"):
        raise error  # refused
    unknown = _unknown_error(step, error.message)
    try:
        winner = published_attempt(store, step)
    except StoreError:
        raise unknown from error
    if winner is not None and winner != attempt:
        raise _exists_error(store, step) from error
    if error.kind == "io":
        # A failed sync: what shows may not survive a power failure, so it is no success either.
        raise (error if winner is None else unknown) from error
    if winner is None:
        raise unknown from error  # a request that is still on its way may land yet


def _refuse_aborted(store: Store, step: int, attempt: str) -> None:
    reason = abort_reason(store, step, attempt)
    if reason is not None:
        raise RankFailedError(f"step {step} was aborted: {reason}", kind="aborted")


def _withdraw_if_aborted(store: Store, step: int, attempt: str) -> None:
    """Fence a committer that slept past gc's grace time.

    gc marks an attempt as aborted and then looks for its manifest; we create the manifest and then look for the mark.
    So at least one of the two sees the other: gc keeps the data, or we take back a manifest whose data may be gone.
    """
    try:
        reason = abort_reason(store, step, attempt)
    except StoreError as error:
        raise _unknown_error(step, error.message) from error
    if reason is not None:
        store.delete([names.manifest_key(step)])
        raise RankFailedError(f"step {step} was aborted while it was being published: {reason}", kind="aborted")


def _unknown_error(step: int, reason: str) -> StoreError:
    return StoreError(
        f"the store failed while step {step} was being published: it may be complete or not ({reason})",
        kind="outcome-unknown",
        hints=(f"`ckpt ls` shows whether step {step} is complete; the step before it is untouched",),
    )


def _exists_error(store: Store, step: int) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"step {step} in {store.url} exists already",
        hints=(f"save another step, or `ckpt forget {store.url}@{step}` first",),
    )
