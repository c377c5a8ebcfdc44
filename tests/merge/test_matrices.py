"""Methods on whole matrices: against their recipes written again over dense arrays, at ranks that are not full, whatever the
number of threads, and taken up again where an earlier merge left off.

Method: NumPy with full factors (the methods use thin ones), gradients of torch for DOGE; processes with other numbers of threads.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ckpt
from ckpt.errors import BudgetError, InvalidInputError, MismatchError
from ckpt.merge import matrices
from tests.merge.samples import SHAPES, doubles, images, merged, opened, random_arrays, same, save

Array = NDArray[np.float64]
Tensors = dict[str, torch.Tensor]
ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("tsv_m", "tsv_m_reweighted", "opcm", "doge")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[Tensors], Tensors]:
    """Three fine-tunes at steps 10, 20, 30 of a base at step 1."""
    base = random_arrays(99)
    sources = []
    for i in range(3):
        change = random_arrays(i, scale=0.1 * (i + 1))
        sources.append(save(tmp_path / "run", 10 * (i + 1), {n: base[n] + change[n] for n in base}))
    return tmp_path / "run", sources, save(tmp_path / "run", 1, base)


def deltas_of(sources: list[Tensors], base: Tensors, name: str) -> list[Array]:
    return [doubles(source, name) - doubles(base, name) for source in sources]


def near(found: Tensors, base: Tensors, changes: dict[str, Any], atol: float = 2e-6) -> None:
    for name, change in changes.items():
        np.testing.assert_allclose(
            found[name].numpy(), doubles(base, name) + change, rtol=1e-6, atol=atol, err_msg=name
        )


def is_matrix(name: str) -> bool:
    return len(SHAPES[name]) == 2 and math.prod(SHAPES[name]) > 0


# tsv-m


def tsv_reference(deltas: list[Array], weigh: str, rank: str) -> Array:
    def polar(matrix: Array) -> Array:
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        return np.asarray(u @ v)

    most = min(deltas[0].shape) // len(deltas)
    u, s, v = [], [], []
    outliers = []
    for delta in deltas:
        rms = np.sqrt((delta**2).mean())
        outliers.append(np.linalg.norm(delta[np.abs(delta) > 3 * rms]))
        factors = np.linalg.svd(delta, full_matrices=False)
        kept = most
        if rank == "energy":
            mass = np.cumsum(factors[1] ** 2) / (factors[1] ** 2).sum()
            kept = min(most, int(np.argmax(mass >= 0.9)) + 1)
        elif rank == "sparsity":
            kept = max(1, int(most * (np.abs(delta) > 0.05 * rms).mean()))
        u.append(factors[0][:, :kept])
        s.append(factors[1][:kept])
        v.append(factors[2][:kept])
    total = sum(outliers)
    shares = [3 * o / total for o in outliers] if weigh == "outlier" and total > 0 else [1.0] * 3
    middle = np.concatenate([w * one for w, one in zip(shares, s, strict=True)])
    return np.asarray(polar(np.concatenate(u, axis=1)) @ np.diag(middle) @ polar(np.concatenate(v, axis=0)))


@pytest.mark.parametrize("weigh", ["outlier", "uniform"])
@pytest.mark.parametrize("rank", ["energy", "sparsity", "equal"])
def test_reweighted_tsv_m_is_its_recipe(run: Any, tmp_path: Path, weigh: str, rank: str) -> None:
    url, sources, base = run
    found, _ = merged(
        f"{url}@10..30", tmp_path / "out", "tsv_m_reweighted", base=f"{url}@1", weigh=weigh, rank=rank, scale=0.5
    )
    changes = {}
    for name in base:
        deltas = deltas_of(sources, base, name)
        changes[name] = 0.5 * (tsv_reference(deltas, weigh, rank) if is_matrix(name) else sum(deltas) / 3)
    near(found, base, changes)
    if (weigh, rank) == ("uniform", "equal"):
        plain, _ = merged(f"{url}@10..30", tmp_path / "plain", "tsv_m", base=f"{url}@1", scale=0.5)
        same(found, plain)


# opcm


def opcm_reference(sources: list[Tensors], base: Tensors, alpha: float) -> dict[str, Array]:
    """The published recursion, with full factors: merged weights, a scale, and the running mean of lengths."""
    merged_change = {name: doubles(sources[0], name) - doubles(base, name) for name in base}

    def length(change: dict[str, Array]) -> float:
        return math.sqrt(sum(float((one**2).sum()) for one in change.values()))

    scale, lengths = 1.0, [length(merged_change)]
    for source in sources[1:]:
        delta = {name: doubles(source, name) - doubles(base, name) for name in base}
        lengths.append(length(delta))
        new = {}
        for name, change in delta.items():
            projected = change
            if is_matrix(name):
                u, s, vt = np.linalg.svd(merged_change[name], full_matrices=True)
                k = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
                inner = u.T @ change @ vt.T
                inner[:k, :k] = 0
                for i in range(k, len(s)):
                    inner[i, i] = 0
                projected = u @ inner @ vt
            new[name] = scale * merged_change[name] + projected
        mean = sum(lengths) / len(lengths)
        scale = length(new) / mean
        merged_change = {name: one / scale for name, one in new.items()}
    return merged_change


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_opcm_is_its_recipe(run: Any, tmp_path: Path, alpha: float) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "opcm", base=f"{url}@1", alpha=alpha)
    near(found, base, opcm_reference(sources, base, alpha))


def test_opcm_goes_on_from_its_own_result_without_the_earlier_sources(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    merged(f"{url}@10..20", tmp_path / "two", "opcm", base=f"{url}@1")
    hidden = url.rename(tmp_path / "hidden")
    save(url, 1, {name: tensor.numpy() for name, tensor in base.items()})
    save(url, 30, {name: tensor.numpy() for name, tensor in sources[2].items()})
    three, _ = merged([f"{tmp_path}/two@20", f"{url}@30"], tmp_path / "three", "opcm", base=f"{url}@1")
    near(three, base, opcm_reference(sources, base, 0.5), atol=5e-6)
    with ckpt.open(tmp_path / "three") as checkpoint:
        state = checkpoint.manifest.metadata["merge"]["state"]
    assert state["count"] == 3 and hidden.exists()


def test_opcm_refuses_to_go_on_where_it_cannot(run: Any, tmp_path: Path) -> None:
    url, _, base = run
    merged(f"{url}@20..30", tmp_path / "two", "opcm", base=f"{url}@1")
    other = save(tmp_path / "other", 2, random_arrays(7))
    with pytest.raises(InvalidInputError, match="must be the first source") as caught:
        ckpt.merge([f"{tmp_path}/two@30", f"{url}@10"], tmp_path / "out", method="opcm", base=f"{url}@1")
    assert caught.value.kind == "not-first"
    with pytest.raises(MismatchError, match="another base"):
        sources = [f"{tmp_path}/two@30", f"{url}@10"]
        ckpt.merge(sources, tmp_path / "out", method="opcm", base=f"{tmp_path}/other@2", order="given")
    assert other and not (tmp_path / "out").exists()
    fresh, _ = merged(
        [f"{tmp_path}/two@30", f"{url}@10"], tmp_path / "fresh", "opcm", base=f"{url}@1", fresh=True, order="given"
    )
    near(fresh, base, opcm_reference([opened(tmp_path / "two"), opened(url, 10)], base, 0.5))


# doge


def doge_reference(sources: list[Tensors], base: Tensors, steps: int) -> dict[str, Array]:
    """As its paper and its code have it, with gradients by torch."""
    all_deltas = [{n: doubles(s, n) - doubles(base, n) for n in base} for s in sources]
    least = []
    for one in all_deltas:
        sizes = np.sort(np.concatenate([np.abs(array.astype(np.float32)).reshape(-1) for array in one.values()]))[::-1]
        least.append(sizes[int(0.3 * len(sizes)) - 1])
    out = {}
    for name in base:
        deltas = [one[name] for one in all_deltas]
        norms = [np.linalg.norm(delta) for delta in deltas]
        shares = [0.07 / norm if norm else 0.0 for norm in norms]
        correction: Any = 0.0
        if is_matrix(name):
            correction = learned(deltas, shares, steps)
        out[name] = sum(
            share * (np.where(np.abs(delta.astype(np.float32)) >= low, delta, 0.0) + correction)
            for share, delta, low in zip(shares, deltas, least, strict=True)
        )
    return out


def learned(deltas: list[Array], shares: list[float], steps: int) -> Array:
    stack, weights = torch.tensor(np.stack(deltas)), torch.tensor(shares, dtype=torch.float64)
    mean = (stack * weights[:, None, None]).sum(dim=0)
    rank = min(deltas[0].shape)
    leading = [np.linalg.svd(delta)[0][:, : rank // len(deltas)] for delta in deltas]
    space = torch.tensor(np.linalg.svd(np.concatenate(leading, axis=1))[0][:, : rank // 6])
    correction = torch.zeros(deltas[0].shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([correction], lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        inside = stack * (stack - mean - weights.sum() * correction)
        (inside.sum(dim=2) ** 2).sum().backward()
        assert correction.grad is not None
        correction.grad -= space @ (space.T @ correction.grad)
        optimizer.step()
    return correction.detach().numpy()


def test_doge_is_its_recipe(run: Any, tmp_path: Path) -> None:
    url, sources, base = run
    found, _ = merged(f"{url}@10..30", tmp_path / "out", "doge", base=f"{url}@1", steps=60)
    near(found, base, doge_reference(sources, base, 60))
    plain, _ = merged(f"{url}@10..30", tmp_path / "plain", "doge", base=f"{url}@1", steps=0)
    assert not torch.equal(plain["layers.0.q.weight"], found["layers.0.q.weight"])
    same(plain, found, ["layers.1.stack", "layers.0.norm.weight", "scalar"])


# all of them


@pytest.mark.parametrize("method", MATRIX)
def test_sources_that_are_the_base_leave_it(tmp_path: Path, method: str) -> None:
    base = random_arrays(3)
    for step in (1, 2, 3):
        tensors = save(tmp_path / "run", step, base)
    found, _ = merged(f"{tmp_path}/run@2..3", tmp_path / "out", method, base=f"{tmp_path}/run@1")
    same(found, tensors)


@pytest.mark.parametrize("method", MATRIX)
def test_changes_of_low_rank(tmp_path: Path, method: str) -> None:
    """Of rank 1, parallel, equal, and one that is zero: nothing but numbers comes out, in the span of what went in."""
    rng = np.random.default_rng(0)
    base = {"w": rng.integers(-9, 9, (12, 9)).astype(np.float32)}  # whole numbers, so that changes are exact
    one = np.outer(rng.integers(1, 4, 12), rng.integers(1, 4, 9)).astype(np.float32)
    for number, changes in enumerate(([one, 2 * one], [one, one], [one, 0 * one], [0 * one, one])):
        run = tmp_path / f"run{number}"
        save(run, 1, base)
        for i, change in enumerate(changes):
            save(run, 2 + i, {"w": base["w"] + change})
        found, _ = merged(
            f"{run}@2..3", run / "out", method, base=f"{run}@1", **({"steps": 5} if method == "doge" else {})
        )
        change = found["w"].double().numpy() - base["w"]
        assert np.isfinite(change).all() and np.linalg.norm(change) > 0
        left = change - one @ np.linalg.pinv(one) @ change
        assert method == "doge" or np.linalg.norm(left) < 1e-5 * np.linalg.norm(change)


@pytest.mark.parametrize("method", MATRIX)
def test_more_sources_than_rows(tmp_path: Path, method: str) -> None:
    shapes = {"narrow": (2, 30), "column": (5, 1), "flat": (7,)}
    save(tmp_path / "run", 1, random_arrays(0, shapes))
    for step in range(2, 6):
        save(tmp_path / "run", step, random_arrays(step, shapes))
    found, _ = merged(f"{tmp_path}/run@2..5", tmp_path / "out", method, base=f"{tmp_path}/run@1")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("method", MATRIX)
def test_the_order_in_which_sources_are_named_changes_no_bit(run: Any, tmp_path: Path, method: str) -> None:
    """Sources with steps have an order of their own, which OPCM goes by, and sums of the others."""
    url, _, _ = run
    expected = None
    for number, steps in enumerate(((10, 20, 30), (30, 10, 20))):
        ckpt.merge([f"{url}@{step}" for step in steps], tmp_path / f"out{number}", method=method, base=f"{url}@1")
        found = images(tmp_path / f"out{number}")
        assert expected in (None, found)
        expected = found
    if method == "opcm":
        ckpt.merge([f"{url}@30", f"{url}@10"], tmp_path / "given", method=method, base=f"{url}@1", order="given")
        ckpt.merge([f"{url}@30", f"{url}@10"], tmp_path / "auto", method=method, base=f"{url}@1")
        assert images(tmp_path / "given") != images(tmp_path / "auto")


def test_too_little_memory_is_refused_with_the_number_before_a_byte_is_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "run", step, {"small": np.zeros(3, np.float32), "big": np.zeros((2048, 2048), np.float32)})
    for file in (tmp_path / "run").rglob("*.safetensors"):
        file.unlink()  # whoever reads a tensor fails
    for method in MATRIX:
        with pytest.raises(
            BudgetError, match=r"`model/big` \[2048, 2048\] must be in memory whole, which takes \d+ MiB"
        ):
            ckpt.merge(
                f"{tmp_path}/run@2..3", tmp_path / "out", method=method, base=f"{tmp_path}/run@1", memory="320MiB"
            )
    assert not (tmp_path / "out").exists()


THREADS = """
import hashlib, sys
from pathlib import Path
import ckpt
run, into, method = sys.argv[1:]
ckpt.merge(f"{run}@2..3", into, method=method, base=f"{run}@1", **({"steps": 3} if method == "doge" else {}))
files = sorted(Path(into).rglob("*.safetensors"))
print(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
"""


def test_threads_of_blas_change_no_bit(tmp_path: Path) -> None:
    """Of a size at which NumPy's factors do differ between one thread and two, where it is let."""
    rng = np.random.default_rng(5)
    for step in (1, 2, 3):
        save(tmp_path / "run", step, {"w": rng.standard_normal((300, 256)).astype(np.float32)})
    for method in MATRIX:
        found = set()
        for threads in ("1", "2", "7"):
            done = subprocess.run(
                [sys.executable, "-c", THREADS, str(tmp_path / "run"), str(tmp_path / f"{method}{threads}"), method],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OPENBLAS_NUM_THREADS": threads,
                    "OMP_NUM_THREADS": threads,
                },
                capture_output=True,
                text=True,
                timeout=100,
                check=True,
            )
            found.add(done.stdout)
        assert len(found) == 1, method


def test_one_thread_is_given_back(tmp_path: Path) -> None:
    from threadpoolctl import threadpool_info

    before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with matrices.one_thread(), matrices.one_thread():
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
    assert [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"] == before


def test_what_explain_says_of_them(run: Any, tmp_path: Path) -> None:
    url, _, _ = run
    ckpt.merge(f"{url}@10..20", tmp_path / "out", method="tsv_m", base=f"{url}@1", scale=0.5)
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", "explain", str(tmp_path / "out"), "*.0.q.*", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (tensor,) = json.loads(done.stdout)["tensors"]
    assert tensor["method"] == "tsv_m" and tensor["parameters"] == {"scale": 0.5}
    assert [share["source"] for share in tensor["shares"]] == [f"{url}@10", f"{url}@20", f"base: {url}@1"]
    assert {share["weight"] for share in tensor["shares"]} == {None}
