"""A result is the same, bit for bit, whatever its sources' layouts, whoever works on it, with whatever memory, and however often
all of it was killed.

Method: one merge by every kind of method; its images against those of the same merge of resharded sources, by other numbers of
processes, within other limits, and after SIGKILL at named places and at random moments, in real processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ckpt
from ckpt import config
from ckpt.commit.gc import collect_garbage
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import reshard
from ckpt.kernels import merge as kernels
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Rule, ShardStep, Where
from ckpt.merge import compute, spans
from ckpt.merge import images as image_plans
from ckpt.merge.method import Constants, Context, Elementwise, Needs, Summary
from ckpt.merge.tile import Tile
from ckpt.store.open import open_store
from tests.merge.samples import SHAPES, images, random_arrays, save

ROOT = Path(__file__).resolve().parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "ema": {"decay": 0.8},
    "weights": {"weights": [0.2, 0.5, 0.3]},
    "ties": {"keep": 0.3},
    "ties, tensor": {"keep": 0.3, "scope": "tensor", "zero_sign": "positive"},
    "ties, layer": {"keep": 0.3, "scope": "layer"},
    "noisy": {"amount": 0.5},
    "tsv_m": {},
}
NEED_BASE = ("ties", "tsv_m", "noisy")


@ckpt.merge_method("noisy")
@dataclass(frozen=True, kw_only=True)
class Noisy(Elementwise):
    """Random masks, sums over the model, whole rows: what may depend on how a tensor is cut, in one method."""

    amount: float = 0.1

    @property
    def needs(self) -> Needs:
        return Needs(base=True, passes=1, scope="model", unit="row")

    def observe(self, tile: Tile, number: int, constants: Constants) -> Summary:
        moments = kernels.moments(tile.raw(less_base=True))
        return Summary(sums={"size": moments[:, 1]}, maxima={"top": moments[:, 3]})

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        return {"factor": summary.maxima["top"] / summary.sums["size"]}

    def apply(self, tile: Tile, constants: Constants) -> np.ndarray:
        out = tile.base
        for i in range(len(tile)):
            rows = np.abs(tile.delta(i)).max(axis=-1, keepdims=True) if tile.shape else 1.0
            out = out + self.amount * (tile.uniform(i) < 0.5) * tile.delta(i) * constants["factor"][i] / rows
        return out


def merge(sources: Sequence[str], base: str, into: Path, method: str, **more: Any) -> list[str]:
    name = method.partition(",")[0]
    extra = {"base": base} if name in NEED_BASE else {}
    ckpt.merge(list(sources), into, method=name, **METHODS[method], **extra, **more)
    return images(into)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = random_arrays(99)
    for i in range(3):
        change = random_arrays(i, scale=0.1)
        save(folder / "run", 10 * (i + 1), {name: base[name] + change[name] for name in base})
    save(folder / "run", 1, base)
    return folder


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles, fragments and images so small that every tensor of the samples is cut."""
    for module, name, value in (
        (spans, "MERGE_TILE_ELEMENTS", 64),
        (compute, "MERGE_TILE_ELEMENTS", 64),
        (compute, "APPLY_ELEMENTS", 48),
        (spans, "MERGE_FRAGMENT_ELEMENTS", 200),
        (image_plans, "MERGE_FRAGMENT_ELEMENTS", 200),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("CKPT_MERGE_IMAGE_BYTES", "1000")
    yield


def sources_of(folder: Path, name: str = "run") -> list[str]:
    return [f"{folder}/{name}@{step}" for step in (10, 20, 30)]


def reference(runs: Path, method: str, tmp: Path) -> list[str]:
    found = merge(sources_of(runs), f"{runs}/run@1", tmp / "reference", method)
    assert len(found) > 3
    return found


layouts = st.builds(
    lambda sizes, cuts: (sizes, cuts),
    st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2])),
    st.lists(st.sampled_from([(), (0,), (1,), (0, 1), (1, 0)]), min_size=7, max_size=7),
)


