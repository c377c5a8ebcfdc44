"""Folders of plain safetensors files are sources and bases, and a result goes out as one.

Method: folders written by the `safetensors` package, read back by it; sharded ones with the index of Hugging Face's tools; a
local S3 server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt
from ckpt import config
from ckpt.config import Options
from ckpt.convert.export import choose, export_safetensors
from ckpt.convert.safetensors import SafetensorsFolder
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import AlreadyExistsError, DamagedError, InvalidInputError, NotFoundError
from ckpt.store.open import open_store
from tests.merge.samples import cast, doubles, images, merged, random_arrays, same, save, tensors_of
from tests.servers import S3Server


def write_folder(
    folder: Path, seed: int, *, files: int = 1, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """A model folder as Hugging Face's tools write it."""
    folder.mkdir(parents=True)
    tensors = tensors_of(random_arrays(seed), dtype)
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(files):
            name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = {n: tensors[n] for n in names[number::files]}
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    return tensors


def mean(*sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        n: cast(sum(doubles(s, n) for s in sources) / len(sources), t.dtype)  # type: ignore[arg-type]
        for n, t in sources[0].items()
    }


def test_folders_of_one_and_of_several_files_are_merged(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", 1, dtype=torch.bfloat16)
    two = write_folder(tmp_path / "two", 2, files=3, dtype=torch.bfloat16)
    found, done = merged([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    same(found, mean(one, two))
    assert done.step == 0


def test_one_file_is_a_source(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", 1)
    found, _ = merged([tmp_path / "one" / "model.safetensors"], tmp_path / "out")
    same(found, one)


def test_folders_and_checkpoints_mix_and_a_folder_is_a_base(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", 1)
    saved = save(tmp_path / "run", 7, random_arrays(2))
    found, done = merged([tmp_path / "one", f"{tmp_path}/run@7"], tmp_path / "out")
    same(found, mean(one, saved))
    assert done.step == 7
    found, _ = merged(f"{tmp_path}/run@7", tmp_path / "based", "interpolate", base=tmp_path / "one", alpha=1.0)
    same(found, saved)


def test_names_of_a_folder_are_mapped(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", 1)
    save(tmp_path / "run", 7, {f"inner.{n}": a for n, a in random_arrays(1).items()})
    entry = {"folder": str(tmp_path / "one"), "rename": [{"match": "model/(.*)", "to": "model/inner.\\1"}]}
    found, _ = merged([entry, f"{tmp_path}/run@7"], tmp_path / "out")
    same(found, {f"inner.{name}": tensor for name, tensor in one.items()})


def test_the_order_of_folders_changes_no_bit_and_that_of_files_neither(tmp_path: Path) -> None:
    for number in range(3):
        write_folder(tmp_path / f"a{number}", number)
    made = []
    for number, names in enumerate((("a0", "a1", "a2"), ("a2", "a0", "a1"))):
        merged(
            [tmp_path / name for name in names],
            tmp_path / f"out{number}",
            weights=[1, 2, 3] if number == 0 else [3, 1, 2],
        )
        made.append(images(tmp_path / f"out{number}"))
    assert made[0] == made[1]


def test_damaged_folders_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 1)
    file = tmp_path / "one" / "model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-5], whole[:4], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        file.write_bytes(data)
        with pytest.raises(DamagedError):
            ckpt.merge(tmp_path / "one", tmp_path / "out")
    file.unlink()
    with pytest.raises(NotFoundError):
        ckpt.merge(tmp_path / "one", tmp_path / "out")


def test_a_tensor_in_two_files_is_ambiguous(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 1)
    save_file({"scalar": torch.zeros(())}, tmp_path / "one" / "other.safetensors")
    with pytest.raises(InvalidInputError, match="two files") as caught:
        ckpt.merge(tmp_path / "one", tmp_path / "out")
    assert caught.value.kind == "ambiguous-folder"


def test_an_index_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 1, files=2)
    index = tmp_path / "one" / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}', "[]", "{"):
        index.write_text(text)
        with pytest.raises(DamagedError):
            ckpt.merge(tmp_path / "one", tmp_path / "out")


def test_every_dtype_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "kinds"
    folder.mkdir()
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {str(kind).partition(".")[2]: torch.ones(5, 3).to(kind) for kind in kinds}
    save_file(tensors, folder / "model.safetensors")
    found, _ = merged(folder, tmp_path / "out")
    same(found, tensors)


def test_reads_of_a_folder_take_no_more_than_wanted(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 1)
    folder = SafetensorsFolder(open_store(tmp_path / "one", options=Options()), Options())
    assert {spec.name for spec in folder.specs} == {f"model/{name}" for name in random_arrays(0)}
    assert len(folder.fragments(np.array([0]))) <= 1


# export


def exported(run: Path, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    options = Options()
    stored = StoredCheckpoint(open_store(run, options=options), "latest", options)
    choice = {key: more.pop(key) for key in ("key", "dtype", "rename") if key in more}
    export_safetensors(stored, str(folder), choose(stored, **choice), options=options, **more)
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def test_an_export_is_what_was_saved(tmp_path: Path) -> None:
    saved = save(tmp_path / "run", 3, random_arrays(4), dtype=torch.bfloat16)
    same(exported(tmp_path / "run", tmp_path / "hf"), saved)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_an_export_casts_renames_splits_and_copies_the_config(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 1)
    saved = save(tmp_path / "run", 3, {**random_arrays(4), "count": np.arange(3)})
    found = exported(
        tmp_path / "run",
        tmp_path / "hf",
        dtype="bfloat16",
        rename=[(r"layers\.(\d+)\.(.*)", r"h.\1.\2")],
        file_bytes=700,
        config_from=str(tmp_path / "one"),
    )
    same(found, {n.replace("layers.", "h."): t.bfloat16() if t.is_floating_point() else t for n, t in saved.items()})
    files = sorted(os.listdir(tmp_path / "hf"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert set(files) - set(index["weight_map"].values()) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }
    again, _ = merged(tmp_path / "hf", tmp_path / "again")
    same(again, found)


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    save(tmp_path / "run", 3, random_arrays(4))
    file = next((tmp_path / "run").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError):
        exported(tmp_path / "run", tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["run"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        exported(tmp_path / "run", tmp_path / "full")


def test_an_export_needs_a_model(tmp_path: Path) -> None:
    save(tmp_path / "run", 3, random_arrays(4))
    with pytest.raises(InvalidInputError, match="no model under the state key `net`") as caught:
        exported(tmp_path / "run", tmp_path / "hf", key="net")
    assert "state keys there: model" in caught.value.hints[0]


# object stores


@pytest.fixture
def bucket(moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    yield moto_s3.url(tmp_path.name)


@pytest.mark.s3
def test_sources_and_results_lie_on_object_stores(bucket: str, tmp_path: Path) -> None:
    local = save(tmp_path / "run", 10, random_arrays(1))
    remote = save(f"{bucket}/run", 20, random_arrays(2))  # type: ignore[arg-type]
    ckpt.merge([f"{tmp_path}/run@10", f"{bucket}/run@20"], f"{bucket}/merged")
    with ckpt.open(f"{bucket}/merged") as checkpoint:
        found = {name.removeprefix("model/"): checkpoint[name][...] for name in checkpoint}
    same(found, mean(local, remote))
    here, _ = merged([f"{tmp_path}/run@10", f"{bucket}/run@20"], tmp_path / "here")
    same(here, found)


@pytest.mark.s3
def test_folders_on_object_stores_are_read_and_written(bucket: str, tmp_path: Path) -> None:
    tensors = write_folder(tmp_path / "one", 1, files=2)
    options = config.from_environment()
    store = open_store(f"{bucket}/hf", options=options)
    for file in (tmp_path / "one").iterdir():
        store.put(file.name, file.read_bytes())
    found, _ = merged(f"{bucket}/hf", tmp_path / "out")
    same(found, tensors)
    stored = StoredCheckpoint(open_store(tmp_path / "out", options=options), "latest", options)
    export_safetensors(stored, f"{bucket}/export", choose(stored), options=options)
    again, _ = merged(f"{bucket}/export", tmp_path / "again")
    same(again, tensors)
    store.close()
