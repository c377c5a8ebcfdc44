"""Adapters from PEFT's folders and from checkpoints are merged, folded and written for PEFT again.

Method: folders written by the `safetensors` package and `json`, as PEFT lays them out; changes of weights made in full with
NumPy.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import ckpt
from ckpt.cli import run as run_program
from ckpt.errors import (
    AlreadyExistsError,
    BudgetError,
    CheckpointError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
)
from ckpt.lora import api
from tests.delta.test_runs import killed_at
from tests.merge.samples import bits, cast, images, opened, same

Tensors = dict[str, torch.Tensor]
# module -> weight's shape, rank of each adapter
LINEAR = {"layers.0.q": (20, 12), "layers.0.v": (16, 12), "layers.1.q": (20, 12)}
CONV, TABLE = "stem", "embed"
SHAPES: dict[str, tuple[int, ...]] = {**LINEAR, CONV: (6, 3, 2, 2), TABLE: (30, 8)}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "acme/tiny",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"layers.1.q": 2},
    "alpha_pattern": {r"layers\.\d+\.v": 3},
    "target_modules": ["q", "v", "stem", "embed"],
}


def rank_of(module: str) -> int:
    return 2 if module == "layers.1.q" else 4


def scaling_of(module: str, *, rslora: bool = False) -> float:
    alpha = 3 if module == "layers.0.v" else 8
    return alpha / (math.sqrt(rank_of(module)) if rslora else rank_of(module))


def factors(seed: int, dtype: torch.dtype = torch.float32, names: Mapping[str, Any] = SHAPES) -> Tensors:
    """By the names that PEFT's files have."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for module in names:
        shape, rank, prefix = SHAPES[module], rank_of(module), f"base_model.model.{module}.lora_"
        if module == TABLE:
            a, b = (rank, shape[0]), (shape[1], rank)
            out[prefix + "embedding_A"], out[prefix + "embedding_B"] = (
                torch.randn(s, generator=generator) for s in (a, b)
            )
            continue
        out[prefix + "A.weight"] = torch.randn((rank, *shape[1:]), generator=generator)
        out[prefix + "B.weight"] = torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=generator)
    return {name: tensor.to(dtype) for name, tensor in out.items()}


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def change(tensors: Mapping[str, torch.Tensor], module: str, scaling: float) -> NDArray[np.float64]:
    """What an adapter adds to a weight, in the weight's shape."""
    prefix = f"base_model.model.{module}.lora_"
    if module == TABLE:
        a, b = (tensors[prefix + f"embedding_{side}"].double().numpy() for side in "AB")
        return scaling * (b @ a).T
    a, b = (tensors[prefix + f"{side}.weight"].double().numpy() for side in "AB")
    return scaling * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(SHAPES[module])


def exported(run: Path, folder: Path, *more: str) -> tuple[Tensors, dict[str, Any]]:
    assert run_program(["export", str(run), str(folder), "--peft", "-q", *more]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def scaling_in(config: dict[str, Any], module: str) -> float:
    """By what the config says, as PEFT reads it."""
    key = f"^{module.replace('.', chr(92) + '.')}"
    rank = config["rank_pattern"].get(key, config["r"])
    alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
    return alpha / rank


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_adapter(tmp_path / "one", factors(1)), write_adapter(tmp_path / "two", factors(2))


def expected(weights: tuple[float, float], module: str) -> NDArray[np.float64]:
    return sum(w * change(factors(seed), module, scaling_of(module)) for w, seed in zip(weights, (1, 2), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("method", "more", "off"),
    [("concat", {}, 1e-6), ("svd", {"rank": 8}, 1e-6), ("svd", {"rank": 3}, 0.9), ("lego", {}, 2.0)],
)
def test_merged_adapters_are_read_by_peft_and_off_by_what_is_said(
    two: tuple[Path, Path], tmp_path: Path, method: str, more: dict[str, Any], off: float
) -> None:
    weights = (0.75, 0.5)
    done = api.merge(two, tmp_path / "out", method=method, weights=weights, **more)
    tensors, config = exported(tmp_path / "out", tmp_path / "peft")
    assert {one.name for one in done.modules} == set(SHAPES)
    for one in done.modules:
        found, exact = change(tensors, one.name, scaling_in(config, one.name)), expected(weights, one.name)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(one.error, error, rtol=1e-3, atol=1e-7)
        assert one.error < off
    assert config["base_model_name_or_path"] == "acme/tiny" and config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == set(SHAPES)


def test_equal_shares_are_concatenated_to_the_bit_and_in_either_order(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = api.merge(two, tmp_path / "out")
    api.merge(two[::-1], tmp_path / "again")
    assert images(tmp_path / "out") == images(tmp_path / "again") and done.error < 1e-15
    tensors, _ = exported(tmp_path / "out", tmp_path / "peft")
    name = "base_model.model.layers.0.q.lora_A.weight"
    rows = {bits(row) for row in tensors[name]}
    assert rows == {bits(row) for seed in (1, 2) for row in factors(seed)[name]}


def test_an_exported_adapter_is_a_source_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    api.merge(two, tmp_path / "out")
    exported(tmp_path / "out", tmp_path / "peft")
    api.merge(tmp_path / "peft", tmp_path / "from-folder", weights=[1.0])
    api.merge(tmp_path / "out", tmp_path / "from-run", weights=[1.0])
    assert images(tmp_path / "from-folder") == images(tmp_path / "from-run")
    same(opened(tmp_path / "from-run"), opened(tmp_path / "out"))


def test_rslora_and_other_ranks_are_heeded(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", factors(1), use_rslora=True)
    api.merge(tmp_path / "one", tmp_path / "out")
    tensors, config = exported(tmp_path / "out", tmp_path / "peft")
    assert config["use_rslora"] is False
    for module in SHAPES:
        wanted = change(factors(1), module, scaling_of(module, rslora=True))
        np.testing.assert_allclose(change(tensors, module, scaling_in(config, module)), wanted, rtol=1e-6)


# fold


def base_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**weights, "norm.weight": torch.ones(12, dtype=dtype), "count": torch.arange(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_adds_the_products_in_fp64_and_casts_once(
    two: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = base_tensors(dtype)
    ckpt.save({"model": base, "note": {"epoch": 3}}, tmp_path / "base", step=7)
    done = api.merge(two, tmp_path / "out", method="fold", base=tmp_path / "base", weights=(1.0, -0.5))
    found = opened(tmp_path / "out")
    assert done.step == 7 and found.keys() == base.keys()
    for module in SHAPES:
        wanted = base[f"{module}.weight"].double().numpy() + expected((1.0, -0.5), module)
        if dtype == torch.bfloat16:
            same({"w": found[f"{module}.weight"]}, {"w": cast(wanted, dtype)})
        else:  # sums of products have another order in NumPy
            np.testing.assert_allclose(found[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    same(found, base, ["norm.weight", "count"])


def test_fold_reads_master_copies_and_a_base_that_lies_beside_its_adapter(tmp_path: Path) -> None:
    weight = torch.randn(20, 12)
    state = {
        "base_model.model.layers.0.q.base_layer.weight": weight.bfloat16(),
        "base_model.model.layers.0.q.lora_A.default.weight": torch.randn(4, 12),
        "base_model.model.layers.0.q.lora_B.default.weight": torch.randn(20, 4),
    }
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    module = _Holder(parameters)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for name, parameter in module.named_parameters():
        optimizer.state[parameter]["master_param"] = (
            weight.clone() if "base_layer" in name else parameter.detach().clone()
        )
    config = {"r": 4, "lora_alpha": 8}
    ckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "run", step=5, metadata={"adapter_config": config})
    api.merge(f"{tmp_path}/run@5", tmp_path / "out", method="fold", base=f"{tmp_path}/run@5")
    found = opened(tmp_path / "out")
    a, b = (state[f"base_model.model.layers.0.q.lora_{side}.default.weight"].double().numpy() for side in "AB")
    same(found, {"layers.0.q.weight": cast(weight.double().numpy() + 2 * (b @ a), torch.bfloat16)})
    assert found.keys() == {"layers.0.q.weight"}


class _Holder(torch.nn.Module):
    """Parameters under any dotted names."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            at: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(at.named_children()):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.register_parameter(last, parameter)


def test_fold_of_transposed_weights_and_of_a_whole_module(tmp_path: Path) -> None:
    names = {"layers.0.q": None}
    extra = {"base_model.model.head.weight": torch.randn(5, 12)}
    write_adapter(tmp_path / "one", factors(1, names=names) | extra, fan_in_fan_out=True)
    base = {"layers.0.q.weight": torch.randn(12, 20), "head.weight": torch.zeros(5, 12)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    api.merge(tmp_path / "one", tmp_path / "out", method="fold", base=tmp_path / "base")
    found = opened(tmp_path / "out")
    wanted = base["layers.0.q.weight"].double().numpy() + change(factors(1, names=names), "layers.0.q", 2.0).T
    np.testing.assert_allclose(found["layers.0.q.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    same(found, {"head.weight": extra["base_model.model.head.weight"]})
    with pytest.raises(InvalidInputError, match="no factors of a product"):
        api.merge(tmp_path / "one", tmp_path / "none")


# means of factors


def test_the_mean_of_a_factor_is_taken_where_the_other_is_shared(tmp_path: Path) -> None:
    one, two = factors(1), factors(2)
    shared = {name: one[name] if "_A" in name else two[name] for name in one}
    write_adapter(tmp_path / "one", one)
    write_adapter(tmp_path / "two", shared)
    done = api.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method="factors", weights=(0.25, 0.75))
    tensors, config = exported(tmp_path / "out", tmp_path / "peft")
    assert done.error < 1e-6 and config["r"] == 4
    for module in SHAPES:
        wanted = 0.25 * change(one, module, scaling_of(module)) + 0.75 * change(shared, module, scaling_of(module))
        np.testing.assert_allclose(change(tensors, module, scaling_in(config, module)), wanted, atol=1e-5)


def test_the_mean_of_factors_is_refused_elsewhere_with_the_reason(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="share neither A nor B in 5 of 5 modules") as caught:
        api.merge(two, tmp_path / "out", method="factors")
    assert caught.value.kind == "no-shared-factor" and "`layers.0.q`: off by 0." in caught.value.message
    assert not (tmp_path / "out").exists()


# adapters in checkpoints


def test_an_adapter_in_a_checkpoint_is_found_by_its_name(tmp_path: Path) -> None:
    names = {"layers.0.q": None}
    model = {"norm": torch.ones(3)}
    for name, seed in (("first", 1), ("second", 2)):
        model |= {key.replace(".weight", f".{name}.weight"): t for key, t in factors(seed, names=names).items()}
    ckpt.save({"model": model}, tmp_path / "run", step=3)
    config = json.dumps({"r": 4, "lora_alpha": 8}).encode()
    with pytest.raises(InvalidInputError, match="holds 2 adapters"):
        api.merge(tmp_path / "run", tmp_path / "out", adapter_config=config)
    with pytest.raises(InvalidInputError, match="no adapter `third`"):
        api.merge(tmp_path / "run", tmp_path / "out", adapter="third", adapter_config=config)
    with pytest.raises(InvalidInputError, match="does not say the config") as caught:
        api.merge(tmp_path / "run", tmp_path / "out", adapter="second")
    assert caught.value.kind == "no-config"
    api.merge(tmp_path / "run", tmp_path / "out", adapter="second", adapter_config=config)
    tensors, _ = exported(tmp_path / "out", tmp_path / "peft")
    same(tensors, factors(2, names=names))


def test_merge_refuses_factors_of_different_runs_and_notes_those_of_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="10 tensors are factors of LoRA adapters") as caught:
        ckpt.merge(two, tmp_path / "out")
    assert caught.value.kind == "adapters" and "ckpt lora" in caught.value.hints[0]
    ckpt.merge(two, tmp_path / "ruled", rules=[{"match": "model/**", "policy": "combine"}])
    for step in (1, 2):
        ckpt.save({"model": factors(step)}, tmp_path / "run", step=step)
    with ckpt.plan_merge({"recipe": 1, "sources": [f"{tmp_path}/run@1..2"], "method": "uniform"}) as plan:
        assert any("right for neighbours of one run alone" in note for note in plan.notes)


def test_killed_in_the_middle_leaves_nothing_to_see(two: tuple[Path, Path], tmp_path: Path) -> None:
    killed_at("merge.before-index", "lora", *two, "-o", tmp_path / "out")
    with pytest.raises(NotFoundError):
        ckpt.open(tmp_path / "out")
    assert run_program(["lora", *map(str, two), "-o", str(tmp_path / "out"), "-q"]) == 0


# refusals


def corrupted(tmp_path: Path, **changes: Any) -> Path:
    folder = write_adapter(tmp_path / "bad", factors(1), **changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
        ({"use_dora": True}, "DoRA scales every row"),
        ({"r": 0}, "`r` must be a whole number from 1 on, found 0"),
        ({"lora_alpha": "much"}, "`lora_alpha` must be a number, found 'much'"),
        ({"r": 5}, "has rank 4, its config says 5"),
        ({"rank_pattern": {"(": 3}}, "is no regular expression"),
        ({"rank_pattern": [1]}, "`rank_pattern` must be a mapping"),
        ({"use_rslora": 1}, "`use_rslora` must be true or false"),
    ],
)
def test_configs_that_cannot_be_merged_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        api.merge(corrupted(tmp_path, **changes), tmp_path / "out")
    assert text in caught.value.message and caught.value.kind == "bad-adapter"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "kind", "code", "text"),
    [
        ({"method": "mean"}, InvalidInputError, "unknown-method", "unknown method `mean`"),
        ({"method": "fold"}, InvalidInputError, "no-base", "needs the base"),
        ({"method": "concat", "rank": 4}, InvalidInputError, "usage", "of methods svd and lego"),
        ({"weights": [1.0]}, InvalidInputError, "usage", "2 adapters have 2 finite weights"),
        ({"weights": [0.0, 0.0]}, InvalidInputError, "zero-weights", "nothing to merge"),
        ({"method": "fold", "base": "small"}, MismatchError, "mismatch", "has no `model/stem.weight`"),
        (
            {"adapters": ["one", "other"]},
            MismatchError,
            "mismatch",
            "`layers.0.q`: A [4, 12] B [20, 4], A [4, 13] B [20, 4]",
        ),
        ({"adapters": ["one", "absent"]}, NotFoundError, "no-run", "absent"),
        ({"adapters": ["one", "small"]}, InvalidInputError, "bad-adapter", "holds no adapter"),
        ({"memory": "64MiB"}, BudgetError, "budget", "may take 64 MiB"),
        ({"adapters": []}, InvalidInputError, "no-sources", "no adapter is named"),
        ({"into": "small"}, AlreadyExistsError, "already-exists", "exists already"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    two: tuple[Path, Path], tmp_path: Path, more: dict[str, Any], kind: type[CheckpointError], code: str, text: str
) -> None:
    other = factors(1)
    other["base_model.model.layers.0.q.lora_A.weight"] = torch.zeros(4, 13)
    write_adapter(tmp_path / "other", other)
    ckpt.save({"model": {"layers.0.q.weight": torch.zeros(20, 12)}}, tmp_path / "small", step=0)
    adapters = [tmp_path / name for name in more.pop("adapters", ("one", "two"))]
    base = tmp_path / more.pop("base") if "base" in more else None
    with pytest.raises(kind) as caught:
        api.merge(adapters, tmp_path / more.pop("into", "out"), base=base, **more)
    assert caught.value.kind == code and text in caught.value.message, caught.value.message
    assert not (tmp_path / "out").exists()


def test_missing_files_and_halves_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    (two[0] / "adapter_config.json").unlink()
    with pytest.raises(InvalidInputError, match="has no `adapter_config.json`"):
        api.merge(two, tmp_path / "out")
    shutil.rmtree(two[0])
    half = {name: t for name, t in factors(1).items() if "lora_B" not in name}
    write_adapter(two[0], half)
    with pytest.raises(InvalidInputError, match=r"module `layers.0.q` has no factor B"):
        api.merge(two, tmp_path / "out")
    nan = factors(1)
    nan["base_model.model.layers.0.q.lora_A.weight"][0, 0] = float("nan")
    shutil.rmtree(two[0])
    write_adapter(two[0], nan)
    with pytest.raises(InvalidInputError, match="holds NaN") as caught:
        api.merge(two, tmp_path / "out")
    assert caught.value.kind == "not-finite" and not list((tmp_path / "out").rglob("*.safetensors"))
