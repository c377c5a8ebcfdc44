"""Bad input is refused with everything that is wrong, before a byte of a tensor is read, and leaves nothing behind.

Method: the images of all sources are removed, so that any read of data would end in another error; the store of the result must
stay empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt
from ckpt.errors import AlreadyExistsError, BudgetError, InvalidInputError, MismatchError, NotFoundError
from tests.merge.samples import images, merged, opened, random_arrays, same, save, save_run


def without_data(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", 3)
    return tmp_path / "run"


def refused(kind: type[Exception], sources: Any, tmp_path: Path, **more: Any) -> ckpt.CheckpointError:
    without_data(tmp_path)
    with pytest.raises(kind) as caught:
        ckpt.merge(sources, tmp_path / "out", **more)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert isinstance(caught.value, ckpt.CheckpointError)
    return caught.value


def test_all_differences_are_listed(tmp_path: Path) -> None:
    arrays = random_arrays(0)
    save(tmp_path / "run", 1, arrays)
    other = {n: a for n, a in arrays.items() if n not in ("scalar", "layers.0.norm.weight")}
    other |= {
        "embed.weight": np.zeros((38, 16), np.float32),
        "layers.1.stack": np.zeros((3, 5, 7), np.int64),
        "new": np.ones(2),
    }
    save(tmp_path / "run", 2, other)
    error = refused(MismatchError, f"{tmp_path}/run@1..2", tmp_path)
    for text in (
        "`model/scalar`: only in",
        "`model/layers.0.norm.weight`: only in",
        "`model/new`: missing in",
        "`model/embed.weight`: [37, 16] in",
    ):
        assert text in error.message, error.message
    assert "5 tensors" in error.message and "--intersect" in error.hints[0]


def test_intersect_merges_what_is_common(tmp_path: Path) -> None:
    arrays = random_arrays(0)
    one = save(tmp_path / "run", 1, arrays)
    other = {n: a for n, a in arrays.items() if n != "scalar"} | {"embed.weight": np.zeros((38, 16), np.float32)}
    save(tmp_path / "run", 2, other)
    found, _ = merged(f"{tmp_path}/run@1..2", tmp_path / "out", intersect=True)
    assert sorted(found) == sorted(set(arrays) - {"scalar", "embed.weight"})
    same(found, one, sorted(found))


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, {"x": np.zeros(2, np.float32)})
    save(tmp_path / "b", 2, {"y": np.zeros(2, np.float32)})
    error = refused(MismatchError, [f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path, intersect=True)
    assert error.kind == "nothing-to-merge"


@pytest.mark.parametrize(
    ("more", "kind", "message", "hint"),
    [
        ({"method": "unifrom"}, "unknown-method", "unknown merge method `unifrom`", "`uniform`"),
        ({"method": "mwa", "by": "accuracy"}, "no-metric", "metric `accuracy` is missing or NaN in 3 of 3", "loss"),
        ({"method": "ties"}, "no-base", "needs a base", "--base"),
        ({"weights": [1, -1, 0]}, "zero-weights", "sum to 0", None),
        ({"weights": [1, 2]}, "wrong-number", "2 weights are given for 3 sources", None),
        ({"method": "weights", "weights": [0, 0, 0], "normalize": False}, "zero-weights", "all weights are 0", None),
        ({"method": "slerp"}, "wrong-number", "merges 2 to 2 sources, found 3", None),
        ({"method": "ema", "decy": 0.5}, "bad-recipe", "no parameter `decy`", "`decay`"),
        ({"method": "ema", "decay": "fast"}, "bad-recipe", "must be a number", None),
        ({"method": "ema"}, "bad-recipe", "needs either `decay` or `half_life`", None),
        ({"method": "mwa"}, "bad-recipe", "needs `by`", None),
        ({"method": "decay_dual", "curve": "one_minus_sqrt"}, "no-direction", "direction", "oldest"),
        ({"method": "mwa", "by": "loss", "penalty": 3}, "bad-recipe", "0 to 1", "power"),
        ({"dtype": "int8"}, "bad-recipe", "float dtype", "float32"),
        ({"rules": [{"match": "a", "policy": "average"}]}, "bad-recipe", "`policy` must be one of", None),
        ({"rules": [{"match": "a{", "policy": "drop"}]}, "bad-recipe", "partner", None),
        ({"memory": "lots"}, "bad-recipe", "a size is written like", None),
        ({"workers": 5000}, "invalid-input", "`workers` must be 1 to", None),
    ],
)
def test_bad_methods_and_options(
    run: Path, tmp_path: Path, more: dict[str, Any], kind: str, message: str, hint: str | None
) -> None:
    error = refused(InvalidInputError, f"{run}@10..30", tmp_path, **more)
    assert (error.kind, message in error.message) == (kind, True), error.message
    assert hint is None or any(hint in one for one in error.hints), error.hints


def test_too_little_memory_says_how_much_it_takes(run: Path, tmp_path: Path) -> None:
    error = refused(BudgetError, f"{run}@10..30", tmp_path, memory="64MiB")
    assert "takes at least" in error.message


def test_steps_that_are_not_there(run: Path, tmp_path: Path) -> None:
    assert "complete steps: 10, 20, 30" in refused(NotFoundError, f"{run}@40..50", tmp_path).message
    assert refused(NotFoundError, f"{run}@25", tmp_path).kind == "no-checkpoint"
    assert refused(NotFoundError, tmp_path / "nowhere", tmp_path).kind == "no-run"
    assert "of step 15" in refused(NotFoundError, {"run": str(run), "steps": [10, 15]}, tmp_path).message
    few = refused(InvalidInputError, {"run": str(run), "steps": "10..30", "count_min": 5}, tmp_path)
    assert few.kind == "too-few"


def test_steps_of_one_number_have_no_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, 7, random_arrays(0))
    error = refused(InvalidInputError, [f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path, method="wma", order="step")
    assert error.kind == "no-order" and "order: given" in error.hints[0]


def test_order_given_is_that_of_the_user(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        save(tmp_path / name, 7, {"w": np.full(2, float(i), np.float32)})
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        found, _ = merged([f"{tmp_path}/{n}" for n in names], tmp_path / f"out{number}", "wma")
        assert found["w"][0].item() == pytest.approx(2 / 3 if names[1] == "b" else 1 / 3)


def test_a_step_that_exists_is_not_touched(run: Path, tmp_path: Path) -> None:
    ckpt.merge(f"{run}@10..30", tmp_path / "out")
    before = images(tmp_path / "out")
    without_data(run)
    with pytest.raises(AlreadyExistsError):
        ckpt.merge(f"{run}@10..20", tmp_path / "out", step=30)
    assert images(tmp_path / "out") == before
    opened(tmp_path / "out")


def test_damage_in_a_source_is_told_and_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    file = next((run / "step-000000000020").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[4096 + 100] ^= 1  # behind the header
    file.write_bytes(data)
    with pytest.raises(ckpt.DamagedError, match=r"model/.*crc32c"):
        ckpt.merge(f"{run}@10..30", tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_no_target(run: Path) -> None:
    with pytest.raises(InvalidInputError, match="where the result goes"):
        ckpt.merge(f"{run}@10..30")
