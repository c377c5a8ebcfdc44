"""M2N2 (Abrantes et al. 2025, "Competition and attraction improve model fusion"): an archive of models that compete for examples.

In: scores with one number per example. Out: points whose weights change at split points. A child is a spherical interpolation of
two parents with t before a random element and 1 - t after it. Split points lie on a grid of at most SPLITS_MAX elements, in the
order in which the space lists its tensors. Parents are weighted sums of the sources, so the angle between two of them follows
from products of the sources over ranges of elements, and no model is ever held. Mutation, which the paper has for training from
scratch alone, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.search.driver import Driver, Proposals, Session, search_driver
from ckpt.search.point import Point, Space
from ckpt.search.score import Score

Float64Array = NDArray[np.float64]
SINE_MIN = 1e-6  # of an angle below which the interpolation is linear


@search_driver("m2n2")
@dataclass(frozen=True, kw_only=True)
class NaturalNiches(Driver):
    """Parents are drawn by what they score where others do not, and by what they have over their partner.

    An evaluator that gives no `per_example` is taken by its metrics, as if each were one example.

    Args:
        archive: models that are kept.
        alpha: how strongly models share what an example is worth; 0: not at all.
        attraction: choose the second parent by what it has over the first; otherwise as the first is chosen.
        split: children change their weights at an element; otherwise they have the same everywhere.
    """

    archive: int = 20
    alpha: float = 1.0
    attraction: bool = True
    split: bool = True

    def __post_init__(self) -> None:
        if self.archive < 2 or self.alpha < 0:
            raise InvalidInputError(
                f"`archive` must be at least 2 and `alpha` not below 0, found {self.archive} and {self.alpha}"
            )

    def check(self, space: Space, budget: int) -> None:
        if space.num_groups > 1:
            raise InvalidInputError(
                "the driver `m2n2` finds its own ranges of elements: it takes no groups", kind="bad-groups"
            )
        if space.num_sources < 2:
            raise InvalidInputError("the driver `m2n2` needs at least 2 sources", kind="wrong-number")

    def propose(self, session: Session) -> Proposals:
        space, rng = session.space, session.rng
        assert session.products is not None
        breeder = Breeder(space, session.products(space.splits))
        first = [space.ranges(space.single(i).rows, [space.num_elements]) for i in range(space.num_sources)]
        models: list[Point] = []
        matrix: list[Float64Array] = []
        scores = list((yield first))
        born = list(first)
        while True:
            for point, score in zip(born, scores, strict=True):
                self._update(models, matrix, point, score)
            born = [self._child(breeder, models, matrix, rng)]
            scores = list((yield born))

    def _child(
        self, breeder: Breeder, models: list[Point], matrix: list[Float64Array], rng: np.random.Generator
    ) -> Point:
        if len(models) < 2:  # the evaluations of all others failed
            return breeder.any(rng)
        a, b = self._parents(np.array(matrix), rng)
        return breeder.child(models[a], models[b], rng, split=self.split)

    def _parents(self, matrix: Float64Array, rng: np.random.Generator) -> tuple[int, int]:
        fitness = shared(matrix, self.alpha)
        total = fitness.sum(axis=1)
        a = int(rng.choice(len(total), p=_chances(total, np.ones(len(total), bool))))
        others = np.arange(len(total)) != a
        match = np.maximum(fitness - fitness[a], 0).sum(axis=1) if self.attraction else total
        return a, int(rng.choice(len(total), p=_chances(match, others)))

    def _update(self, models: list[Point], matrix: list[Float64Array], point: Point, score: Score) -> None:
        """Take a model in; beyond the size of the archive the one that is worth least goes."""
        if score.failure or any(model.key == point.key for model in models):
            return
        row = np.array(score.examples or tuple(score.metrics[name] for name in sorted(score.metrics)))
        if matrix and len(row) != len(matrix[0]):
            raise InvalidInputError(
                f"the evaluator gave {len(row)} examples, and {len(matrix[0])} before: they must be the same ones each time"
            )
        models.append(point)
        matrix.append(row)
        if len(models) > self.archive:
            worst = int(np.argmin(shared(np.array(matrix), self.alpha).sum(axis=1)))
            del models[worst], matrix[worst]


def shared(matrix: Float64Array, alpha: float) -> Float64Array:
    """[models, examples]: scores over the sum of all models' scores of the example, to the power of alpha.

    Scores below zero are counted from the least one of their example, so that all are shares.
    """
    above = matrix - np.minimum(matrix.min(axis=0), 0.0)
    total = above.sum(axis=0)
    return np.asarray(above / np.where(total > 0, total, 1.0) ** alpha)


def _chances(worth: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    """Probabilities in proportion to worth among those allowed; equal ones where nobody is worth anything."""
    found = np.where(allowed, worth, 0.0)
    return np.asarray(found / found.sum() if found.sum() > 0 else allowed / allowed.sum())


class Breeder:
    """Makes children."""

    def __init__(self, space: Space, products: Float64Array) -> None:
        self._space = space
        self._ends = np.array([0, *space.splits])
        self._up_to = np.concatenate([np.zeros((1, *products.shape[1:])), np.cumsum(products, axis=0)])

    def any(self, rng: np.random.Generator) -> Point:
        """A random weighted mean of the sources."""
        weights = rng.dirichlet(np.ones(self._space.num_sources))
        return self._space.ranges([weights.tolist()], [self._space.num_elements])

    def child(self, x: Point, y: Point, rng: np.random.Generator, *, split: bool) -> Point:
        """A spherical interpolation of two points."""
        num = self._space.num_elements
        at = int(self._ends[rng.integers(len(self._ends) - 1)]) if split else num
        t = float(rng.uniform())
        stops = sorted({*x.stops, *y.stops, at, num} - {0})
        rows_x, rows_y = _rows(x, stops), _rows(y, stops)
        sine, angle = self._angle(rows_x, rows_y, stops)
        rows = []
        for a, b, stop in zip(rows_x, rows_y, stops, strict=True):
            share_x, share_y = _shares(t if stop <= at else 1 - t, sine, angle)
            rows.append((share_x * a + share_y * b).tolist())
        return self._space.ranges(rows, stops)

    def _angle(self, rows_x: Float64Array, rows_y: Float64Array, stops: list[int]) -> tuple[float, float]:
        """(sine, angle) between two models."""
        edges = np.searchsorted(self._ends, [0, *stops])
        products = self._up_to[edges[1:]] - self._up_to[edges[:-1]]
        xx, xy, yy = (
            float(np.einsum("rs,rst,rt->", a, products, b))
            for a, b in ((rows_x, rows_x), (rows_x, rows_y), (rows_y, rows_y))
        )
        norm = np.sqrt(max(xx, 0.0) * max(yy, 0.0))
        angle = float(np.arccos(np.clip(xy / norm, -1, 1))) if norm > 0 else 0.0
        return float(np.sin(angle)), angle


def _rows(point: Point, stops: list[int]) -> Float64Array:
    """[stops, sources] the weights of a point in finer ranges."""
    return point.array[np.searchsorted(point.stops, stops)]


def _shares(t: float, sine: float, angle: float) -> tuple[float, float]:
    if sine <= SINE_MIN:
        return 1 - t, t
    return float(np.sin((1 - t) * angle) / sine), float(np.sin(t * angle) / sine)
