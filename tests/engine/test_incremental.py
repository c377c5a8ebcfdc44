"""Goal: `incremental=True` writes only what has changed, and every step loads bit by bit, whatever was removed, copied or cut.

Method: a frozen base under adapters, saved by one rank or by threads that play two; every step is kept as bytes and compared.
What must not be mixed up (one bit, signed zeros, equal checksums) is made on purpose.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
import ckpt.engine.planned as planned_module
from ckpt.cli import run as program
from ckpt.commit import find, names
from ckpt.commit.complete import Request
from ckpt.commit.gc import collect_garbage
from ckpt.commit.retention import forget
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import carry_out, plan_copy
from ckpt.engine.verify import verify, verify_nbytes
from ckpt.errors import CheckpointError, DamagedError, VersionError
from ckpt.format import manifest
from ckpt.kernels import crc32c_ranges
from ckpt.store.posix import PosixStore
from tests.compat import independent_reader as independent
from tests.data.golden.make_golden import held, save_as_ranks

OPTIONS = Options(chunk_bytes=4096)
SMALL = 16 << 10  # bytes: header, adapters and objects of one image
STEPS = (1, 2, 3, 4, 5)


class Model(torch.nn.Module):
    """64 KiB that stay, 1 KiB that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(128, 128, bias=False).requires_grad_(False)
        self.adapter = torch.nn.Linear(16, 16, bias=False)

    def train_a_step(self) -> None:
        with torch.no_grad():
            self.adapter.weight.add_(torch.randn(16, 16))


def state_of(model: Model, step: int) -> dict[str, Any]:
    return {"model": model, "progress": {"step": step}}


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {f"model/{name}": value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


def stored(run: Path, step: int) -> StoredCheckpoint:
    return StoredCheckpoint(PosixStore(run, options=OPTIONS), step, OPTIONS)


def check(run: Path, expected: dict[int, dict[str, bytes]]) -> None:
    """Every complete step is what was saved, for each way of reading it."""
    for step in find.steps(PosixStore(run, options=OPTIONS)):
        assert verify(stored(run, step)).findings == []
        assert {name: t.data.tobytes() for name, t in independent.read(run, step).tensors.items()} == expected[step]
        with ckpt.open(run, step=step) as opened:
            assert {name: opened[name][...].numpy().tobytes() for name in opened} == expected[step]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[int, dict[str, bytes]], list[int]]:
    """Five steps, what they hold, and the bytes that each wrote."""
    model, expected, sizes = Model(), {}, []
    for step in STEPS:
        model.train_a_step()
        expected[step] = bytes_of(model)
        save = ckpt.async_save if step % 2 else ckpt.save
        done: Any = save(
            state_of(model, step), tmp_path / "run", step=step, incremental=True, options=OPTIONS, metrics={"n": step}
        )
        sizes.append((done.wait() if step % 2 else done).nbytes)
    return tmp_path / "run", expected, sizes


def test_a_frozen_base_is_stored_once(saved: Any) -> None:
    run, expected, sizes = saved
    assert sizes[0] > 64 << 10 and max(sizes[1:]) < SMALL
    assert sum(path.stat().st_size for path in run.rglob("*.safetensors")) == sum(sizes)
    check(run, expected)


def test_steps_load_after_those_that_they_refer_to_are_forgotten_and_collected(saved: Any) -> None:
    run, expected, _ = saved
    store = PosixStore(run, options=OPTIONS)
    for old in (1, 3, 2):
        forget(store, [old])
        collect_garbage(store, options=OPTIONS)
        check(run, expected)
    model = Model()
    assert ckpt.load({"model": model}, run, step=4, options=OPTIONS).step == 4
    assert bytes_of(model) == expected[4]
    forget(store, [4, 5])
    collect_garbage(store, options=OPTIONS)
    assert [entry.key for entry in store.list("") if not entry.key.startswith("events/")] == []


