"""`ckpt reshard` gives an equal checkpoint on any layout.

Method: there and back, compared bit for bit; bytes counted at the store.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import ckpt
from ckpt.commit.complete import Request
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import plan_reshard, reshard
from ckpt.engine.save import SaveSession
from ckpt.engine.verify import verify
from ckpt.layout.files import read_layout
from ckpt.layout.presets import from_degrees
from ckpt.state import collect
from ckpt.store.counting import CountingStore
from ckpt.store.posix import PosixStore
from tests.cli.conftest import Model, Program, save_run

DEFAULTS = Options()
LAYOUT = """
version: 1
mesh: [{pp: 2}, {tp: 2}]
pipeline: {axis: pp, layers: 2}
rules:
  - {match: "embedding.weight", shard: [{tp: 0}], stage: first}
  - {match: "layers.{layer}.attention.wq.weight", shard: [{tp: 1}]}
  - {match: "layers.{layer}.norm.*"}
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 7 MB, so that checksum blocks do not dominate."""
    url = tmp_path_factory.mktemp("larger") / "run"
    save_run(url, steps=(5,), width=256, vocabulary=1000)
    return url


def opened(url: Path, options: Options = DEFAULTS) -> StoredCheckpoint:
    return StoredCheckpoint(PosixStore(url, options=options), "latest", options)


def values(url: Path) -> dict[str, bytes]:
    with ckpt.open(url) as checkpoint:
        return {name: view[...].numpy().tobytes() for name, view in checkpoint.items()}


def test_there_and_back_is_equal_bit_for_bit(program: Program, larger: Path, tmp_path: Path) -> None:
    file = tmp_path / "layout.yaml"
    file.write_text(LAYOUT)
    there, back = tmp_path / "there", tmp_path / "back"
    first = program("reshard", f"{larger}@5", there, "--layout", file, "--json")
    assert first.code == 0 and first.document["num_images"] == 4
    assert first.document["read_bytes"] <= 1.02 * first.document["wanted_bytes"]
    assert program("verify", there).code == 0
    second = program("reshard", there, back, "--dp", 1, "--json")
    assert second.code == 0 and second.document["num_images"] == 1 and program("verify", back).code == 0
    assert values(there) == values(larger) == values(back)
    images = [next(url.rglob("00000-of-*.safetensors")).read_bytes() for url in (larger, back)]
    assert images[0] == images[1]
    with ckpt.open(larger) as a, ckpt.open(there) as b, ckpt.open(back) as c:
        assert a.objects() == b.objects() == c.objects()
        for name, rank in a.objects():
            assert (
                repr(a.read_object(name, rank=rank))
                == repr(b.read_object(name, rank=rank))
                == repr(c.read_object(name, rank=rank))
            )
        assert a.manifest.metadata == b.manifest.metadata and a.manifest.metrics == b.manifest.metrics


def test_every_source_byte_is_read_once(larger: Path, tmp_path: Path) -> None:
    options = Options()
    counting = CountingStore(PosixStore(larger, options=options))
    stored = StoredCheckpoint(counting, "latest", options)
    done: list[int] = []
    into = PosixStore(tmp_path / "new", options=options)
    report = reshard(stored, into, read_layout(LAYOUT), options=options, progress=done.append)
    images = sum(n for key, n in counting.traffic.bytes_read_of.items() if key.endswith(".safetensors"))
    objects = sum(row.nbytes for row in stored.objects)
    assert images - objects == report.read_nbytes <= 1.02 * report.wanted_nbytes
    assert report.wanted_nbytes == stored.manifest.tensor_bytes
    assert abs(sum(done) - plan_reshard(stored, read_layout(LAYOUT), options=options).work_nbytes) < 1000


@pytest.mark.parametrize("memory_bytes", [1, 3 << 20, 1 << 30])
def test_the_memory_budget_changes_nothing_in_the_bytes_written(
    larger: Path, tmp_path: Path, memory_bytes: int
) -> None:
    """One byte of budget makes parts of one chunk: fragments, blocks and objects then lie across parts."""
    options = Options(chunk_bytes=1 << 20)
    stored = opened(larger, options)
    layout = from_degrees([(spec.name, spec.shape) for spec in stored.specs], dp=3)
    for name, budget in (("bounded", memory_bytes), ("free", 1 << 32)):
        into = PosixStore(tmp_path / name, options=options)
        reshard(stored, into, layout, options=options, memory_bytes=budget)
    images = [
        sorted(path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")) for name in ("bounded", "free")
    ]
    assert images[0] == images[1] and len(images[0]) == 3
    assert verify(opened(tmp_path / "bounded")).findings == []


def test_a_resharded_checkpoint_loads_as_the_source_does(larger: Path, tmp_path: Path) -> None:
    stored = opened(larger)
    reshard(stored, PosixStore(tmp_path / "new", options=stored.options), read_layout(LAYOUT), options=stored.options)
    loaded = []
    for url in (larger, tmp_path / "new"):
        model = Model(256, 1000)
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "progress": {"epoch": 0}}
        ckpt.load(state, url)
        assert state["progress"] == {"epoch": 1}
        draw = torch.rand(4)
        loaded.append((model.state_dict(), optimizer.state_dict(), draw))
    (model_a, optimizer_a, draw_a), (model_b, optimizer_b, draw_b) = loaded
    assert torch.equal(draw_a, draw_b) and all(torch.equal(model_a[k], model_b[k]) for k in model_a)
    for number, slots in optimizer_a["state"].items():
        assert all(torch.equal(slots[k], optimizer_b["state"][number][k]) for k in slots)
    assert optimizer_a["param_groups"] == optimizer_b["param_groups"]


def test_a_layout_that_does_not_fit_writes_nothing(program: Program, gpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "layout.yaml"
    file.write_text('version: 1\nmesh: [{tp: 2}]\nrules:\n  - {match: "embedding.weight", shard: [{tp: 0}]}\n')
    outcome = program("reshard", gpt, tmp_path / "new", "--layout", file)
    assert outcome.code == 2 and "model/layers.0.attention.wq.weight" in outcome.err
    assert not (tmp_path / "new").exists()


class ThreadWorld:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[np.ndarray]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def all_gather(self, data: np.ndarray) -> list[np.ndarray]:
        self._slots[self.rank] = np.array(data)
        self._barrier.wait(30)
        out = list(self._slots)
        self._barrier.wait(30)
        return out


def save_on_ranks(url: Path, size: int) -> None:
    """A checkpoint of `size` ranks that hold the same tensors and each an RNG state of its own."""
    barrier, slots = threading.Barrier(size), [np.empty(0, np.uint8)] * size
    options = Options()

    def one(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        state = {"model": {"w": torch.arange(64.0).reshape(8, 8)}, "rng": ckpt.RNG({"own": generator}), "n": 3}
        local = collect(state, rank=rank, world=size, layout=None)
        session = SaveSession(PosixStore(url, options=options), ThreadWorld(rank, size, barrier, slots), options)
        session.save(local, Request(step=4))

    with ThreadPoolExecutor(size) as pool:
        for future in [pool.submit(one, rank) for rank in range(size)]:
            future.result(60)


@pytest.mark.parametrize("dp", [1, 2, 5])
def test_objects_of_all_ranks_survive_any_number_of_images(program: Program, tmp_path: Path, dp: int) -> None:
    """Rows keep the rank that saved them, whoever's image holds their bytes; the world stays the one that saved."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_on_ranks(source, 3)
    assert program("reshard", source, target, "--dp", dp).code == 0
    assert program("verify", target).code == 0
    assert program("diff", source, target, "--exit-code").code == 0
    with ckpt.open(source) as a, ckpt.open(target) as b:
        assert a.manifest.world == b.manifest.world == 3 and len(b.manifest.writers) == dp
        assert a.manifest.layouts_by_rank == b.manifest.layouts_by_rank
        assert sorted(a.objects()) == sorted(b.objects()) and len(b.objects()) >= 6
        for name, rank in a.objects():
            assert repr(a.read_object(name, rank=rank)) == repr(b.read_object(name, rank=rank))
