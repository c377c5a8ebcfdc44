"""Who has voted for which snapshot, at the agent of rank 0.

In: votes and their withdrawals. Out: one decision for each snapshot, which never changes again. Asks the one who owns it what
lies in memory, and marks it; knows no clock and no peer. One thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_KEPT = 1024  # small once they are decided


@dataclass(kw_only=True)
class Ballot:
    """The votes on one snapshot. Decided once: `whole` and `failed` never change again."""

    votes: dict[int, bool] = field(default_factory=dict)  # rank -> whether its structure changed
    whole: bool = False
    failed: str = ""
    changed: bool = False


class Ballots:
    """All ballots of one agent.

    Args:
        is_protected: whether this agent's own image of (step, attempt) is marked so: an agent before this one has decided.
        mark_protected: marks it; False when it is gone.
    """

    def __init__(self, is_protected: Callable[[int, str], bool], mark_protected: Callable[[int, str], bool]) -> None:
        self._is_protected, self._mark_protected = is_protected, mark_protected
        self._ballots: OrderedDict[tuple[int, str, int], Ballot] = OrderedDict()
        self.unheard: set[int] = set()  # ranks that have not heard that the newest vote is complete

    def count(self, payload: dict[str, Any]) -> Ballot:
        """Take a vote, or its withdrawal. Rank 0's own image is marked before anybody hears that all have voted: what an agent
        that is started anew finds in memory is then what the others may have been told."""
        step, attempt, world = of = (int(payload["step"]), str(payload["attempt"]), int(payload["world"]))
        ballot = self._ballots.setdefault(of, Ballot(whole=self._is_protected(step, attempt)))
        while len(self._ballots) > _KEPT:
            self._ballots.popitem(last=False)
        rank, failed = int(payload["rank"]), str(payload.get("failed") or "")
        if ballot.whole or ballot.failed:
            self.unheard -= {rank} if ballot.whole else set()
            return ballot
        if failed:
            ballot.failed = f"rank {rank}: {failed}"
        else:
            ballot.votes[rank] = bool(payload["changed"])
        if len(ballot.votes) == world and not ballot.failed:
            ballot.whole, ballot.changed = self._mark_protected(step, attempt), any(ballot.votes.values())
            ballot.failed = "" if ballot.whole else "rank 0: its image was given up"
        if ballot.whole or ballot.failed:
            self.unheard = set(range(world)) - {rank} if ballot.whole else set()
            ballot.votes.clear()
        return ballot
