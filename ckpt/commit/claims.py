"""The weaker rule: who may publish a step on a store that cannot create an object only if it is absent.

In: a store without conditional writes. Out: permission for at most one attempt, or AlreadyExistsError. Never publishes.

    a. put the own claim
    b. list all claims
    c. another live claim, or a manifest: remove the own claim and give up
    d. go on, unless a-c and what follows took longer than half a claim's life

At most one attempt goes on. Say A and B both did. A listed without seeing B, so A's list came before B's put; B listed
without seeing A, so B's list came before A's put. With each one's put before its own list that gives put A < list A <
put B < list B < put A, a contradiction. (The store must show a finished put in the next list, as S3 and all its heirs
promise.) Both may give up; then nothing is published and the save says so.

A claim dies when its attempt is marked as aborted, or when it is older than `claim_ttl_s` by the store's own clock: the
age is the difference to the time stamp of the own claim in the same listing. What stays open is a committer that sleeps
for longer than half a claim's life between its last look and its put; that is why the rule is called the weaker one.
"""

from __future__ import annotations

import contextlib
import json

from ckpt.commit import names
from ckpt.commit.waiting import Clock
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, StoreError
from ckpt.store.base import Entry, Store


class Claim:
    """The right to publish `attempt` as `step`. Made, checked and released by one thread of the committer."""

    def __init__(self, store: Store, step: int, attempt: str, *, options: Options, clock: Clock) -> None:
        self._store = store
        self._step = step
        self._attempt = attempt
        self._ttl_s = options.claim_ttl_s
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self._key = names.claim_key(step, attempt)

    def take(self) -> None:
        """Steps a to c. AlreadyExistsError (`held`) names the other attempt."""
        self._store.put(self._key, json.dumps({"attempt": self._attempt}).encode())
        rival = self._live_rival()
        if rival is not None:
            self.release()
            raise AlreadyExistsError(
                f"step {self._step} in {self._store.url} is being published by attempt {rival}",
                kind="held",
                hints=(
                    f"if that writer is dead, try again in {self._ttl_s:.0f} s, or run `ckpt gc --force-unfinished`",
                ),
            )
        if self._store.exists(names.manifest_key(self._step)):
            self.release()
            raise AlreadyExistsError(f"step {self._step} in {self._store.url} exists already")

    def check_fresh(self) -> None:
        """Step d, right before the manifest is put."""
        age_s = self._clock.monotonic_s() - self._start_s
        if age_s > self._ttl_s / 2:
            self.release()
            raise StoreError(
                f"the claim on step {self._step} took {age_s:.0f} s of {self._ttl_s:.0f} s, too long to publish safely",
                kind="claim-stale",
                hints=("raise `claim_ttl_s`, or use a store with conditional writes",),
            )

    def release(self) -> None:
        """Remove the own claim. One that stays behind dies of age, so a refusal here is no failure of the save."""
        with contextlib.suppress(StoreError):
            self._store.delete([self._key])

    def _live_rival(self) -> str | None:
        prefix = names.claims_prefix(self._step)
        entries = self._store.list(prefix)
        own = [entry for entry in entries if entry.key == self._key]
        now_s = own[0].modified_s if own else 0.0
        for entry in entries:
            attempt = names.parse_claim(entry.key.removeprefix(prefix))
            if entry.key != self._key and attempt is not None and self._is_live(entry, attempt, now_s):
                return attempt
        return None

    def _is_live(self, entry: Entry, attempt: str, now_s: float) -> bool:
        dated = now_s > 0 and entry.modified_s > 0
        if dated and now_s - entry.modified_s > self._ttl_s:
            return False
        return not self._store.exists(names.aborted_key(self._step, attempt))
