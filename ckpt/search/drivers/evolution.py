"""Evolution of the coefficients of a trajectory, after LCSC (Liu et al. 2024, "Linear combination of saved checkpoints").

In: scores. Out: points. The paper's search program is not published: what is known of it is the shape (coefficients that sum to 1
with either sign, a population that begins with moving averages of several decays, two parents among the best, crossover,
mutation); the operators and their numbers here are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.search.driver import Driver, Proposals, Session, search_driver
from ckpt.search.point import Space

Float64Array = NDArray[np.float64]
BEYOND = 0.25  # a child may lie so far beyond its parents, in units of their distance


@search_driver("lcsc")
@dataclass(frozen=True, kw_only=True)
class TrajectoryEvolution(Driver):
    """A population of coefficient vectors; a child lies near the line through two of the best.

    Args:
        population: vectors that are kept.
        parents: the best so many may be parents.
        sigma: the first size of mutations, in units of weights; each vector carries its own, which evolves with it.
        decays: of the moving averages that it begins with, beside the mean and the newest source.
        batch: children that are scored at a time.
    """

    population: int = 12
    parents: int = 5
    sigma: float = 0.1
    decays: tuple[float, ...] = (0.5, 0.7, 0.9)
    batch: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.parents <= self.population or self.batch < 1 or not self.sigma > 0:
            raise InvalidInputError(
                "`parents` must be 2 to `population`, `batch` at least 1 and `sigma` above 0, found "
                f"{self.parents}, {self.population}, {self.batch} and {self.sigma}"
            )
        if any(not 0 < decay < 1 for decay in self.decays):
            raise InvalidInputError(f"`decays` lie between 0 and 1, found {list(self.decays)}")

    def propose(self, session: Session) -> Proposals:
        space, rng = session.space, session.rng
        shape = (space.num_groups, space.num_sources)
        vectors = [np.tile(row, (space.num_groups, 1)) for row in self._first(space)]
        steps = [self.sigma] * len(vectors)
        values = session.values((yield [space.point(vector) for vector in vectors])).tolist()
        rate = 1 / np.sqrt(2 * np.sqrt(shape[0] * shape[1]))
        while True:
            best = sorted(range(len(values)), key=lambda i: -values[i])
            best = best[: self.population]
            vectors, steps, values = [vectors[i] for i in best], [steps[i] for i in best], [values[i] for i in best]
            children, sizes = [], []
            for _ in range(self.batch):
                a, b = rng.choice(min(self.parents, len(vectors)), 2, replace=len(vectors) < 2)
                size = np.sqrt(steps[a] * steps[b]) * np.exp(rate * rng.standard_normal())
                along = rng.uniform(-BEYOND, 1 + BEYOND)
                child = vectors[a] + along * (vectors[b] - vectors[a]) + size * rng.standard_normal(shape)
                children.append(space.point(child).array)
                sizes.append(float(size))
            scores = yield [space.point(child) for child in children]
            vectors, steps, values = vectors + children, steps + sizes, values + session.values(scores).tolist()

    def _first(self, space: Space) -> list[Float64Array]:
        """Mean, newest, moving averages."""
        order = oldest_first(space)
        newest = np.zeros(space.num_sources)
        newest[order[-1]] = 1.0
        rows = [np.full(space.num_sources, 1 / space.num_sources), newest]
        for decay in self.decays:
            row = np.zeros(space.num_sources)
            row[order] = ema_weights(space.num_sources, decay)
            rows.append(row)
        return rows


def ema_weights(num: int, decay: float) -> Float64Array:
    """Weights of an exponential moving average over `num` checkpoints, the oldest first, which begins with the first one."""
    weights = (1 - decay) * decay ** np.arange(num - 1, -1, -1.0)
    weights[0] = decay ** (num - 1)
    return weights


def oldest_first(space: Space) -> list[int]:
    """Sources by step where the steps are known and different, else as they are named."""
    steps = space.steps
    if None in steps or len(set(steps)) < len(steps):
        return list(range(space.num_sources))
    return sorted(range(space.num_sources), key=lambda i: steps[i] or 0)
