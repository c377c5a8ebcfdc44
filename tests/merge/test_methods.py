"""Methods of every kind against straightforward NumPy, and what an author of methods is promised.

Method: the published recipe written again over whole arrays in fp64; plug-ins by decorator, function and entry point; a method
that records what it is given.
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.merge import compute, registry, spans
from ckpt.merge.method import Constants, Context, Elementwise, Matrix, Needs, Summary
from ckpt.merge.thresholds import place_of
from ckpt.merge.tile import Tile
from tests.merge.samples import bits, cast, doubles, images, merged, opened, random_arrays, same, save, save_run

Array = NDArray[np.float64]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Three fine-tunes at steps 10, 20, 30 of a base at step 1."""
    base = random_arrays(99)
    sources = []
    for i in range(3):
        change = random_arrays(i, scale=0.1)
        sources.append(save(tmp_path / "run", 10 * (i + 1), {n: base[n] + change[n] for n in base}))
    return tmp_path / "run", sources, save(tmp_path / "run", 1, base)


def ties_reference(
    deltas: list[dict[str, Array]], base: dict[str, Array], *, keep: float, scope: str, zero: str, mode: str
) -> dict[str, Array]:
    """TIES as its paper has it: trim by magnitude (ties kept), elect the sign of the sum, merge what agrees."""

    def threshold(one: dict[str, Array], names: list[str]) -> float:
        sizes = np.sort(np.concatenate([np.abs(one[n].astype(np.float32)).reshape(-1) for n in names]))[::-1]
        return float(sizes[max(1, round(keep * len(sizes))) - 1]) if len(sizes) else 0.0

    groups = [list(base)] if scope == "model" else [[n] for n in base]
    out: dict[str, Array] = {}
    for names in groups:
        trimmed = []
        for one in deltas:
            least = threshold(one, names)
            trimmed.append({n: np.where(np.abs(one[n].astype(np.float32)) >= least, one[n], 0.0) for n in names})
        sums = {n: sum(one[n] for one in trimmed) for n in names}
        majority = np.sign(sum(int(np.sign(sums[n]).sum()) for n in names)) or 1
        at_zero = {"majority": majority, "positive": 1, "drop": 0}[zero]
        for n in names:
            sign = np.where(sums[n] == 0, at_zero, np.sign(sums[n]))
            agree = np.stack([np.where(np.sign(one[n]) == sign, one[n], 0.0) for one in trimmed])
            count = np.stack([(np.sign(one[n]) == sign) & (one[n] != 0) for one in trimmed]).sum(axis=0)
            if mode == "mean":
                total = agree[0] + agree[1] + agree[2]
                out[n] = base[n] + total / np.maximum(count, 1)
            elif mode == "sum":
                out[n] = base[n] + (agree[0] + agree[1] + agree[2])
            else:
                out[n] = base[n] + np.abs(agree).max(axis=0) * sign
    return out


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("zero", ["majority", "positive", "drop"])
def test_ties_is_its_recipe(run: Any, tmp_path: Path, scope: str, mode: str, zero: str) -> None:
    url, sources, base = run
    bases = {n: doubles(base, n) for n in base}
    deltas = [{n: doubles(s, n) - bases[n] for n in base} for s in sources]
    expected = ties_reference(deltas, bases, keep=0.3, scope=scope, zero=zero, mode=mode)
    parameters: dict[str, Any] = {"keep": 0.3, "scope": scope, "aggregate": mode, "zero_sign": zero}
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "ties", base=f"{url}@1", **parameters)
    same(found, {n: cast(array, torch.float32) for n, array in expected.items()})


