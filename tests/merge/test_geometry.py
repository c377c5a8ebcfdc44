"""Methods that look at lengths and angles: against their formulas over whole arrays, and at the edges where there is no angle.

Method: each formula written again with dense vectors in NumPy (the methods themselves work on dot products); small runs.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.errors import CheckpointError, InvalidInputError
from tests.merge.samples import cast, doubles, merged, random_arrays, same, save

Array = NDArray[np.float64]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[Tensors], Tensors]:
    """Three fine-tunes at steps 10, 20, 30 of a base at step 1."""
    base = random_arrays(99)
    sources = []
    for i in range(3):
        change = random_arrays(i, scale=0.1 * (i + 1))
        sources.append(save(tmp_path / "run", 10 * (i + 1), {n: base[n] + change[n] for n in base}))
    return tmp_path / "run", sources, save(tmp_path / "run", 1, base)


def weighed(url: Path, weights: list[float]) -> list[dict[str, Any]]:
    """Sources 10, 20, ... with weights."""
    return [{"run": str(url), "steps": 10 * (i + 1), "weight": weight} for i, weight in enumerate(weights)]


def near(found: Tensors, expected: dict[str, Array], rtol: float = 3e-7, atol: float = 2e-7) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=rtol, atol=atol, err_msg=name)


def sphere_mean(vectors: list[Array], weights: list[float], steps: int) -> Array:
    """Logarithm at the mean direction, weighted mean of that, exponential; `steps` times."""
    shares = np.array(weights) / sum(weights)
    norms = [np.linalg.norm(v) for v in vectors]
    if min(norms) < 1e-8:
        return np.asarray(sum(w * v for w, v in zip(shares, vectors, strict=True)))
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    point = sum(w * u for w, u in zip(shares, units, strict=True))
    point = point / np.linalg.norm(point)
    for _ in range(steps):
        way = np.zeros_like(point)
        for weight, unit in zip(shares, units, strict=True):
            cosine = np.clip(np.vdot(point, unit), -1, 1)
            across = unit - cosine * point
            if np.linalg.norm(across) > 1e-12:
                way += weight * math.acos(cosine) * across / np.linalg.norm(across)
        far = np.linalg.norm(way)
        if far > 0:
            point = math.cos(far) * point + math.sin(far) * way / far
    return np.asarray(point * np.dot(shares, norms))


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize(("method", "steps"), [("multislerp", 1), ("karcher", 10)])
def test_means_on_the_sphere_are_their_recipe(run: Any, tmp_path: Path, method: str, steps: int, deltas: bool) -> None:
    url, sources, base = run
    weights = [0.5, 1.0, 2.0]
    extra: dict[str, Any] = {"deltas": True, "base": f"{url}@1"} if deltas else {}
    extra |= {"tolerance": 1e-300} if method == "karcher" else {}
    found, _ = merged(weighed(url, weights), tmp_path / "out", method, **extra)
    expected = {}
    for name in base:
        start = doubles(base, name) if deltas else 0.0
        mean = sphere_mean([(doubles(s, name) - start).reshape(-1) for s in sources], weights, steps)
        expected[name] = start + mean.reshape(tuple(base[name].shape))
    near(found, expected)


def test_two_sources_of_one_length_meet_where_slerp_does(tmp_path: Path) -> None:
    """The mean on the sphere of two points is the point of the arc between them that their weights say."""
    arrays = random_arrays(0)
    save(tmp_path / "run", 10, arrays)
    save(tmp_path / "run", 20, {name: np.flip(array) for name, array in arrays.items()})
    url = tmp_path / "run"
    named = weighed(url, [0.3, 0.7])
    arc, _ = merged(f"{url}@10..20", tmp_path / "arc", "slerp", t=0.7)
    same_arc, _ = merged(named, tmp_path / "nuslerp", "nuslerp")
    same(same_arc, arc)
    mean, _ = merged(named, tmp_path / "karcher", "karcher", tolerance=1e-12, steps_max=100)
    near(mean, {name: tensor.double().numpy() for name, tensor in arc.items()}, atol=1e-6)


@pytest.mark.parametrize("deltas", [False, True])
def test_nuslerp_of_rows(run: Any, tmp_path: Path, deltas: bool) -> None:
    url, sources, base = run
    named = [weighed(url, [1.0])[0], weighed(url, [0.0, 0.0, 3.0])[2]]
    extra: dict[str, Any] = {"deltas": True, "base": f"{url}@1"} if deltas else {}
    found, _ = merged(named, tmp_path / "out", "nuslerp", vector="row", **extra)
    for name in base:
        start = doubles(base, name) if deltas else np.zeros(tuple(base[name].shape))
        one, other = (np.atleast_1d(doubles(s, name) - start) for s in (sources[0], sources[2]))
        out = np.zeros_like(one)
        for index in np.ndindex(one.shape[:-1]):
            a, b = one[index], other[index]
            cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
            if abs(cosine) > 0.9995:
                out[index] = 0.25 * a + 0.75 * b
            else:
                angle = math.acos(cosine)
                out[index] = (math.sin(0.25 * angle) * a + math.sin(0.75 * angle) * b) / math.sin(angle)
        near({name: found[name]}, {name: start + out.reshape(start.shape)})


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_opposite_sources_have_no_mean_on_the_sphere(tmp_path: Path, method: str) -> None:
    for step, sign in ((1, 1.0), (2, -1.0)):
        save(tmp_path / "run", step, {"fine": np.ones(3, np.float32), "odd": np.full(4, sign, np.float32)})
    with pytest.raises(CheckpointError, match=r"`model/odd`: its sources point in opposite directions") as caught:
        ckpt.merge(f"{tmp_path}/run@1..2", tmp_path / "out", method=method)
    assert caught.value.kind == "no-direction"
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_a_source_opposite_to_the_mean_is_refused(tmp_path: Path) -> None:
    for step, sign in ((1, 1.0), (2, 1.0), (3, -1.0)):
        save(tmp_path / "run", step, {"odd": np.full(4, sign, np.float32)})
    with pytest.raises(CheckpointError, match="opposite to their mean"):
        ckpt.merge(f"{tmp_path}/run@1..3", tmp_path / "out", method="multislerp")


def test_weights_of_the_sphere_may_not_be_negative(run: Any, tmp_path: Path) -> None:
    url, _, _ = run
    with pytest.raises(InvalidInputError, match="0 and above"):
        ckpt.merge(weighed(url, [1, 1, -1]), tmp_path / "out", method="karcher")


def test_a_source_with_weight_zero_is_not_there(run: Any, tmp_path: Path) -> None:
    url, _, _ = run
    three = weighed(url, [1, 0, 2])
    found, _ = merged(three, tmp_path / "three", "multislerp")
    two, _ = merged([three[0], three[2]], tmp_path / "two", "multislerp")
    same(found, two)
    one, _ = merged(weighed(url, [0, 2]), tmp_path / "one", "nuslerp")
    same(one, run[1][1])


def test_a_zero_tensor_makes_the_mean_a_line(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, {"w": np.zeros(4, np.float32)})
    save(tmp_path / "run", 2, {"w": np.ones(4, np.float32)})
    for number, method in enumerate(("multislerp", "karcher", "nuslerp")):
        found, _ = merged(f"{tmp_path}/run@1..2", tmp_path / f"out{number}", method)
        assert found["w"].tolist() == [0.5] * 4


# model stock


def test_model_stock_is_its_recipe(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "model_stock", base=f"{url}@1")
    expected = {}
    for name in base:
        deltas = [(doubles(s, name) - doubles(base, name)).reshape(-1) for s in sources]
        pairs = [
            np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) if a.size else 0.0
            for a, b in itertools.combinations(deltas, 2)
        ]
        cosine = max(0.0, float(np.mean(pairs)))
        t = 3 * cosine / (1 + 2 * cosine)
        mean = sum(doubles(s, name) for s in sources) / 3
        expected[name] = t * mean + (1 - t) * doubles(base, name)
    near(found, expected)


def test_model_stock_of_changes_that_disagree_is_the_base(tmp_path: Path) -> None:
    base = np.array([1.0, 2.0, 3.0], np.float32)
    save(tmp_path / "run", 1, {"w": base, "still": base})
    save(tmp_path / "run", 2, {"w": base + np.float32(1), "still": base})
    save(tmp_path / "run", 3, {"w": base - np.float32(1), "still": base})
    found, _ = merged(f"{tmp_path}/run@2..3", tmp_path / "out", "model_stock", base=f"{tmp_path}/run@1")
    assert found["w"].tolist() == base.tolist() and found["still"].tolist() == base.tolist()


# sce


def sce_reference(deltas: list[Array], select: float) -> Array:
    stack = np.stack(deltas)
    if select < 1:
        spread = np.sqrt(((stack - stack.mean(axis=0)) ** 2).mean(axis=0)).astype(np.float32)
        varying = np.count_nonzero(spread)
        if varying:
            least = np.sort(spread.reshape(-1))[::-1][max(1, int(select * varying)) - 1]
            stack = np.where(spread >= least, stack, 0.0)
    squares = (stack**2).reshape(len(stack), -1).sum(axis=1)
    weights = squares / squares.sum() if squares.sum() else np.full(len(stack), 1 / len(stack))
    sign = np.where(stack.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(stack) == sign
    shape = (-1, *[1] * (stack.ndim - 1))
    down = (weights.reshape(shape) * agree).sum(axis=0)
    up = (weights.reshape(shape) * stack * agree).sum(axis=0)
    return np.divide(up, down, out=np.zeros_like(up), where=down > 0)


@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_sce_is_its_recipe(run: Any, tmp_path: Path, select: float) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "sce", base=f"{url}@1", select=select)
    expected = {
        n: doubles(base, n) + sce_reference([doubles(s, n) - doubles(base, n) for s in sources], select)
        for n in base
        if base[n].numel()
    }
    near(found, expected)


# widen


def widen_reference(name: str, arrays: list[Array], base: Array) -> Array:
    """Columns of matrices (rows of embeddings), elements of vectors, as its paper has it."""
    if base.ndim > 2:
        return np.asarray(sum(a - base for a in arrays) / len(arrays))
    if base.ndim < 2:
        return np.asarray(
            (scores(np.stack([np.abs(a - base).reshape(-1) for a in arrays])).reshape(-1, *base.shape))
            * np.stack([a - base for a in arrays])
        ).sum(axis=0)
    axis = 1 if "embed" in name else 0
    own, start = np.stack([np.linalg.norm(a, axis=axis) for a in arrays]), np.linalg.norm(base, axis=axis)
    dots = np.stack([(a * base).sum(axis=axis) for a in arrays])
    with np.errstate(invalid="ignore"):
        turned = np.nan_to_num(1 - dots / (own * start), nan=1.0)
    turned[:, start == 0] = np.where(own[:, start == 0] == 0, 0.0, 1.0)
    weights = 0.5 * (scores(np.abs(own - start)) + scores(turned))
    spread = weights[:, :, None] if axis else weights[:, None, :]
    return np.asarray((spread * np.stack([a - base for a in arrays])).sum(axis=0))


def scores(changes: Array) -> Array:
    num = changes.shape[1]
    places = np.stack([np.argsort(np.argsort(row, kind="stable"), kind="stable") for row in changes])
    soft = np.exp(places / num) / np.exp(places / num).sum(axis=0)
    return np.where(
        2 * places > num - 1, 1.0, soft
    )  # above the mean place; as fractions, rounding decides at the mean itself


def test_widen_is_its_recipe(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "widen", base=f"{url}@1")
    expected = {
        n: doubles(base, n) + widen_reference(n, [doubles(s, n) for s in sources], doubles(base, n))
        for n in base
        if base[n].numel()
    }
    near(found, expected)


def test_widen_of_zero_columns(tmp_path: Path) -> None:
    """A column that is zero in the base, in a source, or in all."""
    base = random_arrays(1, {"w": (6, 5)})["w"]
    base[:, [0, 1]] = 0
    sources = [random_arrays(i, {"w": (6, 5)})["w"] for i in (2, 3)]
    sources[0][:, [1, 2]] = 0
    sources[1][:, 1] = 0
    save(tmp_path / "run", 1, {"w": base})
    tensors = [save(tmp_path / "run", 2 + i, {"w": array}) for i, array in enumerate(sources)]
    found, _ = merged(f"{tmp_path}/run@2..3", tmp_path / "out", "widen", base=f"{tmp_path}/run@1")
    expected = base.astype(np.float64) + widen_reference(
        "w", [doubles(t, "w") for t in tensors], base.astype(np.float64)
    )
    near(found, {"w": expected})


# all of them


GOLDEN = Path(__file__).resolve().parents[1] / "data" / "merge" / "geometry.npz"
MERGEKIT: list[tuple[str, str, list[float], dict[str, Any]]] = [  # case, our method, weights, parameters
    ("slerp", "slerp", [1, 1], {"t": 0.3}),
    ("nuslerp", "nuslerp", [1, 3], {}),
    ("karcher", "karcher", [1, 1, 1], {}),
    ("multislerp", "multislerp", [0.5, 1, 2], {"ways": "chord"}),
    ("model_stock", "model_stock", [1, 1, 1], {"base": "base"}),
    ("sce", "sce", [1, 1, 1], {"base": "base", "select": 0.4}),
    ("sce_all", "sce", [1, 1, 1], {"base": "base", "select": 1.0}),
]


@pytest.mark.parametrize(("case", "method", "weights", "more"), MERGEKIT)
def test_mergekit_makes_the_same(
    tmp_path: Path, case: str, method: str, weights: list[float], more: dict[str, Any]
) -> None:
    """In fp32 throughout, where we compute in fp64: to some 1e-6 of the largest element."""
    golden = np.load(GOLDEN)
    models = ("one", "two", "three")[: len(weights)]
    for number, model in enumerate(("base", *models)):
        found = {key.split("/")[1]: golden[key] for key in golden.files if key.startswith(f"{model}/")}
        save(tmp_path / "run", number, found)
    if "base" in more:
        more = {**more, "base": f"{tmp_path}/run@0"}
    sources = [{"run": str(tmp_path / "run"), "steps": 1 + i, "weight": w} for i, w in enumerate(weights)]
    found, _ = merged(sources, tmp_path / "out", method, **more)
    near(found, {name: golden[f"{case}/{name}"] for name in ("w", "norm", "conv")}, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock", "sce", "slerp", "nuslerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_sources_come_out_as_they_are(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    num = 2 if method in ("slerp", "nuslerp") else 3
    arrays = random_arrays(0)
    tensors = [save(tmp_path / "run", 10 + i, arrays, dtype=dtype) for i in range(num)]
    save(tmp_path / "run", 1, random_arrays(5), dtype=dtype)
    extra = {"base": f"{tmp_path}/run@1"} if method in ("model_stock", "sce") else {}
    found, _ = merged(f"{tmp_path}/run@10..12", tmp_path / "out", method, **extra)
    same(found, tensors[0])


@pytest.mark.parametrize("method", ["slerp", "model_stock", "sce", "widen", "tsv_m", "opcm", "doge"])
def test_weights_are_refused_by_methods_that_do_not_look_at_them(run: Any, tmp_path: Path, method: str) -> None:
    url, _, _ = run
    with pytest.raises(InvalidInputError, match="does not look at weights"):
        ckpt.merge(weighed(url, [1.0, 0.5]), tmp_path / "out", method=method, base=f"{url}@1")


def test_casts_are_made_once(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10", tmp_path / "out", "widen", base=f"{url}@1", above=0.0, rows=["nothing"])
    name = "layers.0.norm.weight"
    deltas = doubles(sources[0], name) - doubles(base, name)
    same({name: found[name]}, {name: cast(doubles(base, name) + deltas, torch.float32)})
