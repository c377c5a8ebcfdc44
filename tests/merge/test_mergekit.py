"""Where ckpt and mergekit mean the same, they make the same: within float32, in which mergekit works.

Method: small models, and what mergekit made of them, from a file that tests/data/merge/make_mergekit.py wrote (it says the
versions); the models are written as safetensors folders and merged by ckpt with the parameters that the file gives for each case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.merge.samples import merged

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "merge" / "mergekit.npz"


def read(prefix: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN) as golden:
        found = {name.partition("/")[2]: golden[name] for name in golden.files if name.partition("/")[0] == prefix}
    assert found, prefix
    return found


def about() -> dict[str, Any]:
    with np.load(GOLDEN) as golden:
        made: dict[str, Any] = json.loads(golden["about"].tobytes())
    return made


CASES = about()["cases"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number in range(4):
        (folder / str(number)).mkdir()
        save_file(read(str(number)), folder / str(number) / "model.safetensors")
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n]['mergekit']}")
def test_ckpt_makes_what_mergekit_made(models: Path, tmp_path: Path, number: int) -> None:
    case = CASES[number]
    weights = case["each"].get("weight", [1.0] * 3)
    sources = [{"run": str(models / str(i + 1)), "step": i + 1, "weight": w} for i, w in enumerate(weights)]
    method, parameters = case["ckpt"]["method"], {k: v for k, v in case["ckpt"].items() if k != "method"}
    found, _ = merged(sources, tmp_path / "out", method, base=str(models / "0"), **parameters)
    expected = read(f"case {number}")
    assert sorted(found) == sorted(expected)
    base = read("0")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=2e-6, atol=1e-6, err_msg=name)
    moved = [name for name in base if (np.abs(expected[name] - base[name]) > 1e-3).mean() > 0.05]
    assert len(moved) == len(base)  # the comparison is of changes, not of the base with itself


def test_the_golden_file_says_what_made_it() -> None:
    assert {"mergekit", "torch", "transformers", "numpy"} <= set(about()["versions"])
    assert len({case["mergekit"] for case in CASES}) >= 8
