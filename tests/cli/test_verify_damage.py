"""`verify` finds every damaged byte. Method: flip bytes of every file of a tiny checkpoint, cut and remove files, one at a time.

In process, on `ckpt.engine.verify`, except where the program's own answer is the promise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.verify import verify, verify_nbytes
from ckpt.errors import CheckpointError, DamagedError, VersionError
from ckpt.kernels import crc32c
from ckpt.store.posix import PosixStore
from tests.cli.conftest import Program, rewrite_manifest

BIG_FILE_BYTES = 4096  # of larger files every 7th byte is flipped
OPTIONS = Options(read_threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("tiny") / "run"
    ckpt.save({"model": {"a": torch.arange(30.0), "b": torch.ones(3, 5, dtype=torch.int8)}, "n": 7}, url, step=1)
    return url


def findings(url: Path) -> list[str]:
    """What is wrong with step 1; an error at opening counts as one."""
    try:
        return [
            finding.message
            for finding in verify(StoredCheckpoint(PosixStore(url, options=OPTIONS), 1, OPTIONS)).findings
        ]
    except (DamagedError, VersionError) as error:
        return [error.message]


def files_of(url: Path) -> list[Path]:
    return sorted(path for path in url.rglob("step-*/**/*") if path.is_file())


def test_an_undamaged_checkpoint_has_no_findings_and_progress_adds_up(tiny: Path) -> None:
    stored = StoredCheckpoint(PosixStore(tiny, options=OPTIONS), 1, OPTIONS)
    done: list[int] = []
    result = verify(stored, progress=done.append)
    assert result.findings == [] and result.num_files == len(files_of(tiny)) == 5
    assert sum(done) == verify_nbytes(stored) == result.nbytes


FILES = ["manifest.json", "tensors.parquet", "fragments.parquet", "objects.parquet", "safetensors"]


@pytest.mark.parametrize("suffix", FILES)
def test_a_flip_of_any_byte_of_any_file_is_found(tiny: Path, suffix: str) -> None:
    assert len(FILES) == len(files_of(tiny))
    path = next(path for path in files_of(tiny) if path.name.endswith(suffix))
    good = path.read_bytes()
    missed = []
    with path.open("r+b", buffering=0) as file:
        for at in range(0, len(good), 7 if len(good) > BIG_FILE_BYTES else 1):
            file.seek(at)
            file.write(bytes([good[at] ^ (1 << at % 8)]))
            if not findings(tiny):
                missed.append(at)
            file.seek(at)
            file.write(good[at : at + 1])
    assert not missed and not findings(tiny)


@pytest.mark.parametrize("suffix", ["safetensors", "tensors.parquet", "fragments.parquet", "objects.parquet"])
def test_a_file_that_is_missing_cut_or_longer_is_found(tiny: Path, tmp_path: Path, suffix: str) -> None:
    url = Path(shutil.copytree(tiny, tmp_path / "run"))
    path = next(path for path in files_of(url) if path.name.endswith(suffix))
    good = path.read_bytes()
    for size in [*range(0, len(good), max(1, len(good) // 40)), len(good) - 1]:
        path.write_bytes(good[:size])
        assert findings(url), size
    path.write_bytes(good + b"\0")
    assert findings(url)
    path.unlink()
    assert any("missing" in text for text in findings(url))
    path.mkdir()
    assert findings(url)


def test_the_program_lists_every_damaged_place_and_goes_on(program: Program, gpt: Path) -> None:
    image = next((gpt / "step-000000000020").glob("*/*.safetensors"))
    with ckpt.open(gpt, step=20) as checkpoint:
        table = checkpoint._stored.fragments()
        names = [spec.name for spec in checkpoint._stored.specs]
        places = [
            (names[int(t)], int(start))
            for t, start in zip(table.boxes.tensor, table.offsets, strict=True)
            if names[int(t)] in ("model/embedding.weight", "model/layers.1.norm.bias")
        ]
        row = next(row for row in checkpoint._stored.objects if row.name == "progress")
    data = bytearray(image.read_bytes())
    for at in (5, *(start for _, start in places), row.byte_offset):
        data[at] ^= 0x40
    image.write_bytes(bytes(data))
    outcome = program("verify", gpt, "--json")
    checkpoints = {c["step"]: c for c in outcome.document["checkpoints"]}
    assert outcome.code == 13 and [checkpoints[step]["ok"] for step in (10, 20, 30)] == [True, False, True]
    found = checkpoints[20]["findings"]
    assert {(f["tensor"], f["start"]) for f in found if f["tensor"]} == set(places)
    assert [f["object"] for f in found if f["object"]] == ["progress"] and found[0]["start"] == 0
    text = program("verify", gpt)
    assert text.code == 13 and "model/embedding.weight" in text.out
    assert text.err.startswith("error: 4 damaged places in 1 checkpoint: 20") and "step=30" in text.err
    assert program("verify", f"{gpt}@latest").code == 0


def test_a_lost_image_names_every_tensor_that_is_gone(program: Program, gpt: Path) -> None:
    next((gpt / "step-000000000030").glob("*/*.safetensors")).unlink()
    outcome = program("verify", f"{gpt}@30", "--json")
    with ckpt.open(gpt, step=30) as checkpoint:
        names = set(checkpoint)
    found = outcome.document["checkpoints"][0]["findings"]
    assert outcome.code == 13 and {f["tensor"] for f in found if f["tensor"]} == names
    assert {f["object"] for f in found if f["object"]} == {"optimizer", "progress", "rng"}


def test_an_image_of_another_checkpoint_with_sound_checksums_is_found(tiny: Path, tmp_path: Path) -> None:
    """Header and index must say the same: a manifest made to accept a foreign header is not enough."""
    url = Path(shutil.copytree(tiny, tmp_path / "run"))
    image = next(url.rglob("*.safetensors"))
    data = image.read_bytes()
    image.write_bytes(data.replace(b'"model/a"', b'"model/x"'))
    path = next(url.rglob("manifest.json"))
    writers = json.loads(path.read_bytes())["writers"]
    writers[0]["header_crc32c"] = crc32c(image.read_bytes()[: writers[0]["header_bytes"]])
    rewrite_manifest(path, writers=writers)
    assert any("disagree on `model/a`" in text for text in findings(url))


def test_damage_stops_a_reshard_and_leaves_nothing(program: Program, gpt: Path, tmp_path: Path) -> None:
    image = next((gpt / "step-000000000030").glob("*/*.safetensors"))
    data = bytearray(image.read_bytes())
    data[-200] ^= 1  # in an object, behind the tensors: found late
    image.write_bytes(bytes(data))
    outcome = program("reshard", gpt, tmp_path / "new", "--dp", 2)
    assert outcome.code == 13 and "ckpt verify" not in outcome.out
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


def test_errors_of_verify_are_of_ckpt_alone(tiny: Path, tmp_path: Path) -> None:
    """Garbage instead of each file: findings or an error of ours, never anything else."""
    url = Path(shutil.copytree(tiny, tmp_path / "run"))
    for path in files_of(url):
        good = path.read_bytes()
        for junk in (b"", b"{}", b"\xff" * len(good), b"[" * 100_000, good[::-1]):
            path.write_bytes(junk)
            try:
                assert findings(url)
            except CheckpointError:
                pass
        path.write_bytes(good)
    assert not findings(url)
