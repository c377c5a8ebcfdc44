"""Greedy soup (Wortsman et al. 2022): the mean of those sources that make it better, the best ones tried first.

In: scores. Out: points. Every group has the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.errors import InvalidInputError
from ckpt.search.driver import Driver, Proposals, Session, search_driver
from ckpt.search.point import Point, Space


@search_driver("greedy")
@dataclass(frozen=True, kw_only=True)
class GreedySoup(Driver):
    """Scores each source, then adds them one by one in the order of their scores, and keeps what raises that of the mean.

    Args:
        accept_equal: keep a source that leaves the score as it is (the paper); otherwise it must rise (the paper's program).
    """

    accept_equal: bool = False

    def check(self, space: Space, budget: int) -> None:
        wanted = 2 * space.num_sources - 1
        if budget < wanted:
            raise InvalidInputError(
                f"a greedy soup of {space.num_sources} sources takes up to {wanted} evaluations, and `budget` is {budget}",
                kind="small-budget",
            )

    def propose(self, session: Session) -> Proposals:
        space = session.space
        values = session.values((yield [space.single(i) for i in range(space.num_sources)]))
        order = sorted(np.flatnonzero(np.isfinite(values)).tolist(), key=lambda i: -values[i])
        soup, best = order[:1], max(values)
        for source in order[1:]:
            (score,) = yield [_mean(space, [*soup, source])]
            value = session.value(score)
            if value > best or (self.accept_equal and value == best):
                soup, best = [*soup, source], value


def _mean(space: Space, members: Sequence[int]) -> Point:
    weights = np.zeros(space.num_sources)
    weights[list(members)] = 1.0 / len(members)
    return space.point(weights)
