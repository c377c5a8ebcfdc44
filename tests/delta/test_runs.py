"""`ckpt delta` as a program: it keeps within its memory, leaves nothing half-visible, and refuses what cannot be before any I/O.

Method: the command in processes of its own, killed at named places; images of the sources removed, so that any read of data would
end in another error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.cli import run as run_program
from ckpt.commit.gc import collect_garbage
from ckpt.config import Options
from ckpt.delta import api
from ckpt.errors import (
    AlreadyExistsError,
    BudgetError,
    CheckpointError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
)
from ckpt.store.open import open_store
from tests.delta.conftest import Tuned, make_tuned
from tests.merge.samples import images, opened, same, save
from tests.merge.test_memory import MIB, program

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("merge.in-image", "merge.before-image-commit", "merge.before-index", "commit.before-manifest")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("small"), torch.float32, num=2)


def killed_at(place: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ckpt", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CKPT_FAILPOINT": f"{place}:kill"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("place", PLACES)
def test_killed_in_the_middle_leaves_nothing_to_see(small: Tuned, tmp_path: Path, place: str) -> None:
    delta, back = tmp_path / "delta", tmp_path / "back"
    make = ("make", small.url(0), "--base", small.base_url, "-o", delta)
    apply = ("apply", delta, "--base", small.base_url, "-o", back)
    for into, words in ((delta, make), (back, apply)):
        killed_at(place, "delta", *words)
        with pytest.raises(NotFoundError):
            ckpt.open(into)
        store = open_store(into, options=Options())
        collect_garbage(store, options=Options(), force_unfinished=True)
        assert [file for file in into.rglob("*") if file.is_file()] == []
        assert run_program(["delta", *map(str, words), "-q"]) == 0
    same(opened(back), small.tunes[0])


def test_what_is_stored_does_not_depend_on_memory(small: Tuned, tmp_path: Path) -> None:
    for method in ("compeft", "tall"):
        for number, memory in enumerate((None, "300MiB")):
            into = tmp_path / f"{method}{number}"
            api.make(small.url(0), into, base=small.base_url, method=method, memory=memory)
        assert images(tmp_path / f"{method}0") == images(tmp_path / f"{method}1")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.w": (1024, 1024) for i in range(8)} | {
        "embed": (16384, 1024)
    }  # 96 MiB, 64 of them one tensor
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save(folder / "base", 1, arrays)
    for step in (2, 3):
        save(folder / "tuned", step, {name: array * np.float32(1 + step / 1000) for name, array in arrays.items()})
    return folder


@pytest.mark.parametrize("method", ["exact", "compeft", "tall"])
def test_peak_is_within_what_memory_allows(large: Path, tmp_path: Path, method: str) -> None:
    sources = [f"{large}/tuned@{step}" for step in ((2, 3) if method == "tall" else (2,))]
    make = ("delta", "make", *sources, "--base", f"{large}/base", "-o", tmp_path / "delta", "--method", method)
    apply = ("delta", "apply", tmp_path / "delta", "--base", f"{large}/base", "-o", tmp_path / "back", "--task", 1)
    for words in (make, apply):
        found = program(tmp_path, *words, "--memory", "330MiB")
        assert found["peak"] <= 330 * MIB and not found["torch"]


@pytest.mark.parametrize(
    ("sources", "more", "kind", "code"),
    [
        (("t@2",), {"method": "exakt"}, InvalidInputError, "unknown-method"),
        (("t@2",), {"density": 0.5}, InvalidInputError, "usage"),
        (("t@2",), {"method": "compeft", "density": 0.0}, InvalidInputError, "usage"),
        (("t@2",), {"method": "compeft", "scale": -1.0}, InvalidInputError, "usage"),
        (("t@2",), {"method": "compeft", "scope": "row"}, InvalidInputError, "usage"),
        (("t@2",), {"method": "tall", "threshold": float("nan")}, InvalidInputError, "usage"),
        (("t@2", "t@3"), {}, InvalidInputError, "wrong-number"),
        (("t@2",), {"memory": "64MiB"}, BudgetError, "budget"),
        (("t@2",), {"base": "absent"}, NotFoundError, "no-run"),
        (("t@9",), {}, NotFoundError, "no-checkpoint"),
        (("t@2",), {"base": "unlike"}, MismatchError, "nothing-in-common"),
        (("t@2",), {"into": "b"}, AlreadyExistsError, "already-exists"),
        ((), {}, InvalidInputError, "no-sources"),
    ],
)
def test_bad_input_is_refused_before_data_is_read(
    tmp_path: Path, sources: tuple[str, ...], more: dict[str, Any], kind: type[CheckpointError], code: str
) -> None:
    for run, step in (("b", 2), ("t", 2), ("t", 3)):
        save(tmp_path / run, step, {"w": np.ones((4, 4), np.float32) * step})
    save(tmp_path / "unlike", 1, {"w": np.ones((4, 5), np.float32)})
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    base, into = tmp_path / more.pop("base", "b"), tmp_path / more.pop("into", "out")
    with pytest.raises(kind) as caught:
        api.make([f"{tmp_path}/{one}" for one in sources], into, base=base, **more)
    assert caught.value.kind == code, caught.value.message
    assert not (tmp_path / "out").exists()


def test_what_apply_refuses(small: Tuned, tmp_path: Path) -> None:
    api.make([small.url(0), small.url(1)], tmp_path / "two", base=small.base_url, method="tall")
    for task, text in ((None, "holds 2 fine-tunes"), ("3", "no fine-tune `3`"), ("x", "no fine-tune `x`")):
        with pytest.raises(InvalidInputError, match=text) as caught:
            api.apply(tmp_path / "two", tmp_path / "out", base=small.base_url, task=task)
        assert caught.value.kind == "no-task" and small.url(1) in caught.value.hints[0]
    with pytest.raises(NotFoundError, match="is no delta"):
        api.apply(small.url(0), tmp_path / "out", base=small.base_url)
    shutil.copytree(small.folder / "base", tmp_path / "out")
    with pytest.raises(AlreadyExistsError):
        api.apply(tmp_path / "two", tmp_path / "out", base=small.base_url, task=1, step=1)


def test_nan_is_refused_by_methods_that_compare_and_kept_by_the_one_that_does_not(tmp_path: Path) -> None:
    save(tmp_path / "base", 1, {"w": np.ones(8, np.float32)})
    save(tmp_path / "tuned", 2, {"w": np.array([1, 2, np.nan, 4, 5, 6, 7, 8], np.float32)})
    for method in ("compeft", "tall"):
        with pytest.raises(CheckpointError, match="`model/w`|`w`") as caught:
            api.make(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", method=method)
        assert caught.value.kind == "not-finite" and not list(tmp_path.glob("out/**/*.json"))
    api.make(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    api.apply(tmp_path / "out", tmp_path / "back", base=tmp_path / "base")
    same(opened(tmp_path / "back"), opened(tmp_path / "tuned"))


def test_a_delta_is_an_ordinary_checkpoint(small: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.make(small.url(0), tmp_path / "delta", base=small.base_url, method="compeft")
    for words in (("verify", tmp_path / "delta"), ("copy", tmp_path / "delta", tmp_path / "copy")):
        assert run_program([*map(str, words), "-q"]) == 0
    api.apply(tmp_path / "copy", tmp_path / "back", base=small.base_url)
    capsys.readouterr()
    assert run_program(["show", str(tmp_path / "delta"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["delta"]["base"]["step"] == 1
    image = next((tmp_path / "copy").rglob("*.safetensors"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    with pytest.raises(ckpt.DamagedError):
        api.apply(tmp_path / "copy", tmp_path / "none", base=small.base_url)