def test_a_copy_needs_nothing_of_the_run_that_it_came_from(saved: Any, tmp_path: Path) -> None:
    run, expected, _ = saved
    new = tmp_path / "new"
    assert program(["copy", "--quiet", f"{run}@4", str(new)]) == 0
    source, copied = stored(run, 4), stored(new, 4)
    shutil.rmtree(run)
    assert copied.manifest.references == [] and copied.manifest.metrics == {"n": 4}
    assert copied.manifest.layouts_by_rank == source.manifest.layouts_by_rank
    check(new, expected)
    with ckpt.open(new) as opened:
        assert opened.read_object("progress") == {"step": 4}
    model = Model()
    ckpt.load(state_of(model, 0), new, options=OPTIONS)
    assert bytes_of(model) == expected[4]
    after = ckpt.save(state_of(model, 5), new, step=5, incremental=True, options=OPTIONS)
    assert after.nbytes < SMALL  # digests were copied, too


def test_a_copy_is_made_in_bounded_memory_and_leaves_nothing_when_the_source_is_damaged(
    saved: Any, tmp_path: Path
) -> None:
    run, expected, _ = saved
    into = PosixStore(tmp_path / "new", options=OPTIONS)
    plan = plan_copy(stored(run, 5), options=OPTIONS)
    carry_out(plan, into, options=OPTIONS, memory_bytes=4096)
    check(tmp_path / "new", expected)
    image = Path(run / stored(run, 5).images[-1].key)
    image.write_bytes(image.read_bytes().replace(expected[5]["model/base.weight"][:16], bytes(16)))
    other = PosixStore(tmp_path / "other", options=OPTIONS)
    with pytest.raises(DamagedError, match=r"model/base\.weight"):
        carry_out(plan_copy(stored(run, 5), options=OPTIONS), other, options=OPTIONS, memory_bytes=4096)
    assert other.list("") == []


def test_a_resharded_step_stands_alone(saved: Any, tmp_path: Path) -> None:
    run, expected, _ = saved
    assert program(["reshard", "--quiet", f"{run}@3", str(tmp_path / "two"), "--dp", "2"]) == 0
    shutil.rmtree(run)
    assert stored(tmp_path / "two", 3).manifest.references == []
    check(tmp_path / "two", expected)


@pytest.mark.parametrize("how", ["flip", "missing", "short", "header"])
def test_damage_in_a_file_is_found_in_every_step_that_refers_to_it(saved: Any, how: str) -> None:
    run, expected, _ = saved
    image = run / stored(run, 1).images[0].key
    data = bytearray(image.read_bytes())
    at = 20 if how == "header" else data.index(expected[1]["model/base.weight"][:64])
    data[at] ^= 1
    if how == "missing":
        image.unlink()
    else:
        image.write_bytes(data[: at + 100] if how == "short" else data)
    for step in STEPS:
        findings = verify(stored(run, step)).findings
        assert findings and all(finding.file == stored(run, 1).images[0].key for finding in findings)
        if how == "header":
            continue  # only for people: the index says where everything lies
        with pytest.raises(DamagedError, match="step-000000000001") as caught:
            ckpt.load({"model": Model()}, run, step=step, options=OPTIONS)
        if how == "missing" and step > 1:
            assert f"an image of step 1, which step {step} refers to" in caught.value.message


def test_verify_reads_what_it_says(saved: Any) -> None:
    run, _, _ = saved
    for step in STEPS:
        done: list[int] = []
        verify(stored(run, step), progress=done.append)
        assert sum(done) == verify_nbytes(stored(run, step)) > 64 << 10


