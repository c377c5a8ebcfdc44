"""Goal: plain `zarr` reads any checkpoint. Method: open the view with nothing but zarr, compare values, count bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import ckpt
from ckpt.config import Options
from ckpt.convert.zarr import CheckpointZarr, array_paths, chunk_shape
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import DamagedError, NotFoundError
from ckpt.format.spec import TensorSpec
from ckpt.store.posix import PosixStore
from tests.format.format_samples import all_dtypes, raw, tensor

# torch warns that its complex32 is young; its bits are stored all the same.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def opened(folder: Path, **options: Any) -> zarr.Group:
    return zarr.open_group(store=ckpt.zarr_store(folder, **options), mode="r")


def test_zarr_shows_every_dtype_bit_by_bit(tmp_path: Path) -> None:
    values = all_dtypes()
    ckpt.save({"t": values}, tmp_path, step=3)
    group = opened(tmp_path)
    for name, value in values.items():
        array = group[f"t/{name}"]
        assert array.shape == tuple(value.shape)
        assert array.attrs["ckpt_dtype"] == name.split(".")[0]
        assert np.asarray(array[...]).tobytes() == raw(value), name


def test_numbers_look_like_numbers(tmp_path: Path) -> None:
    ckpt.save({"t": {"f": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}}, tmp_path, step=1)
    group = opened(tmp_path)
    np.testing.assert_array_equal(group["t/f"][1:5], np.arange(1, 5, dtype=np.float32))
    assert group["t/b"].dtype == np.uint16 and group["t/b"][0] == 0x3F80


def test_attributes_tell_role_aliases_and_the_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    ckpt.save({"model": model}, tmp_path, step=7, metrics={"loss": 2.5}, metadata={"note": ["x"]})
    group = opened(tmp_path, step=7)
    root = dict(group.attrs)
    assert (root["step"], root["metrics"], root["metadata"]) == (7, {"loss": 2.5}, {"note": ["x"]})
    attributes = dict(group["model/a.weight"].attrs)
    assert attributes == {
        "ckpt_name": "model/a.weight",
        "ckpt_dtype": "float32",
        "role": "param",
        "aliases": ["model/b.weight"],
    }


def test_groups_nest_by_slashes_and_can_be_listed(tmp_path: Path) -> None:
    ckpt.save({"m": {"x.y": torch.zeros(2), "deep": {"z": torch.zeros(1)}}, "k": torch.ones(3)}, tmp_path, step=1)
    group = opened(tmp_path)
    paths = sorted(path for path, _ in group.members(max_depth=None))
    arrays = sorted(path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array))
    expected = sorted(ckpt.open(tmp_path))
    assert arrays == expected
    assert set(paths) - set(arrays) == {path[:i] for path in expected for i, c in enumerate(path) if c == "/"}
    assert [name for name, _ in group.arrays()] == ["k"]


def test_a_slice_reads_about_its_own_bytes(tmp_path: Path) -> None:
    value = tensor("float32", (4096, 1024))  # 16 MiB
    ckpt.save({"x": value}, tmp_path, step=1)
    store, read = PosixStore(tmp_path, options=Options()), []
    store.local_files = False  # every read passes through `read_into`
    inner = store.read_into
    store.read_into = lambda key, start, buffer: (read.append(len(buffer)), inner(key, start, buffer))[1]  # type: ignore[method-assign]
    group = zarr.open_group(store=CheckpointZarr(StoredCheckpoint(store, 1, Options())), mode="r")
    array = group["x"]
    assert array.chunks == (256, 1024)
    assert read == []
    np.testing.assert_array_equal(array[512:1024, :].view(np.uint8), value[512:1024].numpy().view(np.uint8))
    assert sum(read) == 512 * 1024 * 4
    read.clear()
    assert array[100, 5].tobytes() == value[100, 5].numpy().tobytes()
    assert sum(read) == 256 * 1024 * 4  # one chunk


def test_small_chunks_make_small_reads(tmp_path: Path) -> None:
    value = tensor("bfloat16", (100, 300_000))
    ckpt.save({"x": value}, tmp_path, step=1)
    array = opened(tmp_path, chunk_bytes=100_000)["x"]
    assert array.chunks == (1, 50_000)
    assert np.asarray(array[99, 299_990:]).tobytes() == raw(value[99, 299_990:])


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (7,), (3, 5, 2), (1, 1, 1, 9)])
@pytest.mark.parametrize("chunk_bytes", [1, 24, 1 << 20])
def test_chunks_of_any_size_give_the_same_array(tmp_path: Path, shape: tuple[int, ...], chunk_bytes: int) -> None:
    value = tensor("int32", shape)
    ckpt.save({"x": value}, tmp_path, step=1)
    assert np.asarray(opened(tmp_path, chunk_bytes=chunk_bytes)["x"][...]).tobytes() == raw(value)


def test_writing_is_refused(tmp_path: Path) -> None:
    ckpt.save({"x": torch.zeros(4)}, tmp_path, step=1)
    store = ckpt.zarr_store(tmp_path)
    group = zarr.open_group(store=store, mode="r")
    with pytest.raises(ValueError, match="read-only"):
        group["x"][0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        group.create_group("new")
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(store=store, mode="w")
    assert raw(ckpt.open(tmp_path)["x"][...]) == bytes(16)


def test_damage_reaches_the_reader_as_an_error(tmp_path: Path) -> None:
    ckpt.save({"x": torch.ones(4)}, tmp_path, step=1)
    image = next(tmp_path.glob("*/*/*.safetensors"))
    data = bytearray(image.read_bytes())
    data[4096] ^= 1
    image.write_bytes(data)
    with pytest.raises(DamagedError, match="`x` is damaged"):
        opened(tmp_path)["x"][...]
    with pytest.raises(NotFoundError):
        ckpt.zarr_store(tmp_path, step=2)


def test_awkward_names_get_paths_of_their_own() -> None:
    names = [
        "a",
        "a/b",
        "..",
        ".",
        "x//y",
        "__k",
        "zarr.json",
        "p%q",
        "back\\slash",
        "a/%self",
        "c",
        "c/c",
        "/lead",
        "%empty",
    ]
    paths = array_paths(names)
    assert len(set(paths)) == len(names)
    assert paths[:3] == ["a/%self", "a/b", "%2E%2E"]
    assert not any(other != path and other.startswith(path + "/") for path in paths for other in paths)


def test_awkward_names_are_read_by_zarr(tmp_path: Path) -> None:
    names = ["a", "a/b", "..", "x//y", "__k", "zarr.json", "p%q", "back\\slash", "c", "c/c"]
    ckpt.save({"t": {name: torch.full((2,), float(i)) for i, name in enumerate(names)}}, tmp_path, step=1)
    arrays = [node for _, node in opened(tmp_path).members(max_depth=None) if isinstance(node, zarr.Array)]
    found = {str(array.attrs["ckpt_name"]): float(array[0]) for array in arrays}
    assert found == {f"t/{name}": float(i) for i, name in enumerate(names)}


def test_a_chunk_never_exceeds_its_size_unless_one_element_does() -> None:
    spec = TensorSpec(name="x", role="tensor", dtype="float32", shape=(3, 1000, 7))
    assert chunk_shape(spec, 28 * 10) == (1, 10, 7)
    assert chunk_shape(spec, 8) == (1, 1, 2)
    assert chunk_shape(spec, 1) == (1, 1, 1)
