"""A base and fine-tunes of it: real saves, floats of two widths, numbers that are no floats, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.merge.samples import SHAPES, Arrays, random_arrays, save

SHAPES_HERE = {**SHAPES, "wide": (600, 900)}  # more than a chunk, so that chunks are joined


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A base, and what was tuned from it."""

    folder: Path
    base: dict[str, torch.Tensor]
    tunes: list[dict[str, torch.Tensor]]

    @property
    def base_url(self) -> str:
        return f"{self.folder}/base@1"

    def url(self, number: int) -> str:
        return f"{self.folder}/tuned@{number + 2}"


def change_of(seed: int) -> Arrays:
    return random_arrays(seed, SHAPES_HERE, 0.01)


def make_tuned(folder: Path, dtype: torch.dtype, num: int = 3) -> Tuned:
    arrays = random_arrays(0, SHAPES_HERE)
    base = save(folder / "base", 1, {**arrays, "count": np.arange(3)}, dtype=dtype)
    tunes = []
    for number in range(num):
        changed = {name: array + change_of(number + 1)[name] for name, array in arrays.items()}
        tunes.append(save(folder / "tuned", number + 2, {**changed, "count": np.arange(3) + number}, dtype=dtype))
    return Tuned(folder=folder, base=base, tunes=tunes)


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Tests may not change it."""
    return make_tuned(tmp_path_factory.mktemp("tuned"), request.param)