def test_tools_tell_of_references(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, sizes = saved
    assert program(["ls", str(run)]) == program(["show", f"{run}@5"]) == 0
    out = capsys.readouterr().out
    assert "+ 64.0 KiB" in out and "64.0 KiB in 1 file of step 1" in out
    assert program(["plan", f"{run}@5", "--dp", "2"]) == program(["diff", f"{run}@1", f"{run}@5"]) == 0
    zarr_store = ckpt.zarr_store(run, step=5)
    import zarr

    array = zarr.open_group(store=zarr_store, mode="r")["model/base.weight"]
    assert np.asarray(array[...]).tobytes() == saved[1][5]["model/base.weight"]


def test_old_programs_refuse_what_they_cannot_read_and_read_the_rest(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = saved
    monkeypatch.setattr(manifest, "KNOWN_FEATURES", frozenset())
    assert stored(run, 1).manifest.step == 1
    with pytest.raises(VersionError, match="needs references"):
        stored(run, 2)
    assert '"references"' not in (run / names.manifest_key(1)).read_text()


def new_saver(run: Path, **options: Any) -> ckpt.Checkpointer:
    """A session of its own, as that of a new process."""
    return ckpt.Checkpointer(run, every=1, incremental=True, options=OPTIONS, **options)


def nbytes_of(saver: ckpt.Checkpointer, model: torch.nn.Module, step: int) -> int:
    pending = saver.step(step, {"model": model})
    assert pending is not None
    return pending.wait().nbytes


def test_a_new_process_goes_on_from_the_newest_step(tmp_path: Path) -> None:
    model, expected = Model(), {}
    for step in STEPS:
        with new_saver(tmp_path, background=step % 2 == 0) as saver:
            saver.restore({"model": model})
            model.train_a_step()
            expected[step] = bytes_of(model)
            assert (nbytes_of(saver, model, step) < SMALL) == (step > 1)
    check(tmp_path, expected)


def test_keep_last_keeps_the_base(tmp_path: Path) -> None:
    model, expected = Model(), {}
    with new_saver(tmp_path, keep_last=2) as saver:
        for step in range(1, 8):
            model.train_a_step()
            expected[step] = bytes_of(model)
            assert (nbytes_of(saver, model, step) < SMALL) == (step > 1)
    assert find.steps(PosixStore(tmp_path, options=OPTIONS)) == [6, 7]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    check(tmp_path, expected)


def test_nothing_new_is_an_image_without_fragments(tmp_path: Path) -> None:
    model = Model()
    with new_saver(tmp_path) as saver:
        sizes = [nbytes_of(saver, model, step) for step in (1, 2, 3)]
    assert sizes[1:] == [4096, 4096]
    check(tmp_path, dict.fromkeys((1, 2, 3), bytes_of(model)))


def equal_checksums() -> tuple[bytes, bytes]:
    """Two texts of 16 bytes with one CRC-32C."""
    found = np.random.default_rng(0).integers(0, 256, (1 << 18, 16), np.uint8)
    starts = np.arange(len(found)) * 16
    crc = crc32c_ranges(found.tobytes(), starts, starts + 16)
    order = np.argsort(crc)
    at = int(np.flatnonzero(crc[order][1:] == crc[order][:-1])[0])
    return found[order[at]].tobytes(), found[order[at + 1]].tobytes()


def changes() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    yield "one bit", torch.tensor([1, 2], dtype=torch.int64), torch.tensor([1, 3], dtype=torch.int64)
    yield "signed zero", torch.tensor([0.0]), torch.tensor([-0.0])
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    yield "payload of a NaN", nan[:1].clone(), nan[1:].clone()
    yield "dtype", torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=torch.int32)
    yield "shape", torch.zeros(2, 3), torch.zeros(3, 2)
    one, other = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in equal_checksums())
    yield "what has the same CRC-32C", one, other


@pytest.mark.parametrize(
    ("what", "before", "after"), list(changes()), ids=lambda value: value if type(value) is str else ""
)
def test_any_change_is_written(tmp_path: Path, what: str, before: torch.Tensor, after: torch.Tensor) -> None:
    with new_saver(tmp_path) as saver:
        for step, value in enumerate((before, after, after), 1):
            pending = saver.step(step, {"x": value.clone()})
            assert pending is not None
            pending.wait()
    for step, value in enumerate((before, after, after), 1):
        with ckpt.open(tmp_path, step=step) as opened:
            assert opened["x"][...].dtype == value.dtype and opened["x"].shape == value.shape
            assert opened["x"][...].numpy().tobytes() == value.numpy().tobytes(), what
    assert [bool(stored(tmp_path, step).manifest.references) for step in (1, 2, 3)] == [False, False, True]