def test_thresholds_of_ties_are_exact_where_magnitudes_repeat() -> None:
    rng = np.random.default_rng(0)
    values = np.round(rng.standard_normal(5000), 1).astype(np.float32)
    size = np.abs(values).view(np.uint32).astype(np.int64)
    for wanted in (1, 2, 500, 2500, 4999, 5000):
        high = np.bincount(size >> 15, minlength=1 << 16).astype(np.uint64)
        place, left = place_of(high, wanted)
        low = np.bincount(size[size >> 15 == place] & 0x7FFF, minlength=1 << 15).astype(np.uint64)
        found = (place << 15) | place_of(low, left)[0]
        assert found == np.sort(size)[::-1][wanted - 1]


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_arc_between_two(run: Any, tmp_path: Path, t: float) -> None:
    url, sources, _ = run
    found, _ = merged([f"{url}@30", f"{url}@10"], tmp_path / "out", "slerp", t=t)
    for name in sources[0]:
        a, b = doubles(sources[0], name), doubles(sources[2], name)
        cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) if a.size else 1.0
        if cosine > 0.9995:
            expected = (1 - t) * a + t * b
        else:
            angle = math.acos(cosine)
            expected = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=3e-7, atol=1e-7)


def test_slerp_of_opposite_and_of_zero_tensors_is_a_line(tmp_path: Path) -> None:
    one = {"opposite": np.ones(4, np.float32), "zero": np.zeros(3, np.float32)}
    other = {"opposite": -np.ones(4, np.float32), "zero": np.ones(3, np.float32)}
    save(tmp_path / "run", 1, one)
    save(tmp_path / "run", 2, other)
    found, _ = merged(f"{tmp_path}/run@1..2", tmp_path / "out", "slerp", t=0.25)
    assert found["opposite"].tolist() == [0.5] * 4 and found["zero"].tolist() == [0.25] * 3


def test_tsv_m_is_its_recipe(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "tsv_m", base=f"{url}@1", scale=0.7)

    def polar(matrix: Array) -> Array:
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        return np.asarray(u @ v)

    for name in base:
        deltas = [doubles(s, name) - doubles(base, name) for s in sources]
        if deltas[0].ndim == 2 and deltas[0].size:
            kept = min(deltas[0].shape) // 3
            factors = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
            u = polar(np.concatenate([f[0][:, :kept] for f in factors], axis=1))
            v = polar(np.concatenate([f[2][:kept] for f in factors], axis=0))
            change = u @ np.diag(np.concatenate([f[1][:kept] for f in factors])) @ v
        else:
            change = sum(deltas) / 3
        np.testing.assert_allclose(found[name].numpy(), doubles(base, name) + 0.7 * change, rtol=2e-6, atol=1e-6)


# authors of methods


def test_a_plain_function_is_an_elementwise_method(run: Any, tmp_path: Path) -> None:
    url, sources, _ = run

    def median(arrays: list[Array], weights: Array, *, shift: float = 0.0) -> Array:
        return np.median(np.stack(arrays), axis=0) + shift

    found, _ = merged(f"{url}@10..30", tmp_path / "out", median, shift=2.0)
    for name in sources[0]:
        expected = np.median(np.stack([doubles(s, name) for s in sources]), axis=0) + 2.0
        assert bits(found[name]) == bits(cast(expected, torch.float32))


def test_a_function_that_needs_a_base_is_given_changes(run: Any, tmp_path: Path) -> None:
    url, sources, base = run

    @ckpt.merge_method("double_change", needs=Needs(base=True))
    def double(arrays: list[Array], weights: Array) -> Array:
        return 2 * arrays[0]

    found, _ = merged(f"{url}@10", tmp_path / "out", "double_change", base=f"{url}@1")
    for name in base:
        change = doubles(sources[0], name) - doubles(base, name)
        assert bits(found[name]) == bits(cast(doubles(base, name) + 2 * change, torch.float32))
    with pytest.raises(InvalidInputError, match="needs a base"):
        ckpt.merge(f"{url}@10", tmp_path / "other", method="double_change")


def test_methods_of_packages_come_by_entry_point(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, sources, _ = run
    entry = importlib.metadata.EntryPoint("first_one", "tests.merge.plugin:first_one", registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == registry.GROUP else [])
    monkeypatch.setattr(registry, "_loaded", False)
    assert "first_one" in registry.known()
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "first_one")
    same(found, sources[0])
    assert registry.module_of("first_one") == ""


