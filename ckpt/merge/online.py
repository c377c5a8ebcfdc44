"""Keep an average of a run up to date while its checkpoints land.

In: a run, a rule (`OnlineAverage`). Out: averages, each an ordinary checkpoint of the run `into`, and sums to go on from in its
folder `sums`: checkpoints too, in fp64, one per version, whose metadata say what is in them. A version is written anew for every
checkpoint that is added and published last, so a killed update leaves the one before, and what is in it is never added again.
Two updaters of one average do not disturb each other: the second finds that the version exists, and looks again.

A plain sum in fp64, divided once when an average is written: the same bits as a merge of all these checkpoints at once, as long
as the sums are exact or made in the same order. Running statistics of batch normalisation come from the newest checkpoint
(a window pools them): sums of pooled variances could not go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckpt.commit import find, names, pins, retention
from ckpt.commit.gc import collect_garbage
from ckpt.commit.pins import Pin
from ckpt.config import OnlineAverage, Options
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, NotFoundError, first_line
from ckpt.format import manifest
from ckpt.merge import recipe as recipes
from ckpt.merge.applied import KEY, Checkpoints, Update, Version, is_of, next_update, rule_of, version_of, wanted
from ckpt.merge.run import begin, carry_out, planned
from ckpt.merge.sources import OpenStore
from ckpt.store.base import Store

SUMS = "sums"  # folder in the run of the averages
VERSIONS_KEPT = 2
RETRIES = 3  # of an update that another updater was ahead of
_PIN_CHARS_MAX = 60
# Errors of the checkpoint that was to be added, which will not change: it is left out.
_OF_THE_CHECKPOINT = ("not-finite", "no-checkpoint", "mismatch", "cannot-merge", "nothing-to-merge", "not-the-same")


@dataclass(frozen=True, kw_only=True)
class Told:
    """One thing that happened."""

    kind: str  # added, published, rolled-back, late, skipped, or failed
    step: int  # of the run
    text: str
    applied: int = 0  # checkpoints in the average after it


class Tell(Protocol):
    """Takes what happens, as it does."""

    def __call__(self, told: Told) -> None: ...


class Updater:
    """Brings one average up to date. One owner thread; `close` may be called twice."""

    def __init__(self, url: str, rule: OnlineAverage, options: Options, open_at: OpenStore) -> None:
        self._url, self._rule, self._options, self._open_at = url, rule, options, open_at
        self._sums_url = f"{rule.into.rstrip('/')}/{SUMS}"
        recipes.from_document(self._document([url], step=0))  # a rule or dtype that cannot be is refused at once
        self._run, self._into, self._sums = open_at(url), open_at(rule.into), open_at(self._sums_url)
        if self._run.url.rstrip("/") == self._into.url.rstrip("/"):
            self.close()
            raise InvalidInputError("averages go into a run of their own: `into` names the run itself", kind="same-run")
        self._bad: set[tuple[int, str]] = set()

    def close(self) -> None:
        """Let go of the stores."""
        for store in (self._run, self._into, self._sums):
            store.close()

    def pin(self) -> None:
        """Tell retention what this average still needs. One small object, written when it changes."""
        newest = max((version.newest for version in self._versions(self._sums)), default=None)
        pin = pin_rule(self._rule, newest)
        if pin not in pins.read(self._run):
            pins.put(self._run, pin)

    def catch_up(self, tell: Tell) -> None:
        """Add all checkpoints that are complete and not in the average, and publish. Failures of one checkpoint are told; a store
        that fails raises StoreError: what is done stays."""
        complete = self._complete()
        self._forget_others(complete, tell)
        if self._rule.method == "window":
            self._windows(complete, tell)
        else:
            self._running(complete, tell)
        self.pin()

    # sums that go on

    def _running(self, complete: Checkpoints, tell: Tell) -> None:
        tries = 0
        told_late: set[int] = set()
        while True:
            versions = self._versions(self._sums)
            update = next_update(self._rule, versions, complete, self._known_bad(versions))
            for step in sorted(set(update.late) - told_late):
                told_late.add(step)
                tell(Told(kind="late", step=step, text=f"step {step} came too late to be in the average"))
            if not update.add:
                if update.base is not None:
                    self._publish(update.base, tell)
                return
            try:
                version = self._add(update, versions, complete)
            except AlreadyExistsError:
                tries += 1
                if tries > RETRIES:
                    raise
                continue
            except CheckpointError as error:
                if error.kind not in _OF_THE_CHECKPOINT:
                    raise
                self._bad.add((update.add[0], complete[update.add[0]]))
                tell(
                    Told(
                        kind="skipped",
                        step=update.add[0],
                        text=f"step {update.add[0]} is left out: {first_line(error)}",
                    )
                )
                continue
            tell(
                Told(kind="added", step=update.add[0], text=f"step {update.add[0]} added", applied=len(version.applied))
            )
            self._tidy(self._sums, VERSIONS_KEPT)
            self.pin()
            self._publish(version, tell)

    def _known_bad(self, versions: Sequence[Version]) -> frozenset[tuple[int, str]]:
        return frozenset(self._bad.union(*(version.skipped for version in versions)))

    def _add(self, update: Update, versions: Sequence[Version], complete: Checkpoints) -> Version:
        """One more checkpoint in the sums, as a new version."""
        step, base = update.add[0], update.base
        number = max((version.number for version in versions), default=0) + 1
        late = base is not None and step < base.newest
        sources: list[Any] = [{"run": self._url, "steps": step, "anchor": not late}]
        own, weights = 1.0, [1.0]
        if base is not None:
            kept, own = self._weights(base, step)
            sources.append({"run": self._sums_url, "steps": base.number, "anchor": late})
            weights = [own, kept]
        version = Version(
            number=number,
            applied=(*(base.applied if base is not None else ()), (step, complete[step])),
            total=1.0 if self._rule.method == "ema" else (base.total if base is not None else 0.0) + 1.0,
            rule=rule_of(self._rule),
            skipped=tuple(sorted(self._bad)),
        )
        document = self._document(sources, step=number, weights=weights, dtype="float64")
        self._merge(document, self._sums, {KEY: version.record()})
        return version

    def _weights(self, base: Version, step: int) -> tuple[float, float]:
        """What the sums, and a new checkpoint, are multiplied by."""
        if self._rule.method == "uniform":
            return 1.0, 1.0
        decay = self._rule.decay
        if decay is None:
            assert self._rule.half_life is not None
            decay = 0.5 ** ((step - base.newest) / self._rule.half_life)
        return decay, 1.0 - decay

    def _publish(self, version: Version, tell: Tell) -> None:
        """The average that a version of the sums stands for, under the step of its newest checkpoint, when it is time."""
        before = max(self._versions(self._into), key=lambda one: one.number, default=None)
        if len(version.applied) - (len(before.applied) if before is not None else 0) < self._rule.publish_every:
            return
        sources = [
            {"run": self._sums_url, "steps": version.number},
            {"run": self._url, "steps": version.newest, "anchor": True},  # dtypes, and what is not combined
        ]
        document = self._document(sources, step=version.newest, weights=[1.0, 0.0], divisor=version.total)
        self._write(document, version, tell)

    # windows

    def _windows(self, complete: Checkpoints, tell: Tell) -> None:
        """The mean of the newest checkpoints, out of these themselves."""
        members = wanted(self._rule, complete)[-self._rule.last :]
        if not members:
            return
        version = Version(
            number=members[-1],
            applied=tuple((step, complete[step]) for step in members),
            total=float(len(members)),
            rule=rule_of(self._rule),
        )
        there = {one.number: one for one in self._versions(self._into)}
        newest = max(there, default=-1)
        news = [step for step in members if step > newest]
        if version.number in there or len(news) < min(self._rule.publish_every, len(members)):
            return
        document = self._document(
            [{"run": self._url, "steps": members}], step=members[-1], weights=[1.0] * len(members)
        )
        document["combine"] = {"method": "uniform"}
        document["state"] = {}
        self._write(document, version, tell)

    # both

    def _write(self, document: dict[str, Any], version: Version, tell: Tell) -> None:
        step = version.newest
        if self._rule.dtype is not None:
            document["numerics"] = {"dtype": self._rule.dtype}
        try:
            self._merge(document, self._into, {KEY: version.record()})
        except AlreadyExistsError:
            return  # published before a crash, or by another updater; or, with a late checkpoint, the one before it
        except NotFoundError as error:
            tell(Told(kind="failed", step=step, text=f"the average of step {step} is not written: {first_line(error)}"))
            return
        tell(
            Told(
                kind="published",
                step=step,
                text=f"the average is step {step} of {self._into.url}",
                applied=len(version.applied),
            )
        )
        if self._rule.keep_last is not None:
            self._tidy(self._into, self._rule.keep_last)

    def _merge(self, document: Mapping[str, Any], into: Store, metadata: Mapping[str, Any]) -> None:
        recipe = recipes.from_document(document, "the average")
        with planned(recipe, self._options, self._open_at) as plan:
            job = begin(plan, into, self._options)
            job.metadata = metadata
            carry_out(job)

    def _document(
        self,
        sources: Sequence[Any],
        *,
        step: int,
        weights: Sequence[float] = (1.0,),
        divisor: float | None = None,
        dtype: str | None = None,
    ) -> dict[str, Any]:
        """A merge recipe. Sums carry everything along that an average needs."""
        return {
            "recipe": 1,
            "sources": list(sources),
            "combine": {"method": "weights", "weights": list(weights), "normalize": False, "divisor": divisor},
            "rules": [dict(rule) for rule in self._rule.rules],
            "state": {"batch_norm": "newest"},
            "numerics": {"dtype": dtype or self._rule.dtype or "source"},
            "limits": {"memory": self._rule.memory},
            "output": {"step": step},
        }

    def _complete(self) -> dict[int, str]:
        """The run as it is. A checkpoint that goes while one looks is not there."""
        out: dict[int, str] = {}
        for step in find.steps(self._run):
            with contextlib.suppress(NotFoundError):
                key = names.manifest_key(step)
                out[step] = manifest.unpack(self._run.read(key), name=key).fragments.digest
        return out

    def _versions(self, store: Store) -> list[Version]:
        return list(_versions(store))

    def _forget_others(self, complete: Checkpoints, tell: Tell) -> None:
        """Drop averages of checkpoints that this run no longer has: it was rolled back, or saved anew."""
        for store in (self._sums, self._into):
            versions = self._versions(store)
            if any(version.rule != rule_of(self._rule) for version in versions):
                raise InvalidInputError(
                    f"{self._into.url} holds averages of another rule, which this one would not go on from",
                    kind="other-rule",
                    hints=("choose another `into`, or the rule that these were made by",),
                )
            gone = [version for version in versions if not is_of(version, self._rule, complete)]
            if gone and complete:
                retention.forget(store, [version.number for version in gone])
                collect_garbage(store, options=self._options)
            for version in gone if store is self._into and complete else []:
                text = f"the average of step {version.number} is dropped: the run no longer has what is in it"
                tell(Told(kind="rolled-back", step=version.number, text=text))

    def _tidy(self, store: Store, keep: int) -> None:
        old = sorted(version.number for version in self._versions(store))[:-keep]
        if old:
            retention.forget(store, old)
            collect_garbage(store, options=self._options)


def _versions(store: Store) -> Iterator[Version]:
    for step in find.steps(store):
        key = names.manifest_key(step)
        with contextlib.suppress(NotFoundError):
            found = version_of(step, manifest.unpack(store.read(key), name=key).metadata.get(KEY))
            if found is not None:
                yield found


def pin_name(rule: OnlineAverage) -> str:
    """One pin per place that averages go to."""
    safe = "".join(c if c.isalnum() and c.isascii() or c in "._-" else "-" for c in rule.into.rstrip("/"))
    return f"average-{safe[-_PIN_CHARS_MAX:]}"


def pin_rule(rule: OnlineAverage, newest: int | None) -> Pin:
    """What an average needs of its run: the members of a window; else what is not in it yet.

    Args:
        newest: the newest step that is in the sums; None before the first.
    """
    name, why = pin_name(rule), f"the average in {rule.into}"
    if rule.method == "window":
        return Pin(name=name, why=why, last=rule.last, every=rule.every)
    after = rule.first_step - 1 if newest is None else newest
    return Pin(name=name, why=why, last=rule.backlog_max, after=after if after >= 0 else None, every=rule.every)
