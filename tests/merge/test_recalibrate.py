"""Goal: running statistics that were measured with the merged weights are in the result, and nothing is visible before.

Method: a real model with batch normalisation, data, and `update_bn`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.merge.lineage import explain
from tests.merge.samples import bits, merged, opened


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two snapshots of a model with a norm, with optimizer state."""
    torch.manual_seed(1)
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    for step in (1, 2):
        net(torch.randn(32, 6) * step + step).square().mean().backward()
        optimizer.step()
        ckpt.save({"model": net, "optimizer": optimizer, "progress": {"step": step}}, tmp_path / "run", step=step)
    return tmp_path / "run"


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def measured(found: ckpt.Checkpoint) -> dict[str, torch.Tensor]:
    net = model()
    net.load_state_dict({n.removeprefix("model/"): found[n][...] for n in found if n.startswith("model/")})
    torch.manual_seed(2)
    torch.optim.swa_utils.update_bn([torch.randn(16, 6) + 3 for _ in range(5)], net)
    return {f"model/{name}": value for name, value in net.named_buffers()}


def test_what_was_measured_takes_the_place_of_what_was_merged(run: Path, tmp_path: Path) -> None:
    plain, _ = merged(f"{run}@1..2", tmp_path / "plain", optimizer="combine")
    seen: list[dict[str, torch.Tensor]] = []

    def function(found: ckpt.Checkpoint) -> dict[str, torch.Tensor]:
        with pytest.raises(ckpt.NotFoundError):
            ckpt.open(tmp_path / "out")
        seen.append(measured(found))
        return seen[-1]

    ckpt.merge(f"{run}@1..2", tmp_path / "out", optimizer="combine", recalibrate=function)
    expected = {**plain, **{name.removeprefix("model/"): value for name, value in seen[0].items()}}
    found = opened(tmp_path / "out")
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in expected.items()}
    assert (
        not torch.equal(found["1.running_mean"], plain["1.running_mean"]) and int(found["1.num_batches_tracked"]) == 5
    )
    with ckpt.open(tmp_path / "out") as result:
        names = list(result)
        assert {share.source for one in explain(result.manifest, names) for share in one.shares} == {
            f"{run}@1",
            f"{run}@2",
        }
        assert result.manifest.metadata["merge"]["recalibrated"] == sorted(seen[0])
    assert list((tmp_path / "out" / "recalibrating").rglob("*")) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model/1.running_meen": np.zeros(4)}, "running_mean"),
        ({"model/1.running_mean": np.zeros(5)}, r"shape \[5\], expected \[4\]"),
        ({"model/1.running_var": np.full(4, np.nan)}, "NaN"),
        ({"model/1.num_batches_tracked": np.array(0.5)}, "int64"),
    ],
)
def test_what_cannot_be_leaves_nothing_behind(run: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ckpt.merge(f"{run}@1..2", tmp_path / "out", recalibrate=lambda found: given)
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == []


def test_an_error_of_the_function_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    def function(found: ckpt.Checkpoint) -> dict[str, Any]:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        ckpt.merge(f"{run}@1..2", tmp_path / "out", recalibrate=function)
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == []
