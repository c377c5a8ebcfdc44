"""A fine-tune comes back from its delta: bit for bit, or with exactly the error that is stated.

Method: against references in NumPy written from the definitions of the methods; the delta of real checkpoints, read back by
`ckpt.open`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import ckpt
from ckpt.config import Options
from ckpt.delta import api
from ckpt.delta.record import Kept
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError, MismatchError
from ckpt.store.open import open_store
from tests.delta.conftest import Tuned
from tests.merge.samples import bits, cast, doubles, images, opened, random_arrays, same, save

Tensors = Mapping[str, torch.Tensor]
FLOATS = ("embed.weight", "layers.0.q.weight", "layers.0.norm.weight", "layers.1.stack", "scalar", "wide")


def kept_of(made: api.Made, task: int, name: str) -> Kept:
    return next(kept for kept in made.delta.tasks[task].tensors if kept.spec.name == f"model/{name}")


def restored(tuned: Tuned, delta: Path, into: Path, **more: Any) -> dict[str, torch.Tensor]:
    api.apply(delta, into, base=tuned.base_url, **more)
    return opened(into)


def check_stated(kept: Kept, found: torch.Tensor, was: torch.Tensor, base: torch.Tensor) -> None:
    """The stated error is the one of what came back."""
    off = (found.double() - was.double()).numpy()
    change = (was.double() - base.double()).numpy()
    assert kept.stated.max_abs == np.abs(off).max(initial=0.0)
    np.testing.assert_allclose(kept.stated.l2, np.linalg.norm(off), rtol=1e-12)
    np.testing.assert_allclose(kept.stated.norm, np.linalg.norm(was.double().numpy()), rtol=1e-12)
    np.testing.assert_allclose(kept.stated.of_change, np.linalg.norm(off) / np.linalg.norm(change), rtol=1e-12)


# exact


def test_exact_gives_every_bit_back(tuned: Tuned, tmp_path: Path) -> None:
    made = api.make(tuned.url(0), tmp_path / "delta", base=tuned.base_url)
    found = restored(tuned, tmp_path / "delta", tmp_path / "back")
    same(found, tuned.tunes[0])
    assert found.keys() == tuned.tunes[0].keys() and made.worst.l2 == 0
    assert made.stored_nbytes < 0.8 * made.original_nbytes


def test_exact_keeps_odd_floats_every_dtype_and_what_the_base_has_not(tmp_path: Path) -> None:
    odd = np.array([np.nan, -0.0, np.inf, 1e-42, 0x7FC12345], np.float32)
    odd.view(np.uint32)[4] = 0x7FC12345  # a NaN with a payload
    kinds = ("int8", "uint16", "int64", "float16", "float64", "complex64", "complex128", "bool")
    tensors = {k: torch.arange(10).to(getattr(torch, k)) for k in kinds} | {"odd": torch.from_numpy(odd.copy())}
    tensors |= {"f8": torch.ones(9).to(torch.float8_e4m3fn), "none": torch.zeros(0, 3)}
    ckpt.save({"model": {name: torch.zeros_like(t) for name, t in tensors.items()}}, tmp_path / "base", step=1)
    other = {"new": torch.ones(4), "longer": torch.ones(5), "tied": tensors["odd"]}
    ckpt.save({"model": tensors | other, "note": {"epoch": 3}}, tmp_path / "tuned", step=2, metrics={"loss": 0.5})
    api.make(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    api.apply(tmp_path / "delta", tmp_path / "back", base=tmp_path / "base")
    same(opened(tmp_path / "back"), opened(tmp_path / "tuned"))
    was, back = (StoredCheckpoint(open_store(tmp_path / n, options=Options()), 2, Options()) for n in ("tuned", "back"))
    assert back.manifest.metrics == {"loss": 0.5} and [s.aliases for s in back.specs] == [s.aliases for s in was.specs]
    assert [(o.name, back.read_object(o)) for o in back.objects] == [(o.name, was.read_object(o)) for o in was.objects]


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(20, 30), torch.nn.Linear(30, 20)


def test_exact_of_a_training_checkpoint_resumes_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Net()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "run", step=step)
    api.make(f"{tmp_path}/run@2", tmp_path / "delta", base=f"{tmp_path}/run@1")
    api.apply(tmp_path / "delta", tmp_path / "back", base=f"{tmp_path}/run@1")
    same(opened(tmp_path / "back"), opened(tmp_path / "run", 2))
    other = _Net()
    again = torch.optim.AdamW(other.parameters())
    ckpt.load({"model": other, "optimizer": again}, tmp_path / "back")
    assert bits(again.state[other.first.weight]["exp_avg"]) == bits(optimizer.state[model.first.weight]["exp_avg"])
    lean = api.make(f"{tmp_path}/run@2", tmp_path / "lean", base=f"{tmp_path}/run@1", optimizer="drop")
    assert {kept.spec.role for kept in lean.delta.tasks[0].tensors} == {"param"} and "left out" in lean.notes[0]


# ComPEFT


def compeft_reference(
    base: torch.Tensor, tuned: torch.Tensor, threshold: float, scale: float | None, deviation: float
) -> NDArray[np.float64]:
    change = tuned.double().numpy() - base.double().numpy()
    magnitude = np.abs(change).astype(np.float32)
    kept = (magnitude >= np.float32(threshold)) & (magnitude > 0)
    fitted = np.abs(change[kept]).mean() if kept.any() else 0.0
    each = fitted if scale is None else scale * deviation
    out = base.double().numpy().copy()
    out[kept] += np.sign(change[kept]) * each
    return out


def least_of_top(changes: list[NDArray[np.float64]], density: float) -> float:
    flat = np.sort(np.abs(np.concatenate([c.reshape(-1) for c in changes])).astype(np.float32))[::-1]
    return float(flat[max(1, round(density * len(flat))) - 1])


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("scale", ["fit", 1.0, 2.5])
def test_compeft_is_the_reference_and_states_its_error(tuned: Tuned, tmp_path: Path, scope: str, scale: Any) -> None:
    density = 0.1
    made = api.make(
        tuned.url(0),
        tmp_path / "delta",
        base=tuned.base_url,
        method="compeft",
        density=density,
        scale=scale,
        scope=scope,
    )
    found, was = restored(tuned, tmp_path / "delta", tmp_path / "back"), tuned.tunes[0]
    names = [name for name, tensor in was.items() if tensor.is_floating_point()]
    changes = {name: doubles(was, name) - doubles(tuned.base, name) for name in names}
    for name in FLOATS:
        group = [changes[name]] if scope == "tensor" else list(changes.values())
        deviation = float(np.concatenate([c.reshape(-1) for c in group]).std())
        threshold = least_of_top(group, density)
        expected = compeft_reference(
            tuned.base[name], was[name], threshold, None if scale == "fit" else scale, deviation
        )
        exact = cast(expected, was[name].dtype).double().numpy()
        ulp = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[was[name].dtype]  # of the scale, whose sum has another order
        np.testing.assert_allclose(doubles(found, name), exact, rtol=ulp, atol=1e-9, err_msg=name)
        check_stated(kept_of(made, 0, name), found[name], was[name], tuned.base[name])
    same(found, was, ["count", "empty"])


def test_compeft_with_the_fitted_scale_is_off_by_less_than_with_others(tuned: Tuned, tmp_path: Path) -> None:
    errors = {
        scale: api.make(
            tuned.url(0), tmp_path / f"delta{scale}", base=tuned.base_url, method="compeft", scale=scale
        ).worst.of_change
        for scale in ("fit", 0.5, 1.0, 2.0)
    }
    assert min(errors, key=errors.__getitem__) == "fit"  # type: ignore[arg-type]


def test_compeft_takes_a_small_part_of_the_bytes(tuned: Tuned, tmp_path: Path) -> None:
    made = api.make(tuned.url(0), tmp_path / "delta", base=tuned.base_url, method="compeft", density=0.05)
    wide = kept_of(made, 0, "wide")
    share = wide.num_kept / tuned.base["wide"].numel()  # equal magnitudes are all kept: some more in bfloat16
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert 0.05 <= share < 0.1 and wide.payload.nbytes < 1.04 * (entropy + share) * tuned.base["wide"].numel() / 8


# TALL masks


@pytest.mark.parametrize("threshold", [1.0, 0.4])
def test_tall_masks_are_the_reference_and_state_their_error(tuned: Tuned, tmp_path: Path, threshold: float) -> None:
    urls = [tuned.url(number) for number in (2, 0, 1)]
    made = api.make(urls, tmp_path / "delta", base=tuned.base_url, method="tall", threshold=threshold)
    for place, number in enumerate((2, 0, 1)):
        found = restored(tuned, tmp_path / "delta", tmp_path / f"back{number}", task=place + 1)
        was = tuned.tunes[number]
        for name in FLOATS:
            base = doubles(tuned.base, name)
            changes = [doubles(one, name) - base for one in tuned.tunes]
            total = cast(changes[0] + changes[1] + changes[2], was[name].dtype).double().numpy()
            mask = np.abs(changes[number]) > threshold * np.abs(total - changes[number])
            expected = np.where(mask, base + total, base)
            same({name: found[name]}, {name: cast(expected, was[name].dtype)})
            check_stated(kept_of(made, place, name), found[name], was[name], tuned.base[name])
        same(found, was, ["count", "empty"])
    per_task = sum(kept.payload.nbytes for kept in made.delta.tasks[0].tensors)
    assert per_task < made.original_nbytes / 3 / tuned.base["wide"].element_size() / 8 + 1000


def test_tall_masks_of_one_layout_and_order_are_those_of_another(tuned: Tuned, tmp_path: Path) -> None:
    urls = [tuned.url(number) for number in range(3)]
    shared = []
    for number, order in enumerate((urls, urls[::-1])):
        api.make(order, tmp_path / f"delta{number}", base=tuned.base_url, method="tall")
        with ckpt.open(tmp_path / f"delta{number}") as checkpoint:
            shared.append({name: bits(checkpoint[name][...]) for name in checkpoint if name.startswith("shared/")})
    assert shared[0] == shared[1]
    found = api.apply(tmp_path / "delta1", tmp_path / "back", base=tuned.base_url, task=urls[2])
    assert found.task == urls[2]


# the base


@pytest.mark.parametrize("method", ["exact", "compeft", "tall"])
def test_the_base_may_lie_otherwise_and_must_be_the_same(tuned: Tuned, tmp_path: Path, method: str) -> None:
    api.make(tuned.url(0), tmp_path / "delta", base=tuned.base_url, method=method)
    plain = restored(tuned, tmp_path / "delta", tmp_path / "back")
    wrong = {n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in tuned.base.items()}
    save(tmp_path / "again", 7, {**wrong, "more": np.ones(3)}, dtype=tuned.base["wide"].dtype)
    done = api.apply(tmp_path / "delta", tmp_path / "other", base=tmp_path / "again")
    same(opened(tmp_path / "other"), plain)
    assert images(tmp_path / "other") == images(tmp_path / "back")
    wrong["wide"] = wrong["wide"].copy()
    wrong["wide"].reshape(-1)[-1] += 1
    save(tmp_path / "wrong", 7, wrong, dtype=tuned.base["wide"].dtype)
    with pytest.raises(MismatchError, match="1 tensors differ:\n  `model/wide`") as caught:
        api.apply(tmp_path / "delta", tmp_path / "none", base=tmp_path / "wrong")
    assert caught.value.kind == "wrong-base" and not (tmp_path / "none").exists()
    assert done.compared_base and done.step == 2


def test_a_folder_is_base_and_fine_tune_and_one_that_changed_is_noticed(tmp_path: Path) -> None:
    tensors = {n: torch.from_numpy(a) for n, a in random_arrays(1, {"w": (300, 400), "b": (400,)}).items()}
    for name, factor in (("base", 1.0), ("tuned", 1.001)):
        (tmp_path / name).mkdir()
        save_file({n: t * factor for n, t in tensors.items()}, tmp_path / name / "model.safetensors")
    api.make(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    api.apply(tmp_path / "delta", tmp_path / "back", base=tmp_path / "base")
    same(opened(tmp_path / "back"), {n: t * 1.001 for n, t in tensors.items()})
    file = tmp_path / "base" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle: a folder's digest looks at the ends
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="`model/w` does not come back as was stated") as caught:
        api.apply(tmp_path / "delta", tmp_path / "none", base=tmp_path / "base")
    assert caught.value.kind == "wrong-bytes"
    assert [f for _, _, files in os.walk(tmp_path / "none") for f in files] == []
