"""Fisher, OTA and FFG with the second moments that a training checkpoint holds, against straightforward NumPy.

Method: small models trained by Adam, AMSGrad and Adafactor of torch, saved with their optimizers by `ckpt.save`; the reference
works on whole tensors read back one by one. Then: other layouts, sources without slots, and what is said before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import reshard
from ckpt.errors import InvalidInputError
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Rule, ShardStep, Where
from ckpt.store.open import open_store
from tests.merge import recipes
from tests.merge.recipes import Model
from tests.merge.samples import cast, images, merged, opened
from tests.merge.test_refusals import refused
from tests.merge.test_task_vectors import close

Array = NDArray[np.float64]
STEPS = (10, 20, 30)
COUNTS = (2, 3, 7)  # of optimizer steps: bias matters
Make = Callable[[Any], torch.optim.Optimizer]


def adam(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, betas=(0.9, 0.98), **more)


def adafactor(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=1e-2)


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 5))


def train(url: Path, make: Make, *, first: int = 0) -> None:
    """A base at step 1 without an optimizer, and three runs from it with one."""
    base = model_of(0)
    ckpt.save({"model": base}, url, step=1)
    for step, count in zip(STEPS[first:], COUNTS[first:], strict=True):
        model = model_of(0)
        optimizer = make(model.parameters())
        torch.manual_seed(step)
        for _ in range(count):
            optimizer.zero_grad()
            inputs = torch.randn(16, 7)
            inputs[:, 3] = 0  # a feature that never comes: its moments are zero
            model(inputs).square().mean().backward()
            optimizer.step()
        ckpt.save({"model": model, "optimizer": optimizer}, url, step=step)


@pytest.fixture(scope="module")
def adam_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("adam") / "run"
    train(url, adam)
    return url


PARAMS = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")


def floats(url: Path, step: int, names: Mapping[str, str]) -> Model:
    found = opened(url, step)
    return {name: found[stored].double().numpy() for name, stored in names.items()}


def params(url: Path, step: int) -> Model:
    return floats(url, step, {name: name for name in PARAMS})


def moments(url: Path, slot: str = "exp_avg_sq") -> list[Model]:
    return [floats(url, step, {name: f"optimizer/{name}/{slot}" for name in PARAMS}) for step in STEPS]


def corrected(found: list[Model]) -> list[Model]:
    return [{n: v / (1 - 0.98**count) for n, v in one.items()} for one, count in zip(found, COUNTS, strict=True)]


def powers(found: list[Model], power: float, *, mean: bool = False, eps: float = 1e-26) -> list[Model]:
    made = [{n: v**power for n, v in one.items()} for one in found]
    if mean:
        made = [{n: v / (v.mean() or 1.0) for n, v in one.items()} for one in made]
    return [{n: v + eps for n, v in one.items()} for one in made]


def by_norm(found: list[Model]) -> list[Model]:
    norms = [np.sqrt(sum((v**2).sum() for v in one.values())) for one in found]
    return [{n: v / norm + 1e-26 for n, v in one.items()} for one, norm in zip(found, norms, strict=True)]


def rounded(model: Model) -> dict[str, torch.Tensor]:
    return {n: cast(a, torch.float32) for n, a in model.items()}


def only(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: found[name] for name in PARAMS}


CASES: list[tuple[str, dict[str, Any], Callable[[list[Model]], list[Model]]]] = [
    ("fisher", {}, lambda v: by_norm(corrected(v))),
    ("fisher", {"normalize": "none", "eps": 1e-6, "bias_correction": "never"}, lambda v: powers(v, 1, eps=1e-6)),
    ("ota", {}, lambda v: powers(corrected(v), 0.5)),
    ("ota", {"power": 0.25, "normalize": "mean"}, lambda v: powers(corrected(v), 0.25, mean=True)),
    ("ota", {"bias_correction": "never", "power": 0.125}, lambda v: powers(v, 0.125)),
    ("ota", {"power": 0}, lambda v: [{n: np.ones_like(a) for n, a in one.items()} for one in v]),
]


@pytest.mark.parametrize(("method", "more", "importance"), CASES, ids=lambda x: str(x)[:50])
@pytest.mark.parametrize("with_base", [False, True])
def test_each_element_is_weighed_by_its_second_moment(
    adam_run: Path, tmp_path: Path, method: str, more: dict[str, Any], importance: Any, with_base: bool
) -> None:
    base = {"base": f"{adam_run}@1"} if with_base else {}
    found, _ = merged(f"{adam_run}@10..30", tmp_path / "out", method, **more, **base)
    start = params(adam_run, 1) if with_base else {n: np.zeros(()) for n in PARAMS}
    models = [{n: a - start[n] for n, a in params(adam_run, step).items()} for step in STEPS]
    mean = recipes.weighted_mean(models, importance(moments(adam_run)))
    close(only(found), rounded({n: start[n] + a for n, a in mean.items()}))
    buffers = [opened(adam_run, step)["1.running_mean"].double().numpy() for step in STEPS]
    np.testing.assert_allclose(found["1.running_mean"].numpy(), sum(buffers) / 3, rtol=3e-7)


def test_elements_that_no_gradient_reached_are_the_mean(adam_run: Path, tmp_path: Path) -> None:
    found, _ = merged(f"{adam_run}@10..30", tmp_path / "out", "ota")
    columns = [params(adam_run, step)["0.weight"][:, 3] for step in STEPS]
    assert all((v["0.weight"][:, 3] == 0).all() for v in moments(adam_run))
    close({"column": found["0.weight"][:, 3]}, rounded({"column": sum(columns) / 3}))


def salient(models: list[Model], v: list[Model], keep: float) -> list[Model]:
    scores = [{n: np.sqrt(v[i][n]) * np.abs(a) for n, a in one.items()} for i, one in enumerate(models)]
    kept = recipes.top_k(scores, keep, "model")
    return [{n: np.where(kept[i][n] > 0, a, 0.0) for n, a in one.items()} for i, one in enumerate(models)]


@pytest.mark.parametrize("aggregate", ["ota", "mean", "ties"])
def test_ffg_merges_what_is_salient(adam_run: Path, tmp_path: Path, aggregate: str) -> None:
    rule = [{"match": "model/1.running_*", "policy": "newest"}]  # buffers are part of the model-wide share otherwise
    found, _ = merged(
        f"{adam_run}@10..30", tmp_path / "out", "ffg", base=f"{adam_run}@1", keep=0.3, aggregate=aggregate, rules=rule
    )
    base, v = params(adam_run, 1), corrected(moments(adam_run))
    models = [{n: a - base[n] for n, a in params(adam_run, step).items()} for step in STEPS]
    kept = salient(models, v, 0.3)
    if aggregate == "ota":
        weights = [
            {n: np.where(kept[i][n] != 0, p, 0.0) for n, p in one.items()} for i, one in enumerate(powers(v, 0.5))
        ]
        change = recipes.weighted_mean(kept, weights)
    elif aggregate == "mean":
        change = recipes.mean_of_nonzero(kept, [1.0] * 3)
    else:
        change = recipes.mean_of_nonzero(recipes.elected(kept, [1.0] * 3, zero="majority", scope="model"), [1.0] * 3)
    close(only(found), rounded({n: np.where(change[n] == 0, base[n], base[n] + change[n]) for n in base}))
    untouched = np.all([one["2.weight"] == 0 for one in kept], axis=0)
    assert untouched.any() and (found["2.weight"].numpy()[untouched] == base["2.weight"][untouched]).all()


def test_factors_of_adafactor_stand_for_the_moment(tmp_path: Path) -> None:
    """Rank one: rows times columns over the mean of the rows. Vectors have a full moment."""
    url = tmp_path / "run"
    train(url, adafactor)
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "ota")
    v: list[Model] = []
    for step in STEPS:
        stored = {n: t.double().numpy() for n, t in opened(url, step).items() if n.startswith("optimizer/")}
        made = {}
        for name in PARAMS:
            slot = f"optimizer/{name}/"
            if slot + "row_var" in stored:
                rows, columns = stored[slot + "row_var"], stored[slot + "col_var"]
                made[name] = rows / rows.mean(axis=-2, keepdims=True) * columns
            else:
                made[name] = stored[slot + "variance"]
        v.append(made)
    assert v[0]["0.weight"].shape == (12, 7)
    models = [params(url, step) for step in STEPS]
    close(only(found), rounded(recipes.weighted_mean(models, powers(v, 0.5))))


def test_amsgrad_has_a_second_moment_of_its_own(tmp_path: Path) -> None:
    url = tmp_path / "run"
    train(url, lambda p: adam(p, amsgrad=True))
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "ota", moment="max_exp_avg_sq", bias_correction="never")
    models = [params(url, step) for step in STEPS]
    close(only(found), rounded(recipes.weighted_mean(models, powers(moments(url, "max_exp_avg_sq"), 0.5))))


def layout(kind: str) -> Layout:
    """Cuts of tensor parallelism, and one of the second moments alone, as ZeRO has it."""
    match, dim = {"rows": ("0.weight", 0), "columns": ("*.weight", 1), "slots": ("optimizer/*.weight/exp_avg_sq", 0)}[
        kind
    ]
    names = ("0.weight", "2.weight") if match == "*.weight" else (match.replace("*", "{0,2}"),)
    cut = Rule(match=tuple(map(NamePattern, names)), where=Where(shard=(ShardStep(axis="a", dim=dim),)))
    rest = Rule(match=(NamePattern("**"),), where=Where())
    return Layout(mesh=Mesh(axes=(("a", 3),)), rules=(cut, rest))


@pytest.mark.parametrize("method", ["fisher", "ota", "ffg"])
def test_layouts_of_optimizer_state_change_no_bit(adam_run: Path, tmp_path: Path, method: str) -> None:
    base = {"base": f"{adam_run}@1"}
    merged(f"{adam_run}@10..30", tmp_path / "whole", method, **base)
    options = Options()
    for step, kind in zip(STEPS, ("rows", "columns", "slots"), strict=True):
        stored = StoredCheckpoint(open_store(adam_run, options=options), step, options)
        reshard(stored, open_store(tmp_path / "cut", options=options), layout(kind), options=options)
    merged(f"{tmp_path}/cut@10..30", tmp_path / "out", method, **base)
    assert images(tmp_path / "out") == images(tmp_path / "whole")


# sources that lack something


def test_parameters_without_a_moment_are_refused_and_named(tmp_path: Path) -> None:
    url = tmp_path / "run"
    train(url, lambda p: torch.optim.SGD(p, lr=1e-3))
    for method in ("fisher", "ota", "ffg"):
        base = {"base": f"{url}@1"} if method == "ffg" else {}
        error = refused(InvalidInputError, f"{url}@10..30", tmp_path, method=method, **base)
        assert error.kind == "no-slots" and "18 parameters" in error.message and "`model/0.weight` of" in error.message
        assert any("missing: mean" in hint for hint in error.hints)


def test_a_source_without_its_optimizer_is_named(adam_run: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", adam, first=1)
    ckpt.save({"model": model_of(3)}, tmp_path / "run", step=10)
    error = refused(InvalidInputError, f"{tmp_path}/run@10..30", tmp_path, method="ota")
    assert error.kind == "no-slots" and "6 parameters" in error.message and f"{tmp_path}/run@10" in error.message
    assert f"{tmp_path}/run@20" not in error.message


def test_missing_moments_may_count_alike(tmp_path: Path) -> None:
    url = tmp_path / "run"
    train(url, lambda p: torch.optim.SGD(p, lr=1e-3))
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "ota", missing="mean")
    mean, _ = merged(f"{url}@10..30", tmp_path / "mean", "uniform")
    close(only(found), only(mean))


def test_bias_that_only_some_sources_can_correct_is_refused(tmp_path: Path) -> None:
    """One source's optimizer does not say its beta2. (It says the rest in its image: the images stay.)"""
    url = tmp_path / "run"
    train(url, adam)
    model = model_of(0)
    optimizer = adam(model.parameters())
    model(torch.randn(8, 7)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["betas"] = None
    ckpt.save({"model": model, "optimizer": optimizer}, url, step=25)
    with pytest.raises(InvalidInputError, match="corrected in some sources and not in others") as caught:
        ckpt.merge(f"{url}@10..30", tmp_path / "out", method="ota")
    assert caught.value.kind == "no-hyperparameters" and "bias_correction: never" in caught.value.hints[0]
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("method", "more", "kind", "message"),
    [
        ("ffg", {}, "no-base", "needs a base"),
        ("ota", {"power": 0.3}, "bad-recipe", "multiple of 1/8"),
        ("ota", {"eps": 0}, "bad-recipe", "`eps` must be above 0"),
        ("ota", {"moment": "exp_avg"}, "bad-recipe", "must be one of"),
        ("ffg", {"base": True, "keep": 0.5, "least": 1.0}, "bad-recipe", "either `keep` or `least`"),
        ("fisher", {"weights": (1, -0.5, 1)}, "negative-weights", "none below 0"),
    ],
)
def test_bad_parameters_are_refused(
    adam_run: Path, tmp_path: Path, method: str, more: dict[str, Any], kind: str, message: str
) -> None:
    given = {**more, "base": f"{adam_run}@1"} if more.get("base") else dict(more)
    weights = given.pop("weights", (1, 1, 1))
    sources = [{"run": f"{adam_run}@{step}", "weight": w} for step, w in zip(STEPS, weights, strict=True)]
    error = refused(InvalidInputError, sources, tmp_path, method=method, **given)
    assert (error.kind, message in error.message) == (kind, True), error.message