def test_a_name_belongs_to_one_method() -> None:
    with pytest.raises(InvalidInputError, match="already"):
        ckpt.merge_method("uniform")(lambda arrays, weights: arrays[0])


def test_a_method_of_the_main_program_is_refused_for_workers(run: Any, tmp_path: Path) -> None:
    url, _, _ = run

    def local(arrays: list[Array], weights: Array) -> Array:
        return arrays[0]

    local.__module__ = "__main__"
    with pytest.raises(InvalidInputError, match="main program"):
        ckpt.merge(f"{url}@10..30", tmp_path / "out", method=local, workers=2)


@ckpt.merge_method("watcher")
@dataclass(frozen=True, kw_only=True)
class Watcher(Elementwise):
    """Records what it is given."""

    unit: str = "element"
    scope: str = "tensor"
    slots: tuple[str, ...] = ()

    @property
    def needs(self) -> Needs:
        return Needs(base=True, slots=self.slots, passes=2, scope=self.scope, unit=self.unit)  # type: ignore[arg-type]

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        SEEN.append((number, tile.name, tile.box, dict(constants)))
        return Summary(sums={"count": np.array([tile.box.volume])}, maxima={"top": np.array([tile.first])})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        return {**constants, number: int(summary.sums["count"][0])}

    def apply(self, tile: Tile, constants: Constants) -> Array:
        SEEN.append((2, tile.name, tile.box, dict(constants)))
        if self.slots:
            SLOTS[tile.name, tile.first] = [tile.slot(slot, i) for slot in self.slots for i in range(len(tile))]
        assert tile.array(0).shape == tile.base.shape == tile.box.lengths
        return tile.array(0)


SEEN: list[Any] = []
SLOTS: dict[Any, Any] = {}


