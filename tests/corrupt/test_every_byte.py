"""Goal: no change of any byte of any file gives wrong data, a crash or a hang.

Method: flip each byte of a tiny checkpoint, cut each file at every third length; read everything; the answer is what was
saved or a refusal. Every second flip is of one bit, the others of all eight.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt.errors import DamagedError, NotFoundError, VersionError
from tests.corrupt.damaged_copies import Files, OpenedOnce, everything, outcome, parts_of, saved

REFERENCES = Path(__file__).resolve().parents[1] / "data" / "golden" / "v1" / "references"
STATE = {
    "model": {"w": torch.arange(12, dtype=torch.int16).reshape(3, 4), "s": torch.tensor(2.5), "e": torch.empty(0, 2)},
    "extra": {"lr": 0.5, "name": "x"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return saved(tmp_path_factory.mktemp("tiny"), STATE)


def mask(at: int) -> int:
    return 0xFF if at % 2 else 1 << at // 2 % 8


def changed(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


INDEX = ["manifest.json", "tensors.parquet", "fragments.parquet", "objects.parquet"]


@pytest.mark.parametrize("suffix", INDEX)
def test_a_flip_of_any_byte_of_manifest_or_index_is_refused(files: Files, suffix: str) -> None:
    everything(files)
    key = next(key for key in files if key.endswith(suffix))
    for at in range(len(files[key])):
        found = outcome({**files, key: changed(files[key], at, mask(at))})
        assert found in (DamagedError, VersionError), (key, at, found)


def test_a_flip_of_any_byte_of_an_image_gives_equal_data_or_a_refusal(files: Files) -> None:
    opened = OpenedOnce(files)
    expected = everything(files)
    key = next(key for key in files if key.endswith(".safetensors"))
    data = files[key]
    header = 8 + int.from_bytes(data[:8], "little")  # names for people; a load does not need it, `verify` checks it
    for at in [*range(1024), *range(1024, header, 16), *range(header, len(data))]:
        found = opened.outcome(key, changed(data, at, mask(at)))
        assert found == expected if at < header else found is DamagedError, (at, found)


def test_a_flip_in_a_checkpoint_with_references_is_refused_too() -> None:
    """Of its own files and of the images of other steps: header flips are for `verify`, as ever."""
    files = {
        str(p.relative_to(REFERENCES)): p.read_bytes() for p in sorted(REFERENCES.rglob("step-*/**/*")) if p.is_file()
    }
    expected = everything(files, step=3)
    own = [key for key in files if key.startswith("step-000000000003/") and not key.endswith(".safetensors")]
    for key in own:
        for at in range(0, len(files[key]), 13):
            found = outcome({**files, key: changed(files[key], at, mask(at))}, step=3)
            assert found in (DamagedError, VersionError), (key, at, found)
    opened, damaged = OpenedOnce(files, step=3), set()
    for key in (key for key in files if key.endswith(".safetensors")):
        for at in range(4096, len(files[key]), 9):
            found = opened.outcome(key, changed(files[key], at, mask(at)))
            assert found is DamagedError or found == expected
            damaged |= {key[:17]} if found is DamagedError else set()
    assert damaged == {f"step-{step:012d}" for step in (1, 2, 3)}


@pytest.mark.parametrize("suffix", [*INDEX, ".safetensors"])
def test_a_file_cut_at_any_length_is_refused(files: Files, suffix: str) -> None:
    key = next(key for key in files if key.endswith(suffix))
    end = len(files[key])
    for length in {*range(0, end, 97 if suffix == ".safetensors" else 3), *range(end - 16, end)}:
        assert outcome({**files, key: files[key][:length]}) is DamagedError, (key, length)


@pytest.mark.parametrize("suffix", INDEX)
def test_a_file_with_more_at_its_end_is_refused(files: Files, suffix: str) -> None:
    key = next(key for key in files if key.endswith(suffix))
    for more in (b"\x00", b" ", b"\n", b"}", files[key]):
        assert outcome({**files, key: files[key] + more}) is DamagedError


def test_a_missing_file_is_damage_and_a_missing_manifest_is_no_checkpoint(files: Files) -> None:
    for key in files:
        without = {other: data for other, data in files.items() if other != key}
        assert outcome(without) is (NotFoundError if key.endswith("manifest.json") else DamagedError), key


def test_files_swapped_within_a_checkpoint_or_with_another_are_refused(files: Files, tmp_path: Path) -> None:
    other = saved(tmp_path, {**STATE, "model": {**STATE["model"], "w": STATE["model"]["w"] + 1}}, step=1)
    (key, folder), (other_key, other_folder) = parts_of(files), parts_of(other)
    expected = everything(files)
    names = [name.rpartition("/")[2] for name in files if name != key]
    for name in names:
        found = outcome({**files, f"{folder}/{name}": other[f"{other_folder}/{name}"]})
        # Two saves of the same structure may have equal index files; then nothing was changed.
        assert (
            found == expected if other[f"{other_folder}/{name}"] == files[f"{folder}/{name}"] else found is DamagedError
        )
        for wrong in names:
            if wrong != name:
                assert outcome({**files, f"{folder}/{name}": files[f"{folder}/{wrong}"]}) is DamagedError
    assert outcome({**files, key: other[other_key]}) is DamagedError  # names an attempt that is not there


def test_a_manifest_under_another_step_is_refused(files: Files) -> None:
    moved = {key.replace("step-000000000001", "step-000000000002"): data for key, data in files.items()}
    assert outcome(moved, step=2) is DamagedError


def test_folders_that_are_no_runs_are_no_checkpoints(files: Files) -> None:
    for foreign in ({}, {"readme.txt": b"hi"}, {"step-1/manifest.json": b"{}"}, {"step-000000000001/x": b""}):
        assert outcome(foreign) is NotFoundError
    for text in (b"", b"{}", b"[]", b"null", b'{"format": "other"}', b"\xff\xfe", b"PAR1", b"[" * 100_000):
        assert outcome({"step-000000000001/manifest.json": text}) is DamagedError
