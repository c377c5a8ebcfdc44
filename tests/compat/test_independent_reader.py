"""Goal: the format's page is enough to read any checkpoint.

Method: compare a reader made from it with `ckpt.open`, bit by bit, on checkpoints of one rank and of real ranks.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import ckpt
from tests.compat import independent_reader as independent
from tests.format.format_samples import all_dtypes, objects, raw

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

HERE = Path(__file__).parent
DEADLINE_S = 150  # of a job that takes 10 s on two idle cores


def same(folder: Path, step: int | None = None) -> independent.Checkpoint:
    """The checkpoint as the independent reader sees it, after a comparison with ckpt."""
    found = independent.read(folder, step)
    with ckpt.open(folder, step=step) as checkpoint:
        assert sorted(found.tensors) == list(checkpoint)
        for name, tensor in found.tensors.items():
            view = checkpoint[name]
            assert (tensor.dtype, tensor.role, tensor.aliases) == (
                view.spec.dtype,
                view.spec.role,
                list(view.spec.aliases),
            )
            assert tensor.data.shape[:-1] == tuple(view.shape)
            assert tensor.data.tobytes() == raw(view[...]), name
        assert sorted(found.objects) == sorted(checkpoint.objects())
        for name, rank in checkpoint.objects():
            assert repr(found.objects[name, rank]) == repr(checkpoint.read_object(name, rank=rank)), (name, rank)
        assert found.manifest["metadata"] == checkpoint.manifest.metadata
    return found


def test_the_independent_reader_imports_nothing_of_ckpt() -> None:
    tree = ast.parse((HERE / "independent_reader.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "pyarrow", "safetensors"}


def test_its_checksum_is_the_one_of_the_page() -> None:
    assert independent.crc32c(b"123456789") == 0xE3069283


def test_it_reads_every_dtype_and_object(tmp_path: Path) -> None:
    values = all_dtypes()
    ckpt.save({"t": values, "k": objects()}, tmp_path, step=4, metrics={"a": 1.5}, metadata={"b": [None]})
    found = same(tmp_path)
    assert {name: tensor.data.tobytes() for name, tensor in found.tensors.items()} == {
        f"t/{name}": raw(value) for name, value in values.items()
    }
    assert found.manifest["metrics"] == {"a": 1.5}


def test_it_reads_many_blocks(tmp_path: Path) -> None:
    ckpt.save({"x": torch.arange(50_000, dtype=torch.int32)}, tmp_path, step=1)
    found = same(tmp_path)
    np.testing.assert_array_equal(found.tensors["x"].data.view("<i4")[:, 0], np.arange(50_000))


def test_it_finds_damage_and_newer_versions(tmp_path: Path) -> None:
    ckpt.save({"x": torch.ones(4)}, tmp_path, step=1)
    manifest = next(tmp_path.glob("*/manifest.json"))
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(independent.NewerFormatError):
        independent.read(tmp_path)
    manifest.write_text(text.replace('"world": 1', '"world": 2'))
    with pytest.raises(independent.NotACheckpointError, match="digest"):
        independent.read(tmp_path)
    manifest.write_text(text)
    image = next(tmp_path.glob("*/*/*.safetensors"))
    data = bytearray(image.read_bytes())
    data[4100] ^= 1
    image.write_bytes(data)
    with pytest.raises(independent.NotACheckpointError, match="x is damaged"):
        independent.read(tmp_path)


def run_job(folder: Path, world: int) -> None:
    """All ranks of fsdp_job.py, with one deadline; what they printed when one fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    ranks = []
    try:
        for rank in range(world):
            log = (folder / f"rank{rank}.log").open("wb")
            with log:
                command = [sys.executable, str(HERE / "fsdp_job.py"), str(rank), str(world), str(folder)]
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + DEADLINE_S
        codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs


@pytest.mark.multirank
@pytest.mark.timeout(DEADLINE_S + 15)
def test_it_reads_what_two_ranks_of_fsdp_saved(tmp_path: Path) -> None:
    run_job(tmp_path, 2)
    run = tmp_path / "run"
    assert independent.steps(run) == [1, 2]
    same(run, 1)
    found = same(run)
    assert found.manifest["world"] == len(found.manifest["writers"]) == 2
    assert found.manifest["num_fragments"] > found.manifest["num_tensors"]
    expected = load_file(tmp_path / "expected.safetensors")
    for name, value in expected.items():
        assert found.tensors[f"model/{name}"].data.tobytes() == value.tobytes(), name
    assert found.tensors["model/embed.weight"].aliases == ["model/head.weight"]
    ranks = {rank for name, rank in found.objects if name == "rng"}
    assert ranks == {0, 1}
