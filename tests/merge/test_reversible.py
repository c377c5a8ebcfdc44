"""What a reversible merge keeps of its sources comes back, as near as is said, and no nearer than it can.

Method: the mean and the best basis by a full SVD in NumPy; sources given back and compared; small runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.merge.unmerge import Inside, sources_inside
from ckpt.store.open import open_store
from tests.cli.conftest import program  # noqa: F401
from tests.merge.samples import doubles, images, merged, opened, random_arrays, same, save

Tensors = dict[str, torch.Tensor]


def save_sources(
    url: Path, num: int, dtype: torch.dtype | None = None, counts: bool = True, rank: int | None = None
) -> list[Tensors]:
    """Sources at steps 10, 20, ..., that differ from a base in up to `rank` directions."""
    base = random_arrays(99)
    ways = [random_arrays(i, scale=0.1) for i in range(rank or num)]
    mix = (
        np.random.default_rng(0).standard_normal((num, len(ways))).astype(np.float32)
        if rank
        else np.eye(num, dtype="f4")
    )
    out = []
    for i in range(num):
        arrays = {n: base[n] + sum(mix[i, k] * way[n] for k, way in enumerate(ways)) for n in base}
        more = {"count": np.array([i])} if counts else {}
        out.append(save(url, 10 * (i + 1), {**arrays, **more}, dtype=dtype))
    return out


def inside(url: Path) -> list[Inside]:
    store = open_store(url, options=Options())
    return sources_inside(StoredCheckpoint(store, "latest", Options()))


def distance(found: Tensors, expected: Tensors) -> float:
    """Over all floating-point tensors, relative."""
    names = [n for n in expected if expected[n].is_floating_point()]
    squares = [
        (np.sum((doubles(found, n) - doubles(expected, n)) ** 2), np.sum(doubles(expected, n) ** 2)) for n in names
    ]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_mean_and_best_basis(tmp_path: Path, keep: int) -> None:
    """No basis of as many directions is nearer to the sources, tensor by tensor: that is what the SVD gives."""
    sources = save_sources(tmp_path / "run", 4)
    found, _ = merged(f"{tmp_path}/run@10..40", tmp_path / "out", "reversible", keep=keep)
    back = []
    for i in range(4):
        ckpt.unmerge(tmp_path / "out", 10 * (i + 1), tmp_path / "back")
        back.append(opened(tmp_path / "back", 10 * (i + 1)))
    for name in sources[0]:
        if name == "count" or not sources[0][name].numel():
            continue
        stack = np.stack([doubles(source, name).reshape(-1) for source in sources])
        mean = stack.mean(axis=0)
        np.testing.assert_allclose(found[name].numpy().reshape(-1), mean, rtol=3e-7, atol=1e-7)
        u, s, v = np.linalg.svd(stack - mean, full_matrices=False)
        best = mean + (u[:, :keep] * s[:keep]) @ v[:keep]
        for one, row in zip(back, best, strict=True):
            np.testing.assert_allclose(one[name].numpy().reshape(-1), row, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_errors_are_bounds_and_not_far_off(tmp_path: Path, dtype: torch.dtype, keep: int) -> None:
    sources = save_sources(tmp_path / "run", 5, dtype)
    ckpt.merge(f"{tmp_path}/run@10..50", tmp_path / "out", method="reversible", keep=keep, dtype="float32")
    told = inside(tmp_path / "out")
    assert [one.step for one in told] == [10, 20, 30, 40, 50] and {one.dtypes for one in told} == {
        (str(dtype).removeprefix("torch."),)
    }
    found = []
    for one, source in zip(told, sources, strict=True):
        ckpt.unmerge(f"{tmp_path}/out@50", one.label, tmp_path / "back")
        back = opened(tmp_path / "back", one.step)
        found.append(distance(back, source))
        assert found[-1] <= one.error
        assert {name: back[name].dtype for name in source} == {name: source[name].dtype for name in source}
    if keep < 4:
        assert max(found) > 0.5 * max(one.error for one in told)
    elif dtype == torch.float32:
        assert max(one.error for one in told) < 4e-7
    else:
        assert found == [0.0] * 5, "five fine-tunes in bfloat16, kept in float32, come back bit for bit"


def test_directions_that_sources_do_not_have_cost_nothing(tmp_path: Path) -> None:
    """Five sources in a plane: two directions give back all of them."""
    save_sources(tmp_path / "run", 5, rank=2)
    ckpt.merge(f"{tmp_path}/run@10..50", tmp_path / "out", method="reversible", keep=2)
    assert max(one.error for one in inside(tmp_path / "out")) < 6e-7


def test_a_reversible_merge_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """Its parameters are the mean: as `uniform` makes it, and they load. What is not combined is that of the newest source."""
    sources = save_sources(tmp_path / "run", 3)
    found, _ = merged(f"{tmp_path}/run@10..30", tmp_path / "out", "reversible")
    mean, _ = merged(f"{tmp_path}/run@10..30", tmp_path / "mean", "uniform")
    same(found, mean)
    target = {name: torch.zeros_like(tensor) for name, tensor in mean.items()}
    ckpt.load({"model": target}, tmp_path / "out")
    same(target, mean)
    ckpt.unmerge(tmp_path / "out", 10, tmp_path / "back")
    assert opened(tmp_path / "back")["count"].tolist() == sources[2]["count"].tolist() == [2]
    assert sorted(opened(tmp_path / "back")) == sorted(sources[0])


def test_equal_sources_come_back_bit_for_bit(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        tensors = save(tmp_path / "run", step, random_arrays(0))
    ckpt.merge(f"{tmp_path}/run@1..3", tmp_path / "out", method="reversible")
    ckpt.unmerge(tmp_path / "out", 2, tmp_path / "back")
    same(opened(tmp_path / "back"), tensors)


def test_memory_workers_and_names_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sources(tmp_path / "run", 3)
    sources = [f"{tmp_path}/run@{step}" for step in (10, 20, 30)]
    monkeypatch.setenv("CKPT_MERGE_IMAGE_BYTES", "1000")
    ckpt.merge(sources, tmp_path / "one", method="reversible")
    ckpt.merge(sources[::-1], tmp_path / "two", method="reversible", workers=2)
    assert images(tmp_path / "one") == images(tmp_path / "two") and len(images(tmp_path / "one")) > 3
    for number, workers in enumerate((1, 2)):
        ckpt.unmerge(tmp_path / "one", 20, tmp_path / f"back{number}", workers=workers, memory="1GiB")
    assert images(tmp_path / "back0") == images(tmp_path / "back1")


def test_an_error_that_is_too_large_is_told_before_anything_is_written(tmp_path: Path) -> None:
    save_sources(tmp_path / "run", 4)
    with pytest.raises(CheckpointError, match="would come back with an error of") as caught:
        ckpt.merge(f"{tmp_path}/run@10..40", tmp_path / "out", method="reversible", keep=1, error_max=1e-3)
    assert caught.value.kind == "error-too-large"
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_refusals(tmp_path: Path) -> None:
    save_sources(tmp_path / "run", 3)
    ckpt.merge(f"{tmp_path}/run@10..30", tmp_path / "out", method="reversible")
    for kind, merged_at, source in (
        ("no-source", tmp_path / "out", 15),
        ("not-reversible", tmp_path / "run", 10),
        ("bad-address", f"{tmp_path}/out@10..30", 10),
    ):
        with pytest.raises(InvalidInputError) as caught:
            ckpt.unmerge(merged_at, source, tmp_path / "back")
        assert caught.value.kind == kind
    with pytest.raises(InvalidInputError, match="was not made by method `reversible`"):
        ckpt.merge(f"{tmp_path}/run@10", tmp_path / "back", method="unmerge", source=0)
    with pytest.raises(InvalidInputError, match="needs the state key `basis`"):
        ckpt.merge([f"{tmp_path}/out@30", f"{tmp_path}/out@30"], tmp_path / "twice", method="reversible")
    assert not (tmp_path / "back").exists()


def test_the_command(program: Any, tmp_path: Path) -> None:  # noqa: F811
    sources = save_sources(tmp_path / "run", 3)
    program("merge", f"{tmp_path}/run@10..30", "-o", tmp_path / "out", "--method", "reversible", "--set", "keep=1")
    listed = program("unmerge", tmp_path / "out", "--json").document["sources"]
    assert [one["step"] for one in listed] == [10, 20, 30] and all(0 < one["error"] < 1 for one in listed)
    assert f"{tmp_path}/run@20" in program("unmerge", tmp_path / "out").out
    done = program("unmerge", tmp_path / "out", "20", "-o", f"{tmp_path}/back@7", "--json").document
    assert done["target"]["step"] == 7
    assert distance(opened(tmp_path / "back", 7), sources[1]) <= listed[1]["error"]
    assert program("unmerge", tmp_path / "out", "20").code == 2
    told = program("explain", tmp_path / "out", "basis/1/model/scalar", "--json").document["tensors"]
    assert told[0]["method"] == "reversible" and {share["tensor"] for share in told[0]["shares"]} == {"model/scalar"}
    back = program("explain", f"{tmp_path}/back@7", "model/scalar", "--json").document["tensors"]
    assert [share["tensor"] for share in back[0]["shares"]] == ["basis/1/model/scalar", "model/scalar"]
