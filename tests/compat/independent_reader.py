"""A reader of the format, version 1, written from docs/reference/format.md and objects.md alone.

Goal: prove that the two pages are enough. Method: it imports nothing of ckpt; only pyarrow, json, numpy and safetensors. It reads
whole checkpoints from local folders, checks every digest, checksum and header entry, and is in no hurry.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

# name: (bytes of an element, dtype in an image's header; None: bytes with one more dim)
DTYPES: dict[str, tuple[int, str | None]] = {
    **{f"{kind}int{8 * n}": (n, f"{'U' if kind else 'I'}{8 * n}") for kind in ("u", "") for n in (1, 2, 4, 8)},
    "bool": (1, "BOOL"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "float32": (4, "F32"),
    "float64": (8, "F64"),
    "complex64": (8, "C64"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    "float8_e4m3fnuz": (1, None),
    "float8_e5m2fnuz": (1, None),
    "float8_e8m0fnu": (1, None),
    "complex32": (4, None),
    "complex128": (16, None),
}


class NotACheckpointError(Exception):
    """Something is not as the page says."""


class NewerFormatError(Exception):
    """Written in a version that this reader does not know."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise NotACheckpointError(what)


@dataclass
class Tensor:
    """One whole tensor."""

    dtype: str
    role: str
    aliases: list[str]
    data: np.ndarray[Any, Any]  # uint8, of the tensor's shape and one more dim: the bytes of an element


@dataclass
class TensorRef:
    """Stands in an object for a tensor."""

    name: str


