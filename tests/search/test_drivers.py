"""Every driver finds the known optimum of a quadratic over real checkpoints; parity with plain references."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.search import pareto
from ckpt.search.driver import known
from ckpt.search.drivers.evolution import ema_weights
from ckpt.search.drivers.niches import shared
from ckpt.search.drivers.surrogate import Quadratic
from tests.search.samples import OPTIMUM, ByExample, Near, mixed, save_sources


@pytest.mark.parametrize(
    ("driver", "parameters", "budget", "apart"),
    [
        ("cma_es", {}, 120, 0.02),
        ("lcsc", {}, 160, 0.03),
        ("map", {"low": -0.5, "high": 1.0}, 40, 0.02),
    ],
)
def test_driver_finds_the_optimum_of_a_quadratic(
    tmp_path: Path, driver: str, parameters: dict[str, Any], budget: int, apart: float
) -> None:
    sources = save_sources(tmp_path / "run")
    near = Near(mixed(sources, OPTIMUM))
    found = ckpt.search(tmp_path / "run@0..", evaluator=near, driver=driver, budget=budget, seed=1, **parameters)
    assert len(found.evaluations) <= budget
    assert np.abs(found.best.point.array[0] - OPTIMUM).max() < apart
    assert abs(sum(found.best.point.rows[0]) - 1) < 1e-12
    assert found.best.value > max(one.value for one in found.others)


def test_groups_have_weights_of_their_own(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    target = {**mixed(sources, (1.0, 0.0, 0.0)), "head": sources[2]["head"]}
    for more in ({"groups": {"head": "head"}}, {"groups": {"rest of it": ["layers.**", "embed.*"]}}, {"layers": 2}):
        found = ckpt.search(
            tmp_path / "run@0..", evaluator=Near(target), driver="cma_es", budget=220, seed=3, objective="score", **more
        )
        rows = found.best.point.array
        wanted = [1, 0, 0], [0, 0, 1]
        expected = {"head": [wanted[1], wanted[0]], "rest of it": [wanted[0], wanted[1]]}.get(
            next(iter(more["groups"])) if "groups" in more else ""
        )
        if expected is None:  # layers.0, layers.1, and the rest, in which head and embed pull apart
            assert rows.shape == (3, 3) and np.abs(rows[:2] - wanted[0]).max() < 0.2
        else:
            assert np.abs(rows - expected).max() < 0.15


def test_with_a_base_weights_are_of_changes_and_free(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    base, changes = sources[0], sources[1:]
    target = {n: base[n] + sum(0.7 * (c[n] - base[n]) for c in changes) for n in base}
    found = ckpt.search(
        [f"{tmp_path}/run@20", f"{tmp_path}/run@30"],
        base=f"{tmp_path}/run@10",
        evaluator=Near(target),
        driver="cma_es",
        budget=100,
        seed=1,
    )
    assert np.abs(found.best.point.array - 0.7).max() < 0.02


def test_m2n2_splits_inside_tensors_and_beats_every_source(tmp_path: Path) -> None:
    """The target is one source up to an element in the middle of a tensor, and another one from there on."""
    sources = save_sources(tmp_path / "run", 2)
    target, at = {}, 50  # of 117 elements, in the order of names
    for name in sorted(sources[0]):
        first, second = (s[name].reshape(-1) for s in sources)
        cut = int(np.clip(at, 0, first.size))
        target[name] = np.concatenate([first[:cut], second[cut:]]).reshape(sources[0][name].shape)
        at -= first.size
    found = ckpt.search(
        tmp_path / "run@0..", tmp_path / "out", evaluator=ByExample(target), driver="m2n2", budget=150, seed=2
    )
    singles = [e.score.metrics["score"] for e in found.evaluations[:2]]
    assert found.best.value > max(singles) + 0.1 and len(found.best.point.stops) > 1
    with ckpt.open(tmp_path / "out") as made:
        got = {name.removeprefix("model/"): made[name][...] for name in made if name.startswith("model/")}
    assert ByExample(target)(_Holds(got))["score"] == found.best.value


class _Holds:
    """A candidate that is a state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


