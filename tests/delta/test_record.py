"""The page about deltas is enough to read one. Method: a reader written from docs/reference/delta.md, without ckpt.delta; each
tensor fits into one chunk."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import ckpt
from ckpt.config import Options
from ckpt.delta import api
from ckpt.engine.reader import StoredCheckpoint
from ckpt.format.objects import decode
from ckpt.store.open import open_store
from tests.merge.samples import random_arrays, save

SHAPES = {"a": (40, 30), "b": (7,), "c": ()}


def planes(data: bytes, base: NDArray[np.uint32] | None, num: int) -> NDArray[np.uint32]:
    words, at = np.zeros(num, np.uint32), 0
    for plane in range(4):
        how, length = struct.unpack_from("<BI", data, at)
        body = data[at + 5 : at + 5 + length]
        at += 5 + length
        plain = pa.decompress(body, decompressed_size=num, codec="zstd", asbytes=True) if how else body
        words |= np.frombuffer(plain, np.uint8).astype(np.uint32) << np.uint32(8 * plane)
    if base is None:
        return words
    signed = [(int(w) >> 1) ^ -(int(w) & 1) for w in words]
    return np.array([(int(x) + d) % 2**32 for x, d in zip(base, signed, strict=True)], np.uint32)


def bits(data: bytes) -> list[int]:
    return [(byte >> i) & 1 for byte in data for i in range(8)]


def ternary(data: bytes, num: int) -> list[int]:
    how, k, count, length = struct.unpack_from("<BBII", data)
    body, signs = data[10 : 10 + length], bits(data[10 + length :])[:count]
    if how == 0:
        places = [i for i, bit in enumerate(bits(body)[:num]) if bit]
    else:
        tail = -(-count * k // 8)
        unary, rest = bits(body[: length - tail]), bits(body[length - tail :])
        places, at, run, seen = [], -1, 0, 0
        for bit in unary:
            if not bit:
                run += 1
            elif seen < count:
                remainder = sum(rest[seen * k + i] << i for i in range(k))
                at += (run << k) + remainder + 1
                places.append(at)
                run, seen = 0, seen + 1
    out = [0] * num
    for place, sign in zip(places, signs, strict=True):
        out[place] = 1 if sign else -1
    return out


def read(delta: Path, base: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    stored = StoredCheckpoint(open_store(delta, options=Options()), "latest", Options())
    row = next(row for row in stored.objects if row.name == "delta")
    tree: Any = decode(stored.read_object(row), name="delta")
    out = {}
    with ckpt.open(delta) as checkpoint:
        for one in tree["tasks"][0]["tensors"]:
            data, num = checkpoint[one["payload"]][...].numpy().tobytes(), int(np.prod(one["shape"]))
            flat = base[one["base"].removeprefix("model/")].reshape(-1)
            wide = flat.astype(np.float64)
            if one["coding"] == "planes":
                found = planes(data, flat.view(np.uint32), num).view(np.float32)
            elif one["coding"] == "ternary":
                found = (wide + one["scale"] * np.array(ternary(data, num))).astype(np.float32)
            else:
                shared = tree["shared"][one["name"]]
                total = planes(checkpoint[shared["payload"]][...].numpy().tobytes(), None, num).view(np.float32)
                found = np.where(bits(data)[:num], wide + total, wide).astype(np.float32)
            assert hashlib.sha256(found.tobytes()).hexdigest() == one["sha256"]
            out[one["name"]] = found.reshape(one["shape"])
    return out


@pytest.mark.parametrize(
    ("method", "more"), [("exact", {}), ("compeft", {"density": 0.05}), ("compeft", {"density": 0.7}), ("tall", {})]
)
def test_a_reader_of_the_page_reads_what_is_stored(tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    base = random_arrays(0, SHAPES)
    save(tmp_path / "base", 1, base)
    for step in (2, 3):
        changed = random_arrays(step, SHAPES, 0.01)
        save(tmp_path / "tuned", step, {name: array + changed[name] for name, array in base.items()})
    sources = [f"{tmp_path}/tuned@{step}" for step in ((2, 3) if method == "tall" else (2,))]
    api.make(sources, tmp_path / "delta", base=tmp_path / "base", method=method, **more)
    found = read(tmp_path / "delta", base)
    api.apply(tmp_path / "delta", tmp_path / "back", base=tmp_path / "base", task=1)
    with ckpt.open(tmp_path / "back") as checkpoint:
        for name, array in found.items():
            assert checkpoint[name][...].numpy().tobytes() == array.tobytes()