def test_a_value_that_comes_back_is_written_again_and_never_found_further_back(tmp_path: Path) -> None:
    values = [torch.full((4,), float(n)) for n in (1, 2, 1)]
    with new_saver(tmp_path) as saver:
        for step, value in enumerate(values, 1):
            pending = saver.step(step, {"x": value})
            assert pending is not None
            pending.wait()
    check(tmp_path, {step: {"x": value.numpy().tobytes()} for step, value in enumerate(values, 1)})


def test_references_survive_other_block_sizes_and_new_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = Model(), {}
    with new_saver(tmp_path) as saver:
        nbytes_of(saver, model, 1)
        expected[1] = bytes_of(model)
        monkeypatch.setattr(planned_module, "choose_block_bytes", lambda total: 4096)
        model.lora = torch.nn.Linear(16, 2)
        expected[2] = bytes_of(model)
        assert nbytes_of(saver, model, 2) < SMALL
        for step in (3, 4):  # planned anew by then, with the other block size
            expected[step] = bytes_of(model)
            assert nbytes_of(saver, model, step) < SMALL
        assert [stored(tmp_path, step).manifest.block_bytes for step in (1, 4)] == [65536, 4096]
        model.base.requires_grad_(True)
        with torch.no_grad():
            model.base.weight.mul_(2)
        expected[5] = bytes_of(model)
        assert nbytes_of(saver, model, 5) > 64 << 10
    check(tmp_path, expected)


def test_a_save_without_it_stands_alone(tmp_path: Path) -> None:
    model = Model()
    for step, incremental in ((1, True), (2, True), (3, False), (4, True)):
        ckpt.save({"model": model}, tmp_path, step=step, incremental=incremental, options=OPTIONS)
    assert [len(stored(tmp_path, step).manifest.references) for step in (1, 2, 3, 4)] == [0, 1, 0, 1]
    assert stored(tmp_path, 3).fragments(digests=True).digests is None
    assert b"sha256" not in (tmp_path / stored(tmp_path, 3).folder / "fragments.parquet").read_bytes()


def test_a_base_that_was_forgotten_is_not_referred_to(tmp_path: Path) -> None:
    model = Model()
    with new_saver(tmp_path) as saver:
        nbytes_of(saver, model, 1)
        forget(PosixStore(tmp_path, options=OPTIONS), [1])
        assert nbytes_of(saver, model, 2) > 64 << 10
        assert nbytes_of(saver, model, 3) < SMALL


