"""Which checkpoints to keep, and how one is forgotten and brought back.

In: small records of the complete steps, and a policy. Out: a verdict with its reason for every step. The policy is
pure; only `forget` and `unforget` touch the store, and neither touches data: that is gc's, later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.publish import abort_reason, attempt_of
from ckpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from ckpt.store.base import Store


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a policy may look at: from the manifest of a complete step, and from nothing else."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules that keep; a step that no rule keeps goes. The newest step is always kept."""

    last: int | None = None  # the newest so many
    every: int | None = None  # steps divisible by this
    best: int | None = None  # so many with the best `metric`
    metric: str | None = None
    mode: Literal["min", "max"] = "min"  # what is best
    steps: tuple[int, ...] = ()  # these in any case

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"retention rule `{name}` must be at least 1, found {value}")
        if (self.best is None) != (self.metric is None):
            raise InvalidInputError("retention by `best` needs the name of a `metric`, and the other way round")
        if self.last is None and self.every is None and self.best is None and not self.steps:
            raise InvalidInputError("a retention policy without a rule would keep nothing but the newest step")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens to one step, and why."""

    step: int
    keep: bool
    reason: str


def decide(records: Iterable[StepRecord], policy: Policy, pinned: Mapping[int, str] | None = None) -> list[Verdict]:
    """One verdict per step, ascending. Pure. The reason is the first rule that keeps it, before that a pin (pins.py)."""
    ordered = sorted(records, key=lambda record: record.step)
    reasons: dict[int, str] = dict(pinned or {})
    for step, reason in _kept(ordered, policy):
        reasons.setdefault(step, reason)
    return [
        Verdict(step=record.step, keep=record.step in reasons, reason=reasons.get(record.step, "no rule keeps it"))
        for record in ordered
    ]


def forget(store: Store, steps: Sequence[int]) -> None:
    """Make complete steps invisible, so that `gc` may remove them. NotFoundError when one is not complete.

    1. forgotten.json, a copy of the manifest, is durable
    2. the manifest is gone: the step is forgotten

    A crash between the two leaves the step complete, and gc takes the copy away.
    """
    for step in steps:
        try:
            manifest = store.read(names.manifest_key(step))
        except NotFoundError:
            raise NotFoundError(f"no complete checkpoint of step {step} in {store.url} to forget") from None
        store.put(names.forgotten_key(step), manifest)
        failpoints.hit("forget.after-record")
        store.delete([names.manifest_key(step)])
        failpoints.hit("forget.after-manifest")


def unforget(store: Store, step: int) -> None:
    """Bring a forgotten step back, as long as gc has not begun with it.

    The manifest is created first and the traces of gc are looked at afterwards, while gc sets its mark first and looks
    for the manifest afterwards: one of the two always gives way. A gc that is already through has taken forgotten.json
    away.
    """
    try:
        manifest = store.read(names.forgotten_key(step))
    except NotFoundError:
        raise NotFoundError(f"step {step} in {store.url} is not forgotten, or already removed") from None
    try:
        store.create(names.manifest_key(step), manifest)
    except AlreadyExistsError:
        text = f"step {step} in {store.url} was saved again meanwhile"
        raise AlreadyExistsError(text) from None
    marked = abort_reason(store, step, attempt_of(manifest)) is not None
    if marked or not store.exists(names.forgotten_key(step)):
        store.delete([names.manifest_key(step)])
        raise NotFoundError(f"the data of step {step} in {store.url} are being removed")
    store.delete([names.forgotten_key(step)])


def _kept(ordered: Sequence[StepRecord], policy: Policy) -> Iterable[tuple[int, str]]:
    """(step, reason) of every step that a rule keeps, rule by rule."""
    if ordered:
        yield ordered[-1].step, "the newest"
    for record in ordered:
        if record.step in policy.steps:
            yield record.step, "named"
    if policy.last is not None:
        for record in ordered[-policy.last :]:
            yield record.step, f"one of the last {policy.last}"
    if policy.every is not None:
        for record in ordered:
            if record.step % policy.every == 0:
                yield record.step, f"every {policy.every}"
    if policy.best is not None and policy.metric is not None:
        for place, record in enumerate(_best(ordered, policy.metric, policy.mode, policy.best), start=1):
            yield record.step, f"number {place} of {policy.best} by {policy.metric}"


def _best(ordered: Sequence[StepRecord], metric: str, mode: str, count: int) -> list[StepRecord]:
    """Best first; of equals the newer. Steps without the metric, or with NaN, are never the best."""
    sign = 1.0 if mode == "min" else -1.0
    valued = [record for record in ordered if not math.isnan(record.metrics.get(metric, math.nan))]
    return sorted(valued, key=lambda record: (sign * record.metrics[metric], -record.step))[:count]