def layout_of(sizes: tuple[int, int], cuts: Sequence[tuple[int, ...]]) -> Layout:
    rules = []
    for (name, shape), dims in zip(SHAPES.items(), cuts, strict=True):
        used = [dim for dim in dims if dim < len(shape)]
        steps = tuple(ShardStep(axis=axis, dim=dim) for axis, dim in zip(("a", "b"), used, strict=False))
        rules.append(Rule(match=(NamePattern(name),), where=Where(shard=steps)))
    return Layout(mesh=Mesh(axes=(("a", sizes[0]), ("b", sizes[1]))), rules=tuple(rules))


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=4, phases=(Phase.explicit, Phase.generate), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(layouts, min_size=4, max_size=4))
def test_layouts_of_the_sources_change_no_bit(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, method: str, drawn: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    options = Options()
    for step, (sizes, cuts) in zip((1, 10, 20, 30), drawn, strict=True):
        stored = StoredCheckpoint(open_store(runs / "run", options=options), step, options)
        reshard(stored, open_store(folder / "run", options=options), layout_of(sizes, cuts), options=options)
    expected = reference(runs, method, folder)
    assert merge(sources_of(folder), f"{folder}/run@1", folder / "out", method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_memory_changes_no_bit(runs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less, spans are shorter, and statistics of tensors are made in passes instead of in memory."""
    expected = reference(runs, method, tmp_path)
    monkeypatch.setattr(spans, "ELEMENTS_MIN", 16)
    for number, nbytes in enumerate((2000, 10_000)):
        limits = spans.Limits(span_bytes=nbytes, unit_bytes=nbytes, total_bytes=3 * nbytes)
        monkeypatch.setattr("ckpt.merge.run.limits_for", lambda *_, limits=limits: limits)
        assert merge(sources_of(runs), f"{runs}/run@1", tmp_path / f"out{number}", method) == expected


@pytest.mark.parametrize("method", ["uniform", "ties", "tsv_m"])
def test_worker_processes_change_no_bit(
    runs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # other processes have tiles of the usual size
    monkeypatch.setenv("CKPT_MERGE_IMAGE_BYTES", "1000")
    expected = merge(sources_of(runs), f"{runs}/run@1", tmp_path / "one", method)
    assert len(expected) > 2
    for workers in (2, 3):
        into = tmp_path / f"by{workers}"
        assert merge(sources_of(runs), f"{runs}/run@1", into, method, workers=workers) == expected


# killed


def command(runs: Path, into: Path, *more: str) -> list[str]:
    method = ["--method", "ties", "--base", f"{runs}/big@1", "--set", "keep=0.3"]
    return [sys.executable, "-m", "ckpt", "merge", f"{runs}/big@10..30", "-o", str(into), *method, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CKPT_MERGE_IMAGE_BYTES": "300000", **more}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that takes a moment to merge, and the hashes of the undisturbed result."""
    folder = tmp_path_factory.mktemp("big")
    shapes = {f"layers.{i}.w": (300, 256) for i in range(8)}
    base = random_arrays(99, shapes)
    save(folder / "big", 1, base)
    for i in range(3):
        change = random_arrays(i, shapes, scale=0.1)
        save(folder / "big", 10 * (i + 1), {name: base[name] + change[name] for name in base})
    done = subprocess.run(
        command(folder, folder / "whole"), env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = images(folder / "whole")
    assert len(found) == 8
    return folder, found


def resume(into: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "ckpt", "merge", "--resume", str(into), "--json", *more]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "place",
    [
        "merge.before-record:kill@1",
        "merge.before-record:kill@5",
        "merge.before-record:kill@17",
        "merge.in-image:kill@1",
        "merge.in-image:kill@4",
        "merge.before-image-commit:kill@2",
        "commit.before-receipt:kill@3",
        "commit.after-receipt:kill@8",
        "merge.before-index:kill@1",
        "merge.before-index:kill@3",
        "commit.before-manifest:kill@1",
    ],
)
def test_killed_at_a_named_place_and_resumed_gives_the_same_bits(
    big: tuple[Path, list[str]], tmp_path: Path, place: str
) -> None:
    folder, expected = big
    into = tmp_path / "out"
    killed = subprocess.run(
        command(folder, into), env=environment(CKPT_FAILPOINT=place), capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ckpt.NotFoundError):
        ckpt.open(into)
    done = resume(into)
    assert done.returncode == 0, done.stderr
    assert images(into) == expected
    leftovers = [file.name for file in into.rglob("*") if "merge" in file.parts or "receipt" in file.name]
    assert leftovers == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(
    big: tuple[Path, list[str]], tmp_path: Path, workers: int
) -> None:
    folder, expected = big
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for attempt in range(2):
        into = tmp_path / f"out{attempt}"
        words = [*command(folder, into), "--workers", str(workers)]
        for number in range(16):
            if ended_by_itself(words, into, rng.uniform(0, 0.1 * 1.5**number)):
                break
            begun = list(into.rglob("plan.json"))
            words = words if not begun else [*words[:4], "--resume", str(into), "--workers", str(workers)]
        assert images(into) == expected, f"seed {seed}"


def ended_by_itself(words: list[str], into: Path, after_s: float) -> bool:
    """Run a merge, and kill it so long after its record says that it is at work."""
    child = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while child.poll() is None and not is_at_work(child.pid, into) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        return child.wait(after_s) == 0
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return False


def is_at_work(pid: int, into: Path) -> bool:
    return any(json.loads(file.read_text())["owner"]["pid"] == pid for file in into.rglob("plan.json"))


def test_a_merge_that_is_running_is_not_resumed_by_another(big: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = big
    into = tmp_path / "out"
    child = subprocess.Popen(
        command(folder, into), env=environment(CKPT_FAILPOINT="merge.before-index:delay=20"), stderr=subprocess.DEVNULL
    )
    try:
        while not list(into.rglob("*.receipt")):
            time.sleep(0.05)
            assert child.poll() is None
        done = resume(into)
        assert done.returncode == 12 and "still running" in done.stderr
    finally:
        child.kill()
        child.wait()
    assert resume(into).returncode == 0


def test_killed_workers_are_told_and_what_they_did_stays(big: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, expected = big
    into = tmp_path / "out"
    done = subprocess.run(
        [*command(folder, into), "--workers", "2"],
        env=environment(CKPT_FAILPOINT="merge.before-image-commit:kill@2"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "ended with status -9" in done.stderr and "--resume" in done.stderr
    again = resume(into, "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert images(into) == expected


def test_one_that_is_never_resumed_is_garbage(big: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = big
    into = tmp_path / "out"
    subprocess.run(
        command(folder, into), env=environment(CKPT_FAILPOINT="merge.in-image:kill@3"), capture_output=True, timeout=60
    )
    options = config.from_environment()
    store = open_store(into, options=options)
    collect_garbage(store, options=options, force_unfinished=True)
    assert [file for file in into.rglob("*") if file.is_file()] == []


def test_resuming_needs_the_same_sources(big: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = big
    copy = tmp_path / "runs"
    shutil.copytree(folder / "big", copy / "big")
    into = tmp_path / "out"
    subprocess.run(
        command(copy, into), env=environment(CKPT_FAILPOINT="merge.in-image:kill@3"), capture_output=True, timeout=60
    )
    shutil.rmtree(copy / "big" / "step-000000000020")
    shapes = {f"layers.{i}.w": (300, 256) for i in range(8)}
    save(copy / "big", 20, random_arrays(55, shapes))
    done = resume(into)
    assert done.returncode == 1 and "have changed" in done.stderr
