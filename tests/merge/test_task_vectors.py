"""Task-vector methods by name, and pipelines of stages, against straightforward NumPy over whole models.

Method: three fine-tunes of one base, merged by ckpt and by tests/merge/recipes.py; every element of the result must be
within one unit in the last place of float32 (both are made in fp64; where that is the middle of two float32, either is right).
Refusals: the images of all sources are removed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.merge import registry
from ckpt.merge.methods import pipeline
from ckpt.merge.stages import known_stages
from tests.merge import recipes
from tests.merge.recipes import Model
from tests.merge.samples import cast, doubles, images, merged, random_arrays, same, save
from tests.merge.test_refusals import refused

STEPS = (10, 20, 30)  # of the sources
ONES = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Tuned:
    """Three fine-tunes at steps 10, 20, 30 of a base at step 1."""

    url: Path
    base: dict[str, torch.Tensor]
    models: list[Model]  # their changes

    def sources(self, weights: Sequence[float] = ONES) -> list[Any]:
        return [{"run": f"{self.url}@{step}", "weight": w} for step, w in zip(STEPS, weights, strict=True)]

    def expected(self, change: Model) -> dict[str, torch.Tensor]:
        out = {}
        for name, tensor in self.base.items():
            base = tensor.double().numpy()
            out[name] = cast(np.where(change[name] == 0, base, base + change[name]), torch.float32)
        return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    url = tmp_path_factory.mktemp("tuned") / "run"
    base = random_arrays(99)
    saved = [
        save(url, 10 * (i + 1), {n: base[n] + change[n] for n in base})
        for i, change in enumerate(random_arrays(seed, scale=0.1) for seed in range(3))
    ]
    bases = save(url, 1, base)
    models = [{n: doubles(one, n) - doubles(bases, n) for n in base} for one in saved]
    return Tuned(url, bases, models)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_max_ulp(found[name].numpy(), tensor.numpy(), maxulp=1)


def masked(models: Sequence[Model], keep: float) -> list[Model]:
    chances = [recipes.chance(one, f"{step}:0") for one, step in zip(models, STEPS, strict=True)]
    return [{n: np.where(c[n] < keep, a, 0.0) for n, a in one.items()} for one, c in zip(models, chances, strict=True)]


def dare(models: list[Model], kind: str, scope: str = "tensor", keep: float = 0.4) -> list[Model]:
    return recipes.rescaled(models, masked(models, keep), kind, keep, scope)


def della(models: list[Model], kind: str, keep: float = 0.4, spread: float = 0.2) -> list[Model]:
    after: list[Model] = []
    for one, step in zip(models, STEPS, strict=True):
        numbers = recipes.chance(one, f"{step}:0")
        chances = {n: recipes.row_chances(a, keep, spread) for n, a in one.items()}
        divisor = {n: c if kind == "inverse_keep" else 1.0 for n, c in chances.items()}
        after.append({n: np.where(numbers[n] < chances[n], a / divisor[n], 0.0) for n, a in one.items()})
    return after if kind == "inverse_keep" else recipes.rescaled(models, after, kind, 1.0)


def depth(first: float, rise: float) -> Callable[[str], float]:
    """Of the two layers of the samples; `first` outside of them."""
    return lambda name: first + rise if name.startswith("layers.1.") else first


def ties(
    models: list[Model],
    weights: Sequence[float] = ONES,
    *,
    keep: float = 0.3,
    scope: str = "model",
    zero: str = "majority",
    by: str = "sum",
    kind: str = "mean",
) -> Model:
    trimmed = recipes.top_k(models, keep, scope)
    return recipes.aggregated(recipes.elected(trimmed, weights, zero=zero, scope=scope, by=by), weights, kind)


W = (0.5, 2.0, 1.25)
Reference = Callable[[list[Model]], Model]
BY_NAME: list[tuple[str, dict[str, Any], Sequence[float], Reference]] = [
    ("task_arithmetic", {"scale": 0.5}, W, lambda m: recipes.scaled(recipes.summed(m, W), 0.5)),
    *[
        (
            "ties_pipeline",
            {"keep": 0.3, "scope": scope, "aggregate": kind, "zero_sign": zero, "scale": 0.7},
            W,
            lambda m, scope=scope, kind=kind, zero=zero: recipes.scaled(
                ties(m, W, scope=scope, zero=zero, kind=kind), 0.7
            ),
        )
        for scope, kind, zero in [("model", "mean", "majority"), ("layer", "sum", "positive"), ("tensor", "max", "drop")]
    ],
    *[
        (
            "dare",
            {"keep": 0.4, "rescale": kind, "scope": scope},
            W,
            lambda m, kind=kind, scope=scope: recipes.summed(dare(m, kind, scope), W),
        )
        for kind, scope in [("none", "tensor"), ("inverse_keep", "tensor"), ("l1", "tensor"), ("l1", "model"), ("l2", "layer")]
    ],
    ("dare", {"keep": 0.4, "aggregate": "mean"}, W,
     lambda m: recipes.scaled(recipes.summed(dare(m, "inverse_keep"), W), 1 / sum(W))),
    *[
        (
            "dare_ties",
            {"keep": 0.4, "rescale": kind, "scope": scope, "zero_sign": zero, "aggregate": how},
            W,
            lambda m, kind=kind, scope=scope, zero=zero, how=how: recipes.aggregated(
                recipes.elected(dare(m, kind, scope), W, zero=zero, scope=scope), W, how
            ),
        )
        for kind, scope, zero, how in [
            ("inverse_keep", "tensor", "majority", "mean"),
            ("l1", "tensor", "positive", "sum"),
            ("l2", "model", "majority", "max"),
        ]
    ],
    *[
        (
            "della",
            {"keep": 0.4, "spread": 0.2, "rescale": kind, "zero_sign": zero},
            ONES,
            lambda m, kind=kind, zero=zero: recipes.mean_of_nonzero(
                recipes.elected(della(m, kind), ONES, zero=zero, scope="tensor"), ONES
            ),
        )
        for kind, zero in [("inverse_keep", "positive"), ("l1", "majority")]
    ],
    ("della", {"keep": 0.4, "spread": 0.2, "consensus": "none", "aggregate": "sum"}, ONES,
     lambda m: recipes.summed(della(m, "inverse_keep"), ONES)),
    ("breadcrumbs", {"keep": 0.3, "out": 0.1, "scale": 0.4}, W,
     lambda m: recipes.scaled(recipes.summed(recipes.row_band(m, 0.3, 0.1), W), 0.4)),
    *[
        (
            "breadcrumbs",
            {"scope": scope, "keep": 0.5, "out": 0.05, "scale": 0.4},
            ONES,
            lambda m, scope=scope: recipes.scaled(recipes.summed(recipes.band(m, 0.5, 0.05, scope), ONES), 0.4),
        )
        for scope in ("tensor", "layer", "model")
    ],
    ("breadcrumbs", {"scope": "tensor", "keep": 0.5, "out": 0.05, "scale": 0.4, "consensus": "sign"}, W,
     lambda m: recipes.scaled(recipes.mean_of_nonzero(
         recipes.elected(recipes.band(m, 0.5, 0.05, "tensor"), W, zero="majority", scope="tensor"), W), 0.4)),
    *[
        (
            "pcb",
            {"keep": 0.2, "clamp": clamp, "scope": scope},
            W,
            lambda m, clamp=clamp, scope=scope: recipes.scaled(
                recipes.pcb(m, W, keep=0.2, clamp=clamp, scope=scope), 1.2
            ),
        )
        for clamp, scope in [(0.01, "model"), (0.0, "tensor")]
    ],
    ("consensus", {"least": 2, "threshold": 0.3}, ONES,
     lambda m: recipes.scaled(recipes.tall(m, recipes.summed(m, ONES), [0.3] * 3, 2), 0.3)),
    ("consensus", {"least": 0}, ONES, lambda m: recipes.scaled(recipes.summed(m, ONES), 0.3)),
    ("consensus", {"of": "ties", "keep": 0.3, "least": 1, "thresholds": [0.2, 0.4, 0.6], "scale": 1.0}, ONES,
     lambda m: recipes.tall(m, ties(m), [0.2, 0.4, 0.6], 1)),
    ("ram", {"least": 0.15}, ONES, lambda m: recipes.ram(m, least=0.15, boost=0, boost_max=0.2, scope="tensor")),
    ("ram", {"least": 0.15, "boost": 0.5, "boost_max": 0.4, "scope": "model"}, ONES,
     lambda m: recipes.ram(m, least=0.15, boost=0.5, boost_max=0.4, scope="model")),
    ("lines", {"beta": 0.6}, ONES, lambda m: recipes.scaled(recipes.summed(m, ONES), depth(1 / 3, 0.6))),
    ("lines", {"alpha": 0.2, "beta": 0.6}, W, lambda m: recipes.scaled(recipes.summed(m, W), depth(0.2, 0.6))),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters", "weights", "reference"), BY_NAME, ids=lambda x: str(x)[:60])
def test_a_method_is_its_recipe(
    tuned: Tuned,
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
    weights: Sequence[float],
    reference: Reference,
) -> None:
    found, _ = merged(tuned.sources(weights), tmp_path / "out", method, base=f"{tuned.url}@1", **parameters)
    close(found, tuned.expected(reference(tuned.models)))


STAGED: list[tuple[list[dict[str, Any]], Reference]] = [
    ([{"combine": "mean"}, {"scale": 0.5}], lambda m: recipes.scaled(recipes.summed(m, ONES), 0.5 / 3)),
    (
        [{"sparsify": "top_k", "keep": 0.3}, {"consensus": "sign", "by": "count"}, {"combine": "disjoint_mean"}],
        lambda m: ties(m, by="count"),
    ),
    (
        [{"sparsify": "top_k", "keep": 0.5, "scope": "layer"}, {"rescale": "l2", "scope": "model"}, {"combine": "max"}],
        lambda m: recipes.greatest(recipes.rescaled(m, recipes.top_k(m, 0.5, "layer"), "l2", 1.0, "model"), ONES),
    ),
    (
        [{"sparsify": "threshold", "least": 0.1}, {"rescale": "constant", "by": 2}, {"combine": "sum"}],
        lambda m: recipes.summed([{n: 2 * np.where(np.abs(a) >= 0.1, a, 0) for n, a in one.items()} for one in m], ONES),
    ),
    (  # two random masks are one, and what is left after TIES is masked by what sources need
        [
            {"sparsify": "random", "keep": 0.5},
            {"sparsify": "top_k", "keep": 0.2},
            {"rescale": "inverse_keep"},
            {"combine": "sum"},
        ],
        lambda m: recipes.scaled(recipes.summed(recipes.top_k(masked(m, 0.5), 0.2, "model"), ONES), 1 / (0.5 * 0.2)),
    ),
    (
        [{"consensus": "tall", "threshold": 0.3, "least": 2}, {"combine": "sum"}],
        lambda m: recipes.tall(m, recipes.summed(m, ONES), [0.3] * 3, 2),
    ),
    (
        [
            {"combine": "sum"},
            {"scale": "names", "match": ["model/layers.**.weight", "**.stack"], "by": [0.5, 2], "otherwise": 0.25},
        ],
        lambda m: recipes.scaled(
            recipes.summed(m, ONES), lambda n: 2 if n.endswith("stack") else 0.5 if n.startswith("layers") else 0.25
        ),
    ),
    (
        [{"combine": "mean"}, {"scale": "gradient", "values": [1, 0.25], "outside": 0.75}],
        lambda m: recipes.scaled(
            recipes.summed(m, ONES), lambda n: {"layers.0": 1, "layers.1": 0.25}.get(n[:8], 0.75) / 3
        ),
    ),
    (
        [
            {"sparsify": "top_k", "keep": 0.3},
            {"consensus": "sign"},
            {"combine": "disjoint_mean"},
            {"scale": "lines", "beta": 0.6},
        ],
        lambda m: recipes.scaled(ties(m), depth(alpha_of(m, ties(m)), 0.6)),
    ),
]  # fmt: skip


def alpha_of(models: list[Model], change: Model) -> float:
    """LiNeS: the ratio of L1 norms over the model, by the number of sources."""
    norms = [sum(np.abs(a).sum() for a in one.values()) for one in (recipes.summed(models, ONES), change)]
    return float(norms[0] / norms[1] / len(models))


@pytest.mark.parametrize(("stages", "reference"), STAGED, ids=lambda x: str(x)[:60])
def test_a_pipeline_is_its_stages(
    tuned: Tuned, tmp_path: Path, stages: list[dict[str, Any]], reference: Reference
) -> None:
    found, _ = merged(tuned.sources(), tmp_path / "out", "pipeline", base=f"{tuned.url}@1", stages=stages)
    close(found, tuned.expected(reference(tuned.models)))
    if "random" not in str(stages):
        return
    other, _ = merged(tuned.sources(), tmp_path / "other", "pipeline", base=f"{tuned.url}@1", stages=stages, seed=1)
    assert any(not torch.equal(other[name], found[name]) for name in found)


def test_stages_come_after_those_of_a_method(tuned: Tuned, tmp_path: Path) -> None:
    """TIES, then masked, then scaled by depth."""
    then = [{"consensus": "tall", "threshold": 0.3, "least": 2}, {"scale": "lines", "alpha": 0.5, "beta": 0.25}]
    found, _ = merged(tuned.sources(), tmp_path / "out", "ties_pipeline", base=f"{tuned.url}@1", keep=0.3, then=then)
    change = recipes.scaled(recipes.tall(tuned.models, ties(tuned.models), [0.3] * 3, 2), depth(0.5, 0.25))
    close(found, tuned.expected(change))


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("zero", ["majority", "positive", "drop"])
def test_ties_by_stages_has_the_bits_of_the_native_ties(
    tuned: Tuned, tmp_path: Path, aggregate: str, zero: str
) -> None:
    more: dict[str, Any] = {
        "base": f"{tuned.url}@1",
        "keep": 0.3,
        "aggregate": aggregate,
        "zero_sign": zero,
        "scale": 0.3,
    }
    merged(tuned.sources(W), tmp_path / "native", "ties", **more)
    merged(tuned.sources(W), tmp_path / "staged", "ties_pipeline", **more)
    assert images(tmp_path / "native") == images(tmp_path / "staged")


@pytest.mark.parametrize(
    ("bottom", "top", "transition", "shares"),
    [(1, 0, 0, (1.0, 0.0, 0.0, 0.0)), (1, 1, 0, (1.0, 0.0, 0.0, 1.0)), (0, 1, 2, (0.0, 0.5, 0.5, 1.0)),
     (2, 0, 1, (1, 1, 0.5, 0))],
)  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_are_swapped(
    tmp_path: Path, bottom: int, top: int, transition: int, shares: Sequence[float], stacked: bool
) -> None:
    """The share of the second source by layer, in tensors of their own or along an axis of one tensor."""
    shapes = {"blocks.w": (4, 3, 2)} if stacked else {f"blocks.{i}.w": (3, 2) for i in range(4)}
    first = save(tmp_path / "run", 5, random_arrays(0, {**shapes, "head": (3,)}))
    second = save(tmp_path / "run", 2, random_arrays(1, {**shapes, "head": (3,)}))
    named = [f"{tmp_path}/run@5", f"{tmp_path}/run@2"]
    more: dict[str, Any] = {"stacked": r"blocks\.w"} if stacked else {}
    found, _ = merged(
        named, tmp_path / "out", "layer_swap", bottom=bottom, top=top, transition=transition, outside=0.25, **more
    )
    expected = {"head": 0.75 * doubles(first, "head") + 0.25 * doubles(second, "head")}
    if stacked:
        share = np.array(shares)[:, None, None]
        expected["blocks.w"] = (1 - share) * doubles(first, "blocks.w") + share * doubles(second, "blocks.w")
    else:
        for i, share in enumerate(shares):
            expected[f"blocks.{i}.w"] = (1 - share) * doubles(first, f"blocks.{i}.w") + share * doubles(
                second, f"blocks.{i}.w"
            )
    close(found, {n: cast(a, torch.float32) for n, a in expected.items()})


def test_stacked_layers_are_scaled_along_their_axis(tmp_path: Path) -> None:
    base = save(tmp_path / "run", 1, random_arrays(0, {"blocks.w": (2, 5, 3)}))
    one = save(tmp_path / "run", 2, random_arrays(1, {"blocks.w": (2, 5, 3)}))
    more: dict[str, Any] = {"stacked": "blocks", "axis": 1, "alpha": 0.2, "beta": 0.8}
    found, _ = merged(f"{tmp_path}/run@2", tmp_path / "out", "lines", base=f"{tmp_path}/run@1", **more)
    factor = (0.2 + 0.8 * (np.arange(5) / 4))[None, :, None]
    change = doubles(one, "blocks.w") - doubles(base, "blocks.w")
    same(found, {"blocks.w": cast(doubles(base, "blocks.w") + factor * change, torch.float32)})


EVERY = sorted(
    name
    for name in registry.known()
    if issubclass(registry.find(name), pipeline.Staged)
    and name not in ("fisher", "ota", "ffg", "layer_swap", "pipeline")
)


def test_every_task_vector_method_is_in_the_table() -> None:
    assert set(EVERY) == {method for method, *_ in BY_NAME}


@pytest.mark.parametrize("method", EVERY)
def test_where_no_source_changed_anything_the_base_stays_bit_for_bit(tmp_path: Path, method: str) -> None:
    arrays = random_arrays(3)
    arrays["embed.weight"][0, :2] = (-0.0, 1e-42)
    saved = [save(tmp_path / "run", step, arrays) for step in (1, 2, 3)]
    more = {"beta": 0.5} if method == "lines" else {}
    found, _ = merged(f"{tmp_path}/run@2..3", tmp_path / "out", method, base=f"{tmp_path}/run@1", **more)
    same(found, saved[0])


@pytest.mark.parametrize("method", EVERY)
def test_the_order_in_which_sources_are_named_changes_no_bit(tuned: Tuned, tmp_path: Path, method: str) -> None:
    sources, more = tuned.sources(W), {"beta": 0.5} if method == "lines" else {}
    for number, order in enumerate(((0, 1, 2), (2, 0, 1))):
        named = [sources[i] for i in order]
        ckpt.merge(named, tmp_path / str(number), method=method, base=f"{tuned.url}@1", **more)
    assert images(tmp_path / "0") == images(tmp_path / "1")


@pytest.mark.parametrize(("method", "more"), [("della", {"rescale": "l1"}), ("pcb", {"scope": "layer"})])
def test_where_blocks_end_changes_no_bit(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any]
) -> None:
    """The pipeline works on blocks of its own inside of a tile."""
    made = []
    for number, elements in enumerate((1 << 15, 40)):
        monkeypatch.setattr(pipeline, "BLOCK_ELEMENTS", elements)
        into = tmp_path / f"out{number}"
        ckpt.merge(tuned.sources(), into, method=method, base=f"{tuned.url}@1", **more)
        made.append(images(into))
    assert made[0] == made[1]


def test_what_is_a_weighted_sum_is_read_source_by_source(tuned: Tuned) -> None:
    """Then one accumulator is all that a merge of any number of sources takes."""
    for method, more in (
        ("task_arithmetic", {}),
        ("lines", {"beta": 0.5}),
        ("pipeline", {"stages": [{"combine": "mean"}]}),
    ):
        recipe = {
            "recipe": 1,
            "sources": tuned.sources(),
            "base": f"{tuned.url}@1",
            "combine": {"method": method, **more},
        }
        with ckpt.plan_merge(recipe) as plan:
            assert {tensor.kind for tensor in plan.tensors} == {"linear"}, method


# refusals

TWO_COMBINE = [{"combine": "sum"}, {"combine": "mean"}]


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        *[({"method": name, **({"beta": 1} if name == "lines" else {})}, "no-base", "needs a base") for name in EVERY],
        ({"method": "lines", "base": True}, "no-beta", "needs `beta`"),
        ({"method": "layer_swap", "bottom": 1, "top": 1}, "wrong-number", "is for two sources, found 3"),
        ({"method": "layer_swap"}, "bad-recipe", "needs `bottom`, `top`"),
        ({"method": "ties_pipeline", "base": True, "keep": 0}, "bad-recipe", "above 0 and at most 1"),
        ({"method": "dare", "base": True, "keep": 1.5}, "bad-recipe", "above 0 and at most 1"),
        ({"method": "dare", "base": True, "rescale": "l3"}, "bad-recipe", "must be one of"),
        ({"method": "della", "base": True, "keep": 0.3, "spread": 0.4}, "bad-recipe", "every chance above 0"),
        ({"method": "breadcrumbs", "base": True, "keep": 0.9, "out": 0.2}, "bad-recipe", "at most 1"),
        ({"method": "consensus", "base": True, "least": 4}, "wrong-number", "wants 4 of 3 sources"),
        ({"method": "consensus", "base": True, "thresholds": [1, 2]}, "wrong-number", "2 thresholds are given for 3"),
        ({"method": "lines", "base": True, "beta": 1, "layer": "block([0-9]+)"}, "no-layers", "no tensor's name says"),
        ({"method": "lines", "base": True, "beta": 1, "layer": "block("}, "bad-recipe", "no regular expression"),
        ({"method": "pipeline", "base": True}, "bad-recipe", "needs `stages`"),
        ({"method": "pipeline", "base": True, "stages": []}, "bad-recipe", "has one stage `combine`, found 0"),
        ({"method": "pipeline", "base": True, "stages": TWO_COMBINE}, "bad-recipe", "has one stage `combine`, found 2"),
        ({"method": "pipeline", "base": True, "stages": [{"combin": "sum"}]}, "bad-recipe", "a stage is said by one of"),
        ({"method": "pipeline", "base": True, "stages": [{"combine": "summ"}]}, "bad-recipe", "unknown stage `combine: summ`"),
        (
            {"method": "pipeline", "base": True, "stages": [{"combine": "sum"}, {"sparsify": "top_k"}]},
            "bad-recipe",
            "`sparsify: top_k` stands after `combine`, and belongs before it",
        ),
        (
            {"method": "pipeline", "base": True, "stages": [{"sparsify": "top_k", "kep": 0.2}, {"combine": "sum"}]},
            "bad-recipe",
            "stage `sparsify: top_k` has no parameter `kep`",
        ),
        ({"method": "task_arithmetic", "base": True, "then": [{"combine": "sum"}]}, "bad-recipe", "one stage `combine`"),
    ],
    ids=lambda x: str(x)[:70],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_read(
    tuned: Tuned, tmp_path: Path, more: dict[str, Any], kind: str, message: str
) -> None:
    for step, seed in ((1, 99), (10, 0), (20, 1), (30, 2)):
        save(tmp_path / "run", step, random_arrays(seed))
    given = {**more, "base": f"{tmp_path}/run@1"} if more.get("base") else more
    error = refused(InvalidInputError, f"{tmp_path}/run@10..30", tmp_path, **given)
    assert (error.kind, message in error.message) == (kind, True), error.message


def test_a_wrong_stage_of_a_recipe_says_its_line(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, random_arrays(0))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"recipe: 1\nsources: ['{tmp_path}/run@1']\nbase: {tmp_path}/run@1\ncombine:\n  method: pipeline\n  stages:\n"
        "    - {sparsify: top_k, keep: 0.2}\n    - {consensus: sing}\n    - {combine: sum}\n",
        encoding="utf-8",
    )
    error = refused(InvalidInputError, recipe, tmp_path)
    assert "recipe.yaml line 8" in error.message and "`sign`" in error.hints[0], error


def test_every_stage_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "merge-stages.md").read_text(encoding="utf-8")
    lacking = [f"{family}: {kind}" for family, kind in known_stages() if f"`{family}: {kind}`" not in page]
    assert lacking == []
