"""Goal: every checkpoint that any version ever wrote is read, bit by bit.

Method: the files in tests/data/golden, and beside them what must be read; make_golden.py says what they hold.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.verify import verify
from ckpt.format.manifest import FORMAT_VERSION
from ckpt.store.posix import PosixStore
from tests.compat import independent_reader as independent
from tests.data.golden.make_golden import describe, tied_model
from tests.format.format_samples import raw

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
VERSIONS = {path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__"}
RUNS = sorted(path for version in VERSIONS for path in (GOLDEN / version).iterdir())
BYTES_MAX = 200_000


def expected_of(run: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    document = json.loads((run / "expected.json").read_text())
    with np.load(run / "expected.npz", allow_pickle=False) as arrays:
        return document, {name: arrays[name].tobytes() for name in arrays.files}


def name_of(run: Path) -> str:
    return f"{run.parent.name}/{run.name}"


def test_every_version_has_golden_checkpoints_and_they_are_small() -> None:
    assert {f"v{version}" for version in range(1, FORMAT_VERSION + 1)} == VERSIONS
    assert {name_of(run) for run in RUNS} >= {"v1/alone", "v1/two-ranks"}
    assert (
        sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".pyc") < BYTES_MAX
    )


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_a_golden_checkpoint_reads_as_it_was_saved(run: Path) -> None:
    document, data = expected_of(run)
    with ckpt.open(run) as checkpoint:
        assert checkpoint.step == document["step"]
        assert describe(checkpoint.metrics) == document["metrics"]
        assert checkpoint.manifest.metadata == document["metadata"]
        assert len(checkpoint.manifest.writers) == document["num_writers"]
        assert set(checkpoint) == set(document["tensors"]) == set(data)
        for name, (dtype, shape) in document["tensors"].items():
            view = checkpoint[name]
            assert (view.spec.dtype, list(view.shape)) == (dtype, shape)
            assert list(view.spec.aliases) == document["aliases"].get(name, [])
            assert raw(view[...]) == data[name], name
        for name, rank, value in document["objects"]:
            assert describe(checkpoint.read_object(name, rank=rank)) == value


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_a_golden_checkpoint_is_whole_for_verify_zarr_and_the_independent_reader(run: Path) -> None:
    _, data = expected_of(run)
    stored = StoredCheckpoint(PosixStore(run, options=ckpt.Options()), "latest", ckpt.Options())
    assert verify(stored).findings == []
    assert {name: tensor.data.tobytes() for name, tensor in independent.read(run).tensors.items()} == data
    import zarr

    arrays = [node for _, node in zarr.open_group(store=ckpt.zarr_store(run), mode="r").members(max_depth=None)]
    found = {str(a.attrs["ckpt_name"]): np.asarray(a[...]).tobytes() for a in arrays if isinstance(a, zarr.Array)}
    assert found == data


def test_one_rank_loads_what_two_saved() -> None:
    run = GOLDEN / "v1" / "two-ranks"
    document, data = expected_of(run)
    shapes = {n: (getattr(torch, d), s) for n, (d, s) in document["tensors"].items() if n.startswith("t/")}
    whole = {name.removeprefix("t/"): torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    model = tied_model(torch.zeros(3, 3, dtype=torch.float16))
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    state = {"t": whole, "model": model, "optimizer": optimizer, "epoch": 0}
    loaded = ckpt.load(state, run, options=ckpt.Options(events=False))  # nothing is written beside golden files
    assert loaded.step == 40
    assert {f"t/{name}": raw(value) for name, value in whole.items()} == {n: data[n] for n in shapes}
    assert raw(model.a.weight) == raw(model.b.weight) == data["model/a.weight"]
    assert int(model.steps) == 11
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.5)


def test_the_random_stream_of_each_rank_goes_on() -> None:
    run = GOLDEN / "v1" / "two-ranks"
    draws = expected_of(run)[0]["draws"]
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for rank in range(2):
            own = np.random.default_rng(99)
            with ckpt.open(run) as checkpoint:
                ckpt.RNG({"own": own}).load_state_tree(checkpoint.read_object("rng", rank=rank))
            assert own.integers(0, 1 << 62, 4).tolist() == draws[rank]
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
