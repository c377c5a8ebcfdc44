"""Goal: every bit of every dtype comes back. Method: save bit patterns, load into fresh memory, compare bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.format.dtypes import DTYPES
from tests.format.format_samples import all_dtypes, raw, tensor

# torch warns that its complex32 is young; its bits are stored all the same.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def roundtrip(values: dict[str, torch.Tensor], folder: Path, *, background: bool = False) -> dict[str, torch.Tensor]:
    """The values after a save and a load into tensors filled with other bits."""
    if background:
        ckpt.async_save({"t": values}, folder, step=1).wait(60)
    else:
        ckpt.save({"t": values}, folder, step=1)
    fresh = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in values.items()}
    ckpt.load({"t": fresh}, folder)
    return fresh


@pytest.mark.parametrize("background", [False, True])
def test_every_bit_of_every_dtype_comes_back(tmp_path: Path, background: bool) -> None:
    values = all_dtypes()
    assert {name.split(".")[0] for name in values} == set(DTYPES)
    found = roundtrip(values, tmp_path, background=background)
    assert {name: raw(value) for name, value in found.items()} == {name: raw(value) for name, value in values.items()}


def test_a_view_gives_the_same_bits_as_a_load(tmp_path: Path) -> None:
    values = all_dtypes(seed=1)
    ckpt.save({"t": values}, tmp_path, step=1)
    with ckpt.open(tmp_path) as checkpoint:
        assert {name: raw(checkpoint[f"t/{name}"][...]) for name in values} == {n: raw(v) for n, v in values.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int64", "complex128", "bool"])
def test_memory_order_does_not_change_the_elements(tmp_path: Path, dtype: str) -> None:
    base = tensor(dtype, (6, 4, 10))
    values = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, :, 1::3],
        "shifted": base.reshape(-1)[7:19],
        "expanded": base[:1, :1, :].expand(5, 3, 10),
        "column": base[:, :, 3],
    }
    assert not any(values[name].is_contiguous() for name in ("transposed", "strided", "expanded", "column"))
    found = roundtrip(values, tmp_path)
    assert {name: raw(value) for name, value in found.items()} == {name: raw(value) for name, value in values.items()}


def test_a_load_fills_memory_of_any_order_and_touches_nothing_beside_it(tmp_path: Path) -> None:
    value = tensor("float32", (6, 4))
    ckpt.save({"t": {"x": value}}, tmp_path, step=1)
    memory = torch.full((4, 12), 7.0)
    target = memory.t()[::2]
    ckpt.load({"t": {"x": target}}, tmp_path)
    assert raw(target) == raw(value)
    assert bool((memory.t()[1::2] == 7.0).all())


def test_tied_tensors_are_stored_once_and_come_back_under_every_name(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.a = torch.nn.Linear(8, 8, bias=False)
    model.b = torch.nn.Linear(8, 8, bias=False)
    model.b.weight = model.a.weight
    ckpt.save({"model": model}, tmp_path, step=1)
    with ckpt.open(tmp_path) as checkpoint:
        assert len(checkpoint) == 1
        assert checkpoint.manifest.tensor_bytes == 8 * 8 * 4
        for name in ("model/a.weight", "model/b.weight"):
            assert raw(checkpoint[name][...]) == raw(model.a.weight)
    untied = torch.nn.Module()
    untied.a, untied.b = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    ckpt.load({"model": untied}, tmp_path)
    assert raw(untied.a.weight) == raw(untied.b.weight) == raw(model.a.weight)
