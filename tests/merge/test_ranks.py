"""Goal: the ranks of a job and the tasks of a Ray cluster make the same bits as one process.

Method: real `torchrun`, a real Ray on this machine, and a rank that is killed or fails.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.merge.ranks import ranks_of
from tests.merge.samples import images, random_arrays, save

ROOT = Path(__file__).resolve().parents[2]
METHOD = ("--method", "ties", "--set", "keep=0.3")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CKPT_MERGE_IMAGE_BYTES": "100000", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three snapshots, their base, and what one process makes of them, in several images."""
    folder = tmp_path_factory.mktemp("ranks")
    shapes = {f"layers.{i}.w": (150, 128) for i in range(6)}
    base = random_arrays(9, shapes)
    save(folder / "run", 1, base)
    for i in range(3):
        change = random_arrays(i, shapes, scale=0.1)
        save(folder / "run", 10 * (i + 1), {name: base[name] + change[name] for name in base})
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", *words(folder, folder / "one")], env=ENVIRONMENT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(images(folder / "one")) > 3
    return folder


def words(runs: Path, into: Path) -> list[str]:
    return ["merge", f"{runs}/run@10..30", "--base", f"{runs}/run@1", "-o", str(into), *METHOD]


def torchrun(runs: Path, into: Path, *, name: str, fail: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={name}", "-m", "ckpt"]
    more = {"CKPT_FAILPOINT": fail} if fail else {}
    return subprocess.run(
        [*command, *words(runs, into)],
        env={**ENVIRONMENT, **more},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.timeout(240)
def test_ranks_of_torchrun_make_the_bits_of_one_process(runs: Path, tmp_path: Path) -> None:
    done = torchrun(runs, tmp_path / "out", name="job-a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 30 is in") == 1
    assert images(tmp_path / "out") == images(runs / "one")


@pytest.mark.timeout(240)
def test_a_job_that_was_killed_goes_on_under_its_name(runs: Path, tmp_path: Path) -> None:
    killed = torchrun(runs, tmp_path / "out", name="job-b", fail="merge.before-image-commit:kill@2")
    assert killed.returncode != 0
    with pytest.raises(ckpt.NotFoundError):
        ckpt.open(tmp_path / "out")
    plans = list((tmp_path / "out").rglob("plan.json"))
    assert len(plans) == 1
    done = torchrun(runs, tmp_path / "out", name="job-b")
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "out") == images(runs / "one")
    assert len([folder for folder in (tmp_path / "out").glob("step-*/*") if folder.is_dir()]) == 1


def test_a_rank_that_fails_tells_the_others(runs: Path, tmp_path: Path) -> None:
    into = tmp_path / "out"
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "job-c"}
    command = [sys.executable, "-m", "ckpt", *words(runs, into)]
    failing = {**ENVIRONMENT, **job, "CKPT_FAILPOINT": "merge.before-record:error@1"}
    others = subprocess.Popen(command, env={**ENVIRONMENT, **job, "RANK": "0"}, stderr=subprocess.PIPE, text=True)
    failed = subprocess.run(command, env={**failing, "RANK": "1"}, capture_output=True, text=True, timeout=60)
    try:
        _, said = others.communicate(timeout=60)
    finally:
        others.send_signal(signal.SIGKILL)
    assert (failed.returncode, others.returncode) == (1, 1)
    assert "rank 1 of the merge failed" in said


def test_a_job_that_is_said_by_half_is_refused() -> None:
    assert ranks_of({}) is None and ranks_of({"WORLD_SIZE": "1"}) is None
    with pytest.raises(InvalidInputError, match="WORLD_SIZE"):
        ranks_of({"WORLD_SIZE": "4"})


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'ckpt[ray]')")
@pytest.mark.timeout(240)
def test_tasks_on_ray_make_the_bits_of_one_process(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt", *words(runs, tmp_path / "out"), "--ray", "local", "--workers", "2"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "out") == images(runs / "one")


def test_without_ray_the_error_says_what_to_do(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInputError, match="needs the package `ray`") as caught:
        ckpt.merge(f"{runs}/run@10..30", tmp_path / "out", ray="local")
    assert "ckpt[ray]" in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