@pytest.mark.parametrize("accept_equal", [False, True])
def test_greedy_soup_is_the_plain_one(tmp_path: Path, accept_equal: bool) -> None:
    sources = save_sources(tmp_path / "run", 5)
    near = Near(mixed(sources, (0.0, 0.4, 0.0, 0.35, 0.25)))
    found = ckpt.search(
        tmp_path / "run@0..", evaluator=near, driver="greedy", budget=9, accept_equal=accept_equal, references=False
    )

    def score(members: list[int]) -> float:
        state = {n: np.mean([sources[i][n].astype(np.float64) for i in members], axis=0) for n in sources[0]}
        return -float(np.mean([np.mean((state[n] - near.target[n]) ** 2) for n in sorted(state)]))

    order = sorted(range(5), key=lambda i: -score([i]))
    soup = order[:1]
    for i in order[1:]:
        soup = [*soup, i] if score([*soup, i]) > score(soup) else soup
    assert len(soup) > 1
    assert found.best.point.rows == (tuple(1 / len(soup) if i in soup else 0.0 for i in range(5)),)
    assert len(found.evaluations) == near.calls == 9


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30))
def test_pareto_front_is_that_of_brute_force(values: list[tuple[int, ...]]) -> None:
    def dominates(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [i for i, one in enumerate(values) if not any(dominates(other, one) for other in values)]
    assert pareto.front(values) == expected
    rank = pareto.layers(np.array(values, np.float64))
    assert [i for i, level in enumerate(rank) if level == 0] == expected


def test_map_measures_a_front_between_two_targets(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run", 2)
    ends = [mixed(sources, (1.0, 0.0)), mixed(sources, (0.0, 1.0))]

    def both(candidate: ckpt.search.Candidate) -> dict[str, float]:
        return {name: Near(end)(candidate) for name, end in zip("ab", ends, strict=True)}

    found = ckpt.search(
        tmp_path / "run@0..",
        evaluator=both,
        driver="map",
        budget=24,
        low=-0.5,
        high=1.5,
        objective={"a": 0.25, "b": 0.75},
    )
    # of two quadratics the front is all between their optima, and the weighted optimum lies where the weights say
    share = sorted(found.evaluations[i].point.rows[0][0] for i in found.front)
    assert len(share) >= 8 and -0.05 < share[0] < 0.05 and 0.95 < share[-1] < 1.05
    assert max(b - a for a, b in zip(share, share[1:], strict=False)) < 0.35
    assert abs(found.best.point.rows[0][0] - 0.25) < 0.02
    picture = ckpt.search.plot_front(found, tmp_path / "front.svg")
    assert picture.stat().st_size > 5000


def test_quadratic_is_fitted_exactly_and_stays_in_its_link() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (30, 3))
    y = 1 + x @ [1.0, -2, 0.5] + 3 * x[:, 0] * x[:, 2] - x[:, 1] ** 2
    np.testing.assert_allclose(Quadratic.fit(x, y).predict(x), y, atol=1e-9)
    probability = 1 / (1 + np.exp(-y))
    np.testing.assert_allclose(Quadratic.fit(x, probability, "logit").predict(x), probability, atol=2e-3)


def test_parts_of_drivers() -> None:
    values = [3.0, -1.0, 2.0, 7.0]
    average = values[0]
    for value in values[1:]:
        average = 0.9 * average + 0.1 * value
    assert ema_weights(4, 0.9) @ values == pytest.approx(average)
    # an example that both models solve is worth half to each; one that nobody solves nothing
    assert shared(np.array([[1.0, 1, 0], [1, 0, 0]]), 1.0).tolist() == [[0.5, 1, 0], [0.5, 0, 0]]


def test_the_reference_lists_every_driver_with_its_parameters() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    table = page[page.index("| Driver | Parameters |") :].split("\n\n")[0]
    listed = {
        row[0]: re.findall(r"`(\w+)`: [^,]+, ", row[1] + " ")
        for row in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M)
    }
    drivers = {name: cls for name, cls in known().items() if cls.__module__.startswith("ckpt.")}
    assert listed == {name: [field.name for field in dataclasses.fields(cls)] for name, cls in drivers.items()}
