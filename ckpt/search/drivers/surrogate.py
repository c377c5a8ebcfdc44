"""MAP (Li et al. 2024): a quadratic model of every metric, and the Pareto front of these models.

In: scores. Out: points. Differs from the paper's program in three ways: the quadratics are fitted by least squares, on the metric
or on its logit; the front of the models is found by NSGA-II (Deb et al. 2002) inside the box that was sampled; and the points of
that front are then measured, added to the fit, and the front is found again, until the budget is spent or its points are all
measured. What a search reports as its front are measured scores, never values of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.search import pareto
from ckpt.search.driver import Driver, Proposals, Session, search_driver
from ckpt.search.point import Point, Space
from ckpt.search.score import Score

Float64Array = NDArray[np.float64]
GENERATIONS = 40
NEAR = 1e-3  # a point nearer than this to a measured one, in units of weights, is not new
SHRINK = 0.85  # of mutations, from one generation to the next
MEMBERS = 80
LOGIT_MARGIN = 1e-3  # of a metric at 0 or 1


@search_driver("map")
@dataclass(frozen=True, kw_only=True)
class QuadraticFront(Driver):
    """Scores random points, fits a quadratic to each metric, and measures points on the front of these, until none is new.

    Args:
        samples: random points; twice the numbers of a quadratic when not given, fewer where the budget is small.
        low: least weight of a random point.
        high: greatest weight.
        front: points of the front that are measured at a time.
        link: `logit` for metrics between 0 and 1, whose models then stay there.
    """

    samples: int | None = None
    low: float = 0.0
    high: float = 1.0
    front: int = 8
    link: Literal["none", "logit"] = "none"

    def __post_init__(self) -> None:
        if not self.low < self.high or self.front < 1:
            raise InvalidInputError(
                f"`low` must be below `high` and `front` at least 1, found {self.low}, {self.high} and {self.front}"
            )

    def check(self, space: Space, budget: int) -> None:
        least = _num_terms(_num_free(space))
        if self.samples is not None and self.samples < least:
            raise InvalidInputError(f"a quadratic takes at least {least} samples, and `samples` is {self.samples}")
        if budget < (self.samples or least) + 1:
            raise InvalidInputError(
                f"a quadratic of {_num_free(space)} weights takes at least {least} samples and one evaluation more, and "
                f"`budget` is {budget}",
                kind="small-budget",
                hints=("take fewer sources or groups, or a larger budget",),
            )

    def propose(self, session: Session) -> Proposals:
        space = session.space
        points = [self._draw(space, session.rng) for _ in range(self._num_samples(session))]
        scores = list((yield points))
        while chosen := self._front(session, points, scores):
            scores += list((yield chosen))
            points += chosen

    def _num_samples(self, session: Session) -> int:
        least = _num_terms(_num_free(session.space))
        return self.samples or max(least, min(2 * least, session.budget - self.front))

    def _draw(self, space: Space, rng: np.random.Generator) -> Point:
        return space.point(rng.uniform(self.low, self.high, (space.num_groups, space.num_sources)))

    def _front(self, session: Session, points: Sequence[Point], scores: Sequence[Score]) -> list[Point]:
        """Points of the front of the models: the best one by the objective first, then those with the most room."""
        good = [i for i, score in enumerate(scores) if not score.failure]
        if not good:
            return [self._draw(session.space, session.rng) for _ in range(self.front)]
        names = sorted(set.intersection(*(set(scores[i].metrics) for i in good)))
        measured = np.array([[scores[i].metrics[name] for name in names] for i in good])
        features = _features(session.space, np.stack([points[i].array for i in good]))
        models = [Quadratic.fit(features, column, self.link) for column in measured.T]
        members = self._evolve(session, models, np.stack([points[i].array for i in good]))
        values = _predicted(models, session.space, members)
        on_front = np.array(pareto.front(values))
        told = [Score(metrics=dict(zip(names, row.tolist(), strict=True))) for row in values[on_front]]
        order = [int(np.argmax(session.values(told))), *np.argsort(-pareto.crowding(values[on_front]), kind="stable")]
        measured_at = [point.array for point in points]
        chosen: list[Point] = []
        for number in order:
            point = session.space.point(members[on_front[number]])
            if len(chosen) < self.front and not any(np.abs(point.array - at).max() < NEAR for at in measured_at):
                chosen.append(point)
                measured_at.append(point.array)
        return chosen

    def _evolve(self, session: Session, models: Sequence[Quadratic], members: Float64Array) -> Float64Array:
        """NSGA-II on the models, from the points that were measured; mutations shrink."""
        space, rng = session.space, session.rng
        for generation in range(GENERATIONS):
            size = 0.3 * (self.high - self.low) * SHRINK**generation
            a, b = members[rng.integers(len(members), size=(2, MEMBERS))]
            children = a + rng.uniform(size=(MEMBERS, 1, 1)) * (b - a) + size * rng.standard_normal(a.shape)
            members = np.concatenate([members, space.nearest(np.clip(children, self.low, self.high))])
            members = members[pareto.survivors(_predicted(models, space, members), MEMBERS)]
        return members


def _predicted(models: Sequence[Quadratic], space: Space, members: Float64Array) -> Float64Array:
    """[members, metrics]"""
    features = _features(space, members)
    return np.stack([model.predict(features) for model in models], axis=1)


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """A quadratic polynomial, through a logistic curve where it has one."""

    coefficients: Float64Array
    link: str

    @staticmethod
    def fit(features: Float64Array, values: Float64Array, link: str = "none") -> Quadratic:
        """By least squares; of several equally good ones the smallest."""
        if link == "logit":
            inside = np.clip(values, LOGIT_MARGIN, 1 - LOGIT_MARGIN)
            values = np.log(inside / (1 - inside))
        return Quadratic(
            coefficients=np.asarray(np.linalg.lstsq(_terms(features), values, rcond=None)[0], np.float64), link=link
        )

    def predict(self, features: Float64Array) -> Float64Array:
        """[points]"""
        found = _terms(features) @ self.coefficients
        return np.asarray(1 / (1 + np.exp(-found)) if self.link == "logit" else found)


def _terms(features: Float64Array) -> Float64Array:
    """[points, terms]: 1, x_i, x_i x_j for i <= j."""
    i, j = np.triu_indices(features.shape[1])
    return np.concatenate([np.ones((len(features), 1)), features, features[:, i] * features[:, j]], axis=1)


def _num_terms(num: int) -> int:
    return (num + 1) * (num + 2) // 2


def _num_free(space: Space) -> int:
    """Weights of a point that follow from no others."""
    return space.num_groups * (space.num_sources - (0 if space.deltas else 1))


def _features(space: Space, weights: Float64Array) -> Float64Array:
    """[points, free weights] of [points, groups, sources]"""
    return weights[:, :, : space.num_sources - (0 if space.deltas else 1)].reshape(len(weights), -1)
