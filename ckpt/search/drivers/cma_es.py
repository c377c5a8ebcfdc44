"""CMA-ES over merge coefficients (Akiba et al. 2025 search recipes with it), by the library `cma`.

In: scores. Out: points. Needs the extra `ckpt[search]`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.search.driver import Driver, Proposals, Session, search_driver
from ckpt.search.point import Space


@search_driver("cma_es")
@dataclass(frozen=True, kw_only=True)
class CmaEs(Driver):
    """Covariance matrix adaptation from the mean on; starts again from the best with twice the population when it converges.

    Args:
        sigma0: the first step size, in units of weights.
        population: points per generation; 4 + 3 ln(number of weights) when not given.
        start: weights of the first mean, the same for all groups; equal ones that sum to 1 when not given.
    """

    sigma0: float = 1 / 6
    population: int | None = None
    start: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sigma0 > 0:
            raise InvalidInputError(f"`sigma0` must be above 0, found {self.sigma0}")
        if self.population is not None and self.population < 2:
            raise InvalidInputError(f"`population` must be at least 2, found {self.population}")

    def check(self, space: Space, budget: int) -> None:
        _library()
        if self.start is not None and len(self.start) != space.num_sources:
            raise InvalidInputError(f"`start` has {len(self.start)} weights for {space.num_sources} sources")

    def propose(self, session: Session) -> Proposals:
        space, shape = session.space, (session.space.num_groups, session.space.num_sources)
        first = space.mean() if self.start is None else space.point(np.array(self.start))
        best, best_value, lowest = first.array.reshape(-1), -math.inf, math.inf
        population = self.population or 4 + int(3 * math.log(best.size))
        while True:
            strategy = _library().CMAEvolutionStrategy(best, self.sigma0, _settings(session.rng, population))
            while not strategy.stop():
                drawn = strategy.ask()
                values = session.values((yield [space.point(x.reshape(shape)) for x in drawn]))
                finite = values[np.isfinite(values)]
                lowest = min([lowest, *finite.tolist()])
                if finite.size and values.max() > best_value:
                    best, best_value = drawn[int(values.argmax())], float(values.max())
                strategy.tell(drawn, _costs(values, lowest))
            population *= 2


def _costs(values: NDArray[np.float64], lowest: float) -> list[float]:
    """What is minimised. Only the order counts: a failed evaluation stands behind the worst that was ever seen."""
    behind = abs(lowest) + 1 - lowest if math.isfinite(lowest) else 1.0
    return [-value if math.isfinite(value) else behind for value in values.tolist()]


def _settings(rng: np.random.Generator, population: int) -> dict[str, Any]:
    """Random numbers from the session: the library would take them from NumPy's global state, which an evaluator may use."""
    return {
        "popsize": population,
        "seed": math.nan,  # leave the global state alone
        "randn": lambda *shape: rng.standard_normal(shape),
        "verbose": -9,
        "verb_log": 0,
        "verb_disp": 0,
    }


def _library() -> Any:
    try:
        return importlib.import_module("cma")
    except ImportError as error:
        raise InvalidInputError(
            "the driver `cma_es` needs the package `cma`, which is not installed",
            kind="missing-package",
            hints=("pip install 'ckpt[search]'",),
        ) from error