@dataclass
class Checkpoint:
    """Everything in one checkpoint."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    objects: dict[tuple[str, int], Any]


# ------------------------------------------------------------------------------------------------------------- checksums

_TABLE = []
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = _value >> 1 ^ (0x82F63B78 if _value & 1 else 0)
    _TABLE.append(_value)


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def blocks(data: bytes, size: int) -> list[int]:
    return [crc32c(data[start : start + size]) for start in range(0, len(data), size)]


# -------------------------------------------------------------------------------------------------------------- manifest


def steps(run: Path) -> list[int]:
    """Complete steps."""
    found = [re.fullmatch(r"step-(\d{12})", path.name) for path in run.iterdir()]
    return sorted(int(match[1]) for match in found if match and (run / match[0] / "manifest.json").is_file())


def read_manifest(data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(pairs)) == len(pairs), "a key stands twice in the manifest")
        return dict(pairs)

    manifest = json.loads(data.decode("ascii"), object_pairs_hook=once)
    check(manifest["format"] == "ckpt", "another format")
    if manifest["version"] > 1 or not set(manifest["requires"]) <= {"references"}:
        raise NewerFormatError(f"version {manifest['version']}, requires {manifest['requires']}")
    ending = b',\n "digest": "%s"\n}\n' % manifest["digest"].encode()
    check(data.endswith(ending), "the digest is not at the end of the manifest")
    check(sha256(data.removesuffix(ending) + b"\n}\n") == manifest["digest"], "the digest of the manifest is wrong")
    check(("references" in manifest) == ("references" in manifest["requires"]), "references without notice")
    return manifest


def read_table(folder: Path, record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    check(record["file"] == name, "a file of the index has another name")
    data = (folder / name).read_bytes()
    check(len(data) == record["nbytes"] and sha256(data) == record["digest"], f"{name} is damaged")
    check(blocks(data, record["block_bytes"]) == record["crc32c"], f"the checksums of {name} are wrong")
    return pq.ParquetFile(folder / name, pre_buffer=False).read(use_threads=False).to_pylist()


# --------------------------------------------------------------------------------------------------------------- objects


def text_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def decode(node: Any) -> Any:
    """The value of a node of a typed tree."""
    if isinstance(node, list):
        return [decode(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$type" not in node:
        return {key: decode(value) for key, value in node.items()}
    tag = node["$type"]
    simple = {
        "int": lambda: int(node["hex"], 16),
        "float": lambda: struct.unpack(">d", bytes.fromhex(node["bits"]))[0],
        "complex": lambda: complex(decode(node["real"]), decode(node["imag"])),
        "str": lambda: text_bytes(node["base64"]).decode("utf-8", "surrogatepass"),
        "bytes": lambda: text_bytes(node["base64"]),
        "bytearray": lambda: bytearray(text_bytes(node["base64"])),
        "slice": lambda: slice(*(decode(node[part]) for part in ("start", "stop", "step"))),
        "range": lambda: range(*(decode(node[part]) for part in ("start", "stop", "step"))),
        "numpy-dtype": lambda: np.dtype(node["dtype"]),
        "numpy-array": lambda: np.frombuffer(text_bytes(node["base64"]), node["dtype"]).reshape(node["shape"]),
        "numpy-scalar": lambda: decode_scalar(node["dtype"], text_bytes(node["base64"])),
        "tensor": lambda: TensorRef(node["name"]),
    }
    if tag in simple:
        return simple[tag]()
    if tag in ("tuple", "set", "frozenset", "deque"):
        items = [decode(item) for item in node["items"]]
        kinds = {"tuple": tuple, "set": set, "frozenset": frozenset}
        return kinds[tag](items) if tag in kinds else collections.deque(items, node["maxlen"])
    if tag in ("dict", "ordered-dict", "counter", "defaultdict"):
        pairs = {decode(key): decode(value) for key, value in node["items"]}
        if tag == "defaultdict":
            factories = [bool, int, float, str, bytes, list, tuple, dict, set]
            return collections.defaultdict({kind.__name__: kind for kind in factories}.get(node["factory"]), pairs)
        kinds = {"dict": dict, "ordered-dict": collections.OrderedDict, "counter": collections.Counter}
        return kinds[tag](pairs)
    check("." in tag, f"an unknown type: {tag}")
    return (tag, decode(node["value"]))  # whoever knows the tag may make more of it


def decode_scalar(dtype: str, data: bytes) -> Any:
    if dtype == "str":
        return np.str_(data.decode("utf-8", "surrogatepass"))
    return np.bytes_(data) if dtype == "bytes" else np.frombuffer(data, dtype)[0]


# --------------------------------------------------------------------------------------------------------------- reading


def read(run: str | Path, step: int | None = None) -> Checkpoint:
    """Checkpoint `step` of a run, the newest one when None. NotACheckpointError for anything but what the page says."""
    run = Path(run)
    step = steps(run)[-1] if step is None else step
    top = run / f"step-{step:012d}"
    manifest = read_manifest((top / "manifest.json").read_bytes())
    check(manifest["step"] == step, "the manifest is of another step")
    check(re.fullmatch(r"[0-9a-z-]{8,64}", manifest["attempt"]) is not None, "not an attempt")
    folder = top / manifest["attempt"]
    tensors = read_table(folder, manifest["tensors"], "tensors.parquet")
    fragments = read_table(folder, manifest["fragments"], "fragments.parquet")
    objects = read_table(folder, manifest["objects"], "objects.parquet")
    references = manifest.get("references", [])
    images = read_images(folder, manifest) + read_references(run, references)
    manifest["images"] = [*manifest["writers"], *references]
    check(len(tensors) == manifest["num_tensors"] and len(fragments) == manifest["num_fragments"], "rows are missing")
    check(sum(row["nbytes"] for row in tensors) == manifest["tensor_bytes"], "the bytes of all tensors differ")
    entries: list[dict[str, tuple[str, list[int], int, int]]] = [{} for _ in images]
    out = Checkpoint(manifest, read_tensors(manifest, tensors, fragments, images, entries), {})
    for row in objects:
        data = images[row["writer"]][row["byte_offset"] : row["byte_offset"] + row["nbytes"]]
        check(len(data) == row["nbytes"] and sha256(data) == row["digest"], f"object {row['name']} is damaged")
        out.objects[row["name"], row["rank"]] = decode(json.loads(data.decode("utf-8")))
        name = f"object:{row['name']}" + ("" if row["rank"] == row["writer"] else f"@{row['rank']}")
        entries[row["writer"]][name] = ("U8", [row["nbytes"]], row["byte_offset"], row["nbytes"])
    keys = [(row["name"], row["rank"]) for row in objects]
    check(keys == sorted(set(keys)), "objects are not sorted")
    for number, writer in enumerate(manifest["writers"]):
        check_header(folder / writer["file"], images[number], writer, entries[number])
    for number, reference in enumerate(references, len(manifest["writers"])):
        path = run / f"step-{reference['step']:012d}" / reference["attempt"] / reference["file"]
        check_header(path, images[number], reference, entries[number], whole=False)
        used = sum(nbytes for _, _, _, nbytes in entries[number].values())
        check(used == reference["used_bytes"], "other bytes of an image are used than the manifest says")
    return out


def read_images(folder: Path, manifest: dict[str, Any]) -> list[bytes]:
    writers, out = manifest["writers"], []
    for number, writer in enumerate(writers):
        check(writer["rank"] == number, "writers are out of order")
        check(writer["file"] == f"{number:05d}-of-{len(writers):05d}.safetensors", "an image has another name")
        data = (folder / writer["file"]).read_bytes()
        check(len(data) == writer["nbytes"], "an image has another size")
        out.append(data)
    return out


def read_references(run: Path, references: list[dict[str, Any]]) -> list[bytes]:
    places = [(one["step"], one["attempt"], one["file"]) for one in references]
    check(places == sorted(set(places)), "references are not sorted")
    out = []
    for step, attempt, file in places:
        check(re.fullmatch(r"[0-9a-z-]{8,64}", attempt) is not None, "not an attempt")
        check(re.fullmatch(r"\d{5,9}-of-\d{5,9}\.safetensors", file) is not None, "not an image")
        out.append((run / f"step-{step:012d}" / attempt / file).read_bytes())
    check([len(data) for data in out] == [one["nbytes"] for one in references], "an image has another size")
    return out


def read_tensors(
    manifest: dict[str, Any],
    tensors: list[dict[str, Any]],
    fragments: list[dict[str, Any]],
    images: list[bytes],
    entries: list[dict[str, tuple[str, list[int], int, int]]],
) -> dict[str, Tensor]:
    """All tensors; notes in `entries` what the header of each image must say of its fragments."""
    names = [row["name"] for row in tensors]
    check([row["id"] for row in tensors] == list(range(len(tensors))) and names == sorted(set(names)), "ids or names")
    whole = [np.zeros((*row["shape"], DTYPES[row["dtype"]][0]), np.uint8) for row in tensors]
    seen = [np.zeros(row["shape"], np.int32) for row in tensors]
    last = (-1, -1)
    for row in fragments:
        tensor = tensors[row["tensor"]]
        itemsize, code = DTYPES[tensor["dtype"]]
        offsets, lengths, shape = row["offsets"], row["lengths"], tensor["shape"]
        check(len(offsets) == len(lengths) == len(shape), "dims")
        check(
            all(o >= 0 and n > 0 and o + n <= size for o, n, size in zip(offsets, lengths, shape, strict=True)), "box"
        )
        check(row["nbytes"] == math.prod(lengths) * itemsize, "bytes of a fragment")
        place = (row["tensor"], int(np.ravel_multi_index(offsets, shape)) if shape else 0)
        check(place > last, "fragments are not sorted")
        last = place
        writer = manifest["images"][row["writer"]]
        stop = row["byte_offset"] + row["nbytes"]
        check(writer["header_bytes"] <= row["byte_offset"] and stop <= writer["nbytes"], "a fragment outside its image")
        data = images[row["writer"]][row["byte_offset"] : stop]
        check(blocks(data, manifest["block_bytes"]) == row["checksums"], f"{tensor['name']} is damaged")
        check(
            "sha256" not in row or hashlib.sha256(data).digest() == row["sha256"],
            f"{tensor['name']} has another digest",
        )
        box = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
        whole[row["tensor"]][box] = np.frombuffer(data, np.uint8).reshape(*lengths, itemsize)
        seen[row["tensor"]][box] += 1
        ranges = ",".join(f"{o}:{o + n}" for o, n in zip(offsets, lengths, strict=True))
        key = tensor["name"] if lengths == shape else f"{tensor['name']}@[{ranges}]"
        stored = lengths if code else [*lengths, itemsize]
        entries[row["writer"]][key] = (code or "U8", stored, row["byte_offset"], row["nbytes"])
    counts = collections.Counter(row["tensor"] for row in fragments)
    for row, array, mask in zip(tensors, whole, seen, strict=True):
        check(bool((mask == 1).all()), f"{row['name']} is not tiled")
        check(array.nbytes == row["nbytes"] and counts[row["id"]] == row["num_fragments"], "a row of tensors.parquet")
    return {
        row["name"]: Tensor(row["dtype"], row["role"], row["aliases"], data)
        for row, data in zip(tensors, whole, strict=True)
    }


def check_header(
    path: Path,
    data: bytes,
    writer: dict[str, Any],
    expected: dict[str, tuple[str, list[int], int, int]],
    *,
    whole: bool = True,
) -> None:
    """The image as `safetensors` sees it, against the index. One that is referred to also holds what is not."""
    size = 8 + struct.unpack("<Q", data[:8])[0]
    check(size == writer["header_bytes"] and size % 4096 == 0, "the length of a header")
    check(crc32c(data[:size]) == writer["header_crc32c"], "a header is damaged")
    with safe_open(path, framework="numpy") as image:
        check(image.metadata() == {"format": "ckpt", "version": "1"}, "metadata of an image")
        listed = set(image.keys())
        check(
            listed == set(expected) if whole else listed >= set(expected), "an image has other entries than the index"
        )
        for key, (code, shape, _, _) in expected.items():
            part = image.get_slice(key)
            check((part.get_dtype(), list(part.get_shape())) == (code, shape), f"{key} has another dtype or shape")
    header = json.loads(data[8:size])
    order = list(expected)
    order.sort(key=lambda key: expected[key][2])
    position = size
    for key in order:
        start, stop = header[key]["data_offsets"]
        check((start + size, stop - start) == expected[key][2:], f"{key} lies elsewhere")
        check(start + size == position or not whole, f"there is a hole before {key}")
        position = stop + size
    check(position == len(data) or not whole, "bytes are left over")
