"""Which checkpoints are in an average that is kept up, and which come next: the decisions of online averaging.

In: the complete checkpoints of a run, and the versions of the sums with the checkpoints that are in each. Out: from which version
to go on, and what to add. Pure.

A checkpoint is a step with the digest of its index, so one that was saved anew under its step is another one. A version is of
this run as it is now when everything that is in it is still there, or was retired, and when nothing in it is newer than the run:
else the run was rolled back, and an older version, or a new beginning, is what to go on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.config import OnlineAverage
from ckpt.errors import DamagedError

KEY = "online"  # of a manifest's metadata
VERSION = 1
Checkpoints = Mapping[int, str]  # step -> digest of its index


@dataclass(frozen=True, kw_only=True)
class Version:
    """Sums over some checkpoints, or an average that was published."""

    number: int  # step in the run of the sums, or of the averages
    applied: tuple[tuple[int, str], ...]  # in the order in which they were added
    total: float  # what the weights sum to
    rule: str  # what makes it another average (`rule_of`)
    skipped: tuple[tuple[int, str], ...] = ()  # that could not be added, and were told

    @property
    def steps(self) -> set[int]:
        return {step for step, _ in self.applied}

    @property
    def newest(self) -> int:
        return max(self.steps)

    def record(self) -> dict[str, Any]:
        """As it stands in the metadata."""
        return {
            "version": VERSION,
            "rule": self.rule,
            "applied": [list(one) for one in self.applied],
            "total": self.total,
            "skipped": [list(one) for one in self.skipped],
        }


def version_of(number: int, record: object) -> Version | None:
    """The version that a record says; None where there is none. DamagedError for one that cannot be."""
    if record is None:
        return None
    try:
        assert isinstance(record, dict)
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']}")
        return Version(
            number=number,
            applied=tuple((int(step), str(digest)) for step, digest in record["applied"]),
            total=float(record["total"]),
            rule=str(record["rule"]),
            skipped=tuple((int(step), str(digest)) for step, digest in record["skipped"]),
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise DamagedError(f"the record of an average in step {number} cannot be read: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What to do next."""

    base: Version | None  # to go on from; None: begin anew
    add: tuple[int, ...]  # steps, in this order
    late: tuple[int, ...]  # steps that came too late for an average in which the order matters


def rule_of(rule: OnlineAverage) -> str:
    """What two averages have in common that can go on from each other."""
    parts = [rule.method, rule.half_life, rule.decay, rule.first_step, rule.every, [dict(one) for one in rule.rules]]
    return repr(parts if rule.method != "window" else [*parts, rule.last])


def wanted(rule: OnlineAverage, complete: Checkpoints) -> list[int]:
    """The steps that count, ascending."""
    return sorted(step for step in complete if step >= rule.first_step and step % rule.every == 0)


def is_of(version: Version, rule: OnlineAverage, complete: Checkpoints) -> bool:
    """Whether a version is one of this rule, and of the run as it is."""
    if version.rule != rule_of(rule) or not version.applied or not complete:
        return False
    same = all(complete.get(step, digest) == digest for step, digest in version.applied)
    return same and version.newest <= max(complete)


def next_update(
    rule: OnlineAverage, versions: Sequence[Version], complete: Checkpoints, bad: frozenset[tuple[int, str]]
) -> Update:
    """What to add to which version.

    Args:
        bad: checkpoints that cannot be added (NaN), and were told.
    """
    valid = sorted((v for v in versions if is_of(v, rule, complete)), key=lambda v: -v.number)
    steps = [step for step in wanted(rule, complete) if (step, complete[step]) not in bad]
    if not valid:
        return Update(base=None, add=tuple(steps), late=())
    newest = valid[0]
    missing = [step for step in steps if step not in newest.steps]
    if rule.method != "ema" or not missing or missing[0] > newest.newest:
        return Update(base=newest, add=tuple(missing), late=())
    return _rebuilt(valid, steps, missing)


def _rebuilt(valid: Sequence[Version], steps: Sequence[int], missing: Sequence[int]) -> Update:
    """An exponential average takes no step in between: go back to a version before it, where all that follows is still there."""
    whole = {*missing, *valid[0].steps}
    for base in [*valid[1:], None]:
        more = sorted(whole - (base.steps if base is not None else set()))
        if set(more) <= set(steps) and (base is None or more[0] > base.newest):
            return Update(base=base, add=tuple(more), late=())
    newest = valid[0]
    return Update(
        base=newest,
        add=tuple(step for step in missing if step > newest.newest),
        late=tuple(step for step in missing if step < newest.newest),
    )