@pytest.mark.parametrize("unit", ["element", "row", "matrix"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
def test_tiles_keep_the_unit_and_sums_have_the_scope(
    run: Any, tmp_path: Path, unit: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sources, _ = run
    monkeypatch.setattr(spans, "MERGE_TILE_ELEMENTS", 40)
    monkeypatch.setattr(compute, "MERGE_TILE_ELEMENTS", 40)
    monkeypatch.setattr(compute, "APPLY_ELEMENTS", 40)
    SEEN.clear()
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "watcher", base=f"{url}@1", unit=unit, scope=scope)
    same(found, sources[0])
    for _, name, box, _ in SEEN:
        shape = tuple(sources[0][name.removeprefix("model/")].shape)
        if unit == "matrix":
            assert box.lengths == shape
        elif unit == "row" and shape:
            assert box.lengths[-1] == shape[-1]
        else:
            assert box.volume <= 40
    volumes = {f"model/{n}": t.numel() for n, t in sources[0].items()}
    total = {
        "tensor": volumes,
        "model": dict.fromkeys(volumes, sum(volumes.values())),
        "layer": {
            n: sum(v for m, v in volumes.items() if m.split(".")[:2] == n.split(".")[:2]) if "layers" in n else v
            for n, v in volumes.items()
        },
    }[scope]
    last = {name: constants for number, name, _, constants in SEEN if number == 2}
    assert {name: constants[1] for name, constants in last.items()} == {n: v for n, v in total.items() if volumes[n]}


def test_optimizer_slots_are_given_beside_the_parameter_and_factors_whole(tmp_path: Path) -> None:
    class Adam(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                self.state[param]["exp_avg_sq_row"] = self.state[param]["exp_avg_sq"].mean(dim=-1)

    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4, bias=False)
    optimizer = Adam(model.parameters())
    for step in (1, 2):
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "run", step=step)
    v = [opened(tmp_path / "run", step)["optimizer/weight/exp_avg_sq"].double().numpy() for step in (1, 2)]
    SLOTS.clear()
    slots = ["exp_avg_sq", "exp_avg_sq_row", "absent"]
    ckpt.merge(f"{tmp_path}/run@1..2", tmp_path / "out", method="watcher", base=f"{tmp_path}/run@1", slots=slots)
    found = SLOTS["model/weight", 0]
    assert np.array_equal(found[0], v[0]) and np.array_equal(found[1], v[1])
    assert found[2].shape == (4,) and np.allclose(found[2], v[0].mean(axis=-1), rtol=1e-6)
    assert found[4] is None and found[5] is None


def test_random_numbers_differ_by_source_tensor_and_seed(run: Any, tmp_path: Path) -> None:
    url, sources, base = run

    @ckpt.merge_method("masked", needs=Needs(base=True))
    @dataclass(frozen=True, kw_only=True)
    class Masked(Elementwise):
        """Half of the changes."""

        @property
        def needs(self) -> Needs:
            return Needs(base=True)

        def apply(self, tile: Tile, constants: Constants) -> Array:
            return tile.base + sum((tile.uniform(i) < 0.5) * tile.delta(i) for i in range(len(tile)))  # type: ignore[no-any-return]

    made = []
    for number, seed in enumerate((0, 0, 1)):
        found, _ = merged(f"{url}@10", tmp_path / f"out{number}", "masked", base=f"{url}@1", seed=seed)
        made.append(images(tmp_path / f"out{number}"))
        changed = (found["embed.weight"] != base["embed.weight"]).float().mean().item()
        assert 0.4 < changed < 0.6
    assert made[0] == made[1] != made[2]


def test_a_method_that_makes_nan_is_an_error(run: Any, tmp_path: Path) -> None:
    url, _, _ = run

    def bad(arrays: list[Array], weights: Array) -> Array:
        return arrays[0] * np.nan

    with pytest.raises(ckpt.CheckpointError, match="made elements of `model/.*` that are NaN"):
        ckpt.merge(f"{url}@10", tmp_path / "out", method=bad)


def test_what_matrix_methods_take_is_in_the_plan(run: Any) -> None:
    url, _, _ = run
    from ckpt.config import Options
    from ckpt.merge.estimate import estimate, limits_for

    recipe = {"recipe": 1, "sources": [f"{url}@10..30"], "base": f"{url}@1", "method": "tsv_m"}
    with ckpt.plan_merge(recipe) as plan:
        limits = limits_for(plan, None, 1, Options())
        figures = estimate(plan, limits, 1, Options())
    assert figures.matrix_bytes > 4 * 37 * 16 * 4
    assert isinstance(plan.bounds[0].method, Matrix)


def test_identity_of_elementwise_methods(tmp_path: Path) -> None:
    """Equal sources give themselves; with a base that is one of them, too."""
    arrays = random_arrays(3)
    sources = [save(tmp_path / "run", step, arrays) for step in (1, 2, 3)]
    for method, base in (("slerp", None), ("ties", f"{tmp_path}/run@1"), ("tsv_m", f"{tmp_path}/run@1")):
        named = f"{tmp_path}/run@2..3"
        found, _ = merged(named, tmp_path / method, method, **({} if base is None else {"base": base}))
        same(found, sources[0])


def test_weight_zero_leaves_a_source_out_of_elementwise_methods(run: Any, tmp_path: Path) -> None:
    url, _, _ = run
    for file in (url / "step-000000000020").rglob("*.safetensors"):
        file.unlink()
    entries = [f"{url}@10", {"run": f"{url}@20", "weight": 0}, f"{url}@30"]
    ckpt.merge(entries, tmp_path / "out", method="ties", base=f"{url}@1")


def test_uniform_by_source_weights(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 2)
    entries = [{"run": f"{tmp_path}/run@10", "weight": 3}, f"{tmp_path}/run@20"]
    found, _ = merged(entries, tmp_path / "out")
    same(found, {n: cast((3 * doubles(sources[0], n) + doubles(sources[1], n)) / 4, torch.float32) for n in sources[0]})