@pytest.mark.parametrize("place", ["references.before-pin", "save.before-image-commit"])
def test_a_save_whose_base_goes_meanwhile_fails_and_the_next_one_is_whole(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    store = PosixStore(tmp_path, options=OPTIONS)
    with new_saver(tmp_path, background=False) as saver:
        nbytes_of(saver, model, 1)

        def interfere(name: str) -> None:
            if name == place and find.steps(store) == [1]:
                forget(store, [1])
                collect_garbage(store, options=OPTIONS)

        monkeypatch.setattr("ckpt.failpoints.hit", interfere)
        with pytest.raises(CheckpointError, match="was removed while it was being saved") as caught:
            nbytes_of(saver, model, 2)
        assert caught.value.kind == "base-removed"
        assert find.steps(store) == []
        assert nbytes_of(saver, model, 3) > 64 << 10
        assert nbytes_of(saver, model, 4) < SMALL
    collect_garbage(store, options=OPTIONS)
    check(tmp_path, dict.fromkeys((3, 4), bytes_of(model)))


def test_a_base_that_cannot_be_read_is_not_referred_to(tmp_path: Path) -> None:
    model = Model()
    with new_saver(tmp_path) as saver:
        nbytes_of(saver, model, 1)
    (tmp_path / stored(tmp_path, 1).folder / "fragments.parquet").write_bytes(b"")
    with new_saver(tmp_path) as saver:
        assert nbytes_of(saver, model, 2) > 64 << 10


def two_ranks(step: int, frozen: torch.Tensor) -> list[dict[str, Any]]:
    """Rows 0 to 3 on one rank, 4 to 7 on the other, and a trained tensor on each."""
    full = slice(None)
    rows = [(slice(0, 4), full)], [(slice(4, 8), full)]
    return [
        {"t": {"frozen": held(frozen, cut), f"own{rank}": held(torch.full((5,), step + rank), [(full,)])}}
        for rank, cut in enumerate(rows)
    ]


@pytest.mark.parametrize("cut_anew", [False, True])
def test_two_ranks_refer_to_each_their_own_images(tmp_path: Path, cut_anew: bool) -> None:
    frozen = torch.arange(8 * 1024, dtype=torch.float32).reshape(8, 1024)
    for step in STEPS:
        states = two_ranks(step, frozen)
        if cut_anew and step == 5:
            full = slice(None)
            states[0]["t"]["frozen"] = held(frozen, [(slice(0, 2), full)])
            states[1]["t"]["frozen"] = held(frozen, [(slice(2, 8), full)])
        save_as_ranks(tmp_path, states, Request(step=step, incremental=True))
        expected = {"t/frozen": frozen, "t/own0": torch.full((5,), step), "t/own1": torch.full((5,), step + 1)}
        check_step = {name: value.numpy().tobytes() for name, value in expected.items()}
        assert {n: t.data.tobytes() for n, t in independent.read(tmp_path, step).tensors.items()} == check_step
        assert verify(stored(tmp_path, step)).findings == []
    num_references = [len(stored(tmp_path, step).manifest.references) for step in STEPS]
    assert num_references == [0, 2, 2, 2, 0 if cut_anew else 2]


def test_fragments_of_replicas_may_lie_with_whoever_wrote_them(tmp_path: Path) -> None:
    """A new process may divide replicas among ranks in another way: the fragments are found, whoever stored them."""
    whole = {f"w{i}": torch.full((4096,), float(i)) for i in range(8)}
    save_as_ranks(tmp_path, [{"t": dict(whole)}, {"t": dict(whole)}], Request(step=1, incremental=True))
    first = stored(tmp_path, 1)
    extra = {"t": {**whole, "a": torch.ones(20000)}}
    save_as_ranks(tmp_path, [extra, {"t": {**whole, "a": torch.ones(20000)}}], Request(step=2, incremental=True))
    second = stored(tmp_path, 2)
    assert verify(second).findings == []
    referred = sum(one.used_bytes for one in second.manifest.references)
    assert referred >= 7 * 4096 * 4  # at most the one that is cut elsewhere now was written again
    assert first.manifest.tensor_bytes == 8 * 4096 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda one: {**one, "file": "../../../etc/passwd"},
        lambda one: {**one, "file": "00000-of-00001.safetensors/../x"},
        lambda one: {**one, "attempt": "../attempt"},
        lambda one: {**one, "attempt": "x"},
        lambda one: {**one, "step": -1},
        lambda one: {**one, "step": 10**12},
        lambda one: {**one, "nbytes": 10},
        lambda one: {**one, "header_bytes": 4},
        lambda one: {**one, "used_bytes": one["nbytes"] + 1},
        lambda one: {key: value for key, value in one.items() if key != "file"},
        lambda one: "text",
    ],
)
def test_a_hostile_reference_is_refused(saved: Any, change: Callable[[Any], Any]) -> None:
    run, _, _ = saved
    rewrite(run / names.manifest_key(5), lambda found: {**found, "references": [change(found["references"][0])]})
    with pytest.raises(DamagedError):
        stored(run, 5).fragments()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {**found, "requires": []},
        lambda found: {key: value for key, value in found.items() if key != "references"},
        lambda found: {**found, "references": found["references"] * 2},
        lambda found: {**found, "references": {}},
        lambda found: {**found, "references": []},
        lambda found: {
            **found,
            "references": [{**found["references"][0], "step": found["step"], "attempt": found["attempt"]}],
        },
    ],
)
def test_references_that_contradict_the_rest_are_refused(saved: Any, change: Callable[[Any], Any]) -> None:
    run, _, _ = saved
    rewrite(run / names.manifest_key(5), change)
    with pytest.raises(DamagedError):
        stored(run, 5).fragments()


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a manifest and make its digest right again."""
    import json

    document = json.loads(path.read_bytes())
    document.pop("digest")
    document = change(document)
    document["digest"] = manifest.sha256(manifest.canonical(document))
    path.write_bytes(manifest.canonical(document))
