"""Weighted sums: every method gives the weights of its formula, and the elements are those of the sum, rounded once.

Method: small runs; the sum, the quotient and the cast again in NumPy, bit for bit; weights against formulas written anew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.format.spec import TensorSpec
from ckpt.merge import registry
from ckpt.merge.method import Context, Linear, SourceInfo
from ckpt.merge.methods.trajectory import decay_weights, gamma_of
from tests.merge.samples import bits, cast, doubles, images, merged, opened, random_arrays, same, save, save_run

SPEC = TensorSpec(name="model/w", role="param", dtype="float32", shape=(2,))


def context_of(steps: list[int | None], metrics: list[dict[str, float]] | None = None, base: bool = False) -> Context:
    sources = [
        SourceInfo(
            label=f"run@{step}", id=str(step), step=step, metrics=(metrics or [{}] * len(steps))[i], weight=1.0, place=i
        )
        for i, step in enumerate(steps)
    ]
    return Context(sources=tuple(sources), base=sources[0] if base else None)


def shares(method: str, context: Context, **parameters: Any) -> list[float]:
    made = registry.find(method)(**parameters)
    assert isinstance(made, Linear)
    made.check(context)
    found = made.coefficients(context, SPEC)
    return [*found.shares, *([found.base / found.divisor] if found.base else [])]


def reference(sources: list[dict[str, torch.Tensor]], weights: list[float], divisor: float) -> dict[str, torch.Tensor]:
    """The contract, in NumPy: products and sums one by one, one division, one cast."""
    out = {}
    for name, tensor in sources[0].items():
        total = None
        for source, weight in zip(sources, weights, strict=True):
            if weight != 0.0:
                term = np.float64(weight) * doubles(source, name)
                total = term if total is None else total + term
        assert total is not None
        out[name] = cast(total / divisor if divisor != 1.0 else total, tensor.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uniform_is_a_sum_one_division_and_one_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    sources = save_run(tmp_path / "run", 5, dtype=dtype)
    found, _ = merged(tmp_path / "run@10..50", tmp_path / "out")
    same(found, reference(sources, [1.0] * 5, 5.0))


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from([0.0, 0.3, -0.2, 1.0, 2.5, 1 / 3]), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_weights_are_applied_as_written(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], normalize: bool, dtype: torch.dtype
) -> None:
    total = math.fsum(weights)
    if not any(weights) or (normalize and total <= 0):
        return
    folder = tmp_path_factory.mktemp("weights")
    sources = save_run(folder / "run", len(weights), dtype=dtype)
    found, _ = merged(folder / "run@0..", folder / "out", "weights", weights=weights, normalize=normalize)
    same(found, reference(sources, weights, total if normalize else 1.0))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("uniform", {}),
        ("ema", {"decay": 0.9}),
        ("decay_dual", {"curve": "one_minus_sqrt", "direction": "oldest_heaviest"}),
        ("mwa", {"by": "loss", "kernel": "exp"}),
        ("wma", {}),
        ("weights", {"weights": [0.1, 0.7, 0.2]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_sources_give_themselves_bit_for_bit(
    tmp_path: Path, method: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    arrays = random_arrays(7)
    arrays["embed.weight"][0, :6] = [-0.0, 0.0, 1e-45, -1e-40, 3e38, 1.0 + 2**-23]
    run = tmp_path / "run"
    sources = [save(run, 10 * (i + 1), arrays, dtype=dtype, metrics={"loss": 2.0 - i}) for i in range(3)]
    if dtype == torch.float64:  # all 53 bits
        values = {"w": np.random.default_rng(0).standard_normal((50, 3))}
        run = tmp_path / "doubles"
        sources = [save(run, 10 * (i + 1), values, metrics={"loss": 2.0 - i}) for i in range(3)]
    found, _ = merged(f"{run}@0..", tmp_path / "out", method, **parameters)
    same(found, sources[0])


def test_one_source_gives_itself(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 1)
    found, _ = merged(tmp_path / "run", tmp_path / "out")
    same(found, sources[0])


def test_weight_one_among_zeros_gives_that_source_and_reads_no_other(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 3)
    for file in (tmp_path / "run" / "step-000000000010").rglob("*.safetensors"):
        file.unlink()  # reading it would fail
    nbytes = sum(tensor.nbytes for tensor in sources[0].values())
    found, done = merged(tmp_path / "run@0..", tmp_path / "out", "weights", weights=[0, 1, 0])
    same(found, sources[1])
    assert nbytes <= done.read_nbytes < 1.5 * nbytes


def test_order_in_which_sources_are_named_changes_no_bit(tmp_path: Path) -> None:
    save_run(tmp_path / "run", 4)
    steps = [10, 20, 30, 40]
    made = []
    for number, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0])):
        into = tmp_path / f"out{number}"
        weights = [[0.1, 0.2, 0.3, 0.4][i] for i in order]
        ckpt.merge([f"{tmp_path}/run@{steps[i]}" for i in order], into, weights=weights)
        made.append(images(into))
    assert made == [made[0]] * 3


def test_sources_of_several_dtypes_are_merged_as_they_are(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    sources = [save(tmp_path / f"run{i}", i, random_arrays(i), dtype=kind) for i, kind in enumerate(kinds)]
    found, _ = merged([f"{tmp_path}/run{i}" for i in range(3)], tmp_path / "out", dtype="float32")
    expected = reference(sources, [1.0] * 3, 3.0)
    same(found, {n: cast(sum(doubles(s, n) for s in sources) / 3.0, torch.float32) for n in expected})  # type: ignore[arg-type]


def test_dtype_of_the_result_is_rounded_to_once(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 3)
    found, _ = merged(tmp_path / "run@0..", tmp_path / "out", dtype="bfloat16")
    same(found, {n: cast(sum(doubles(s, n) for s in sources) / 3.0, torch.bfloat16) for n in sources[0]})  # type: ignore[arg-type]


def test_more_sources_than_one_call_takes_are_summed_in_rounds(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 2)
    names = [f"{tmp_path}/run@10"] * 150 + [f"{tmp_path}/run@20"] * 150
    found, _ = merged(names, tmp_path / "out")
    same(found, reference([sources[0]] * 150 + [sources[1]] * 150, [1.0] * 300, 300.0))


# weights


def test_ema_is_its_recurrence() -> None:
    context = context_of([1, 2, 5, 9])
    values = [3.0, -1.0, 2.0, 7.0]
    average = values[0]
    for value in values[1:]:
        average = 0.9 * average + 0.1 * value
    found = shares("ema", context, decay=0.9)
    assert math.fsum(w * v for w, v in zip(found, values, strict=True)) == pytest.approx(average, rel=1e-12)
    assert found == pytest.approx([0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1])


def test_half_life_halves_by_steps_whatever_the_gaps() -> None:
    found = shares("ema", context_of([0, 10, 30]), half_life=10)
    keep = [math.exp(-math.log(2) * gap / 10) for gap in (10, 20)]
    assert found == pytest.approx([keep[0] * keep[1], (1 - keep[0]) * keep[1], 1 - keep[1]])


def test_ema_with_inverse_gamma_one_and_power_one_is_the_mean() -> None:
    assert shares("ema", context_of([1, 2, 3, 4]), decay=1, inv_gamma=1, power=1) == pytest.approx([0.25] * 4)


def test_ema_from_zero_is_corrected() -> None:
    found = shares("ema", context_of([1, 2]), decay=0.9, zero_start=True)
    assert found == pytest.approx([0.1 * 0.9 / (1 - 0.81), 0.1 / (1 - 0.81)])


def test_decay_dual_equals_a_decayed_sum_of_updates() -> None:
    """Sum of c_i x_i = x_0 + sum of u_i (x_i - x_(i-1)), for any wanted weights u of the updates."""
    rng = np.random.default_rng(0)
    x, rates = rng.standard_normal(8), np.sort(rng.random(7))[::-1].tolist()
    weights = decay_weights(rates)
    updates = x[0] + sum(u * (b - a) for u, a, b in zip(rates, x, x[1:], strict=False))
    assert np.dot(weights, x) == pytest.approx(updates, rel=1e-12)


def test_decay_dual_schedules() -> None:
    eight = context_of(list(range(8)))
    assert shares("decay_dual", eight, curve="linear") == pytest.approx([1 / 8] * 8)
    steep = shares("decay_dual", eight, curve="one_minus_sqrt", direction="oldest_heaviest")
    assert steep == pytest.approx([math.sqrt((i + 1) / 8) - math.sqrt(i / 8) for i in range(8)])
    assert steep[0] == pytest.approx(0.354, abs=1e-3)
    assert shares("decay_dual", eight, curve="one_minus_sqrt", direction="newest_heaviest") == steep[::-1]
    assert shares("decay_dual", eight, curve="user", values=[0.5] * 7, direction="oldest_heaviest") == [
        0.5,
        *[0.0] * 6,
        0.5,
    ]
    bow = shares("decay_dual", eight, curve="cosine")
    assert bow == pytest.approx(bow[::-1]) and max(bow) in bow[3:5]


def test_decay_dual_must_be_told_its_direction() -> None:
    with pytest.raises(InvalidInputError, match="direction") as caught:
        shares("decay_dual", context_of([1, 2, 3]), curve="one_minus_sqrt")
    assert "oldest_heaviest" in caught.value.hints[0]


def test_lawa_takes_the_newest_with_a_stride() -> None:
    assert shares("lawa", context_of(list(range(7))), last=3, every=2) == pytest.approx(
        [0, 0, 1 / 3, 0, 1 / 3, 0, 1 / 3]
    )


def test_wma_rises_by_one() -> None:
    assert shares("wma", context_of([1, 2, 3])) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"kernel": "minmax", "penalty": 1.0}, [0.0, 0.5, 1.0]),
        ({"kernel": "minmax", "penalty": 0.0}, [1.0, 1.0, 1.0]),
        ({"kernel": "minmax", "penalty": 0.7}, [0.3, 0.65, 1.0]),
        ({"kernel": "power", "penalty": 2.0}, [3.0**-2, 2.0**-2, 1.0]),
        ({"kernel": "exp", "penalty": 0.5}, [math.exp(-0.5 * z) for z in (1.5**0.5, 0.0, -(1.5**0.5))]),
        ({"kernel": "rank", "penalty": 0.5}, [math.exp(-1.0), math.exp(-0.5), 1.0]),
    ],
)
def test_mwa_kernels(parameters: dict[str, Any], expected: list[float]) -> None:
    context = context_of([1, 2, 3], [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}])
    assert shares("mwa", context, by="loss", **parameters) == pytest.approx([w / sum(expected) for w in expected])


def test_mwa_of_equal_metrics_is_the_mean_and_steps_weigh_the_newest() -> None:
    equal = context_of([1, 2], [{"loss": 1.0}, {"loss": 1.0}])
    assert shares("mwa", equal, by="loss", penalty=1.0) == [0.5, 0.5]
    assert shares("mwa", context_of([100, 200, 300]), by="step", penalty=1.0) == pytest.approx([0.0, 1 / 3, 2 / 3])


def test_missing_metric_names_every_source_without_it() -> None:
    context = context_of([1, 2, 3], [{"loss": 1.0}, {}, {"loss": math.nan}])
    with pytest.raises(InvalidInputError, match="run@2, run@3"):
        shares("mwa", context, by="loss")


def test_post_hoc_ema_gives_a_stored_snapshot_back_and_another_width() -> None:
    """The weights of power-function averages are known in closed form: the synthesised profile is near the wanted one."""
    steps, sigmas = [400, 400, 700, 700, 1000, 1000], [0.05, 0.10] * 3
    context = context_of(steps)  # type: ignore[arg-type]
    exact = shares("post_hoc_ema", context, sigma=0.10, sigmas=sigmas)
    assert exact == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6)
    found = shares("post_hoc_ema", context, sigma=0.075, sigmas=sigmas)
    assert math.fsum(found) == pytest.approx(1.0, abs=2e-2)

    def profile(sigma: float, end: float) -> np.ndarray[Any, Any]:
        t, gamma = np.arange(1, 1001) / end, gamma_of(sigma)
        return np.where(t <= 1, (gamma + 1) * t**gamma / end, 0.0)

    made = sum(w * profile(s, e) for w, s, e in zip(found, sigmas, steps, strict=True))
    wanted = profile(0.075, 1000)
    assert np.abs(made - wanted).sum() / wanted.sum() < 0.15


def test_interpolation_goes_from_the_base_or_between_two(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 2)
    found, _ = merged(tmp_path / "run@20", tmp_path / "a", "interpolate", base=tmp_path / "run@10", alpha=0.25)
    names = list(sources[0])

    def mixed(first: float, second: float) -> dict[str, torch.Tensor]:
        # the base is summed last
        return {
            n: cast(
                np.float64(second) * doubles(sources[1], n) + np.float64(first) * doubles(sources[0], n), torch.float32
            )
            for n in names
        }

    same(found, mixed(0.75, 0.25))
    found, _ = merged([tmp_path / "run@20", tmp_path / "run@10"], tmp_path / "b", "interpolate", alpha=0.0)
    same(found, sources[0])


def test_selection_of_a_range(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 8)

    def mean(*numbers: int) -> dict[str, torch.Tensor]:
        return reference([sources[i] for i in numbers], [1.0] * len(numbers), float(len(numbers)))

    for number, (entry, expected) in enumerate(
        [
            ({"steps": "30..60"}, (2, 3, 4, 5)),
            ({"steps": "..60", "last": 2}, (4, 5)),
            ({"steps": "10..", "every": 3}, (1, 4, 7)),
            ({"steps": "10..80", "fraction": 0.25}, (5, 6, 7)),
            ({"steps": [20, 50]}, (1, 4)),
            ({"steps": "latest"}, (7,)),
        ]
    ):
        found, _ = merged({"run": str(tmp_path / "run"), **entry}, tmp_path / f"out{number}")
        same(found, mean(*expected))


def test_nan_is_an_error_that_names_tensor_source_and_place(tmp_path: Path) -> None:
    save_run(tmp_path / "run", 2)
    arrays = random_arrays(9)
    arrays["layers.1.stack"][2, 4, 6] = np.nan
    save(tmp_path / "run", 30, arrays)
    with pytest.raises(
        ckpt.CheckpointError, match=r"`model/layers.1.stack` of .*run@30 is nan at \[2, 4, 6\]"
    ) as caught:
        ckpt.merge(tmp_path / "run@10..30", tmp_path / "out")
    assert caught.value.kind == "not-finite"
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    found, _ = merged(tmp_path / "run@10..30", tmp_path / "out", nan="propagate")
    assert torch.isnan(found["layers.1.stack"]).sum() == 1


def test_result_too_large_for_its_dtype_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, {"w": np.array([1e6], np.float32)})
    with pytest.raises(ckpt.CheckpointError, match="too large for float16"):
        ckpt.merge(tmp_path / "run", tmp_path / "out", dtype="float16")


def test_result_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    sources = save_run(tmp_path / "run", 3)
    done = ckpt.merge(tmp_path / "run@0..", tmp_path / "out", step=77)
    target = {name: torch.zeros_like(tensor) for name, tensor in sources[0].items()}
    ckpt.load({"model": target}, tmp_path / "out", step=77)
    same(target, reference(sources, [1.0] * 3, 3.0))
    again, _ = merged([f"{tmp_path}/out@77", f"{tmp_path}/out@77"], tmp_path / "again")  # and a source itself
    same(again, target)
    assert done.step == 77 and bits(opened(tmp_path / "out")["scalar"]) == bits(target["scalar"])
