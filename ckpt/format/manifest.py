"""The manifest: the small record whose existence means that a checkpoint is complete.

In: `Manifest`. Out: canonical JSON bytes that carry their own digest, and back, checked. Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ckpt.config import MANIFEST_BYTES_MAX
from ckpt.errors import DamagedError, InvalidInputError, VersionError
from ckpt.format.checksum import sha256

FORMAT_VERSION = 1
KNOWN_FEATURES: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the index. `crc32c` has one value per `block_bytes`, so that a part of the file can be verified."""

    file: str  # relative to the attempt's folder
    nbytes: int
    digest: str
    block_bytes: int
    crc32c: list[int]


@dataclass(frozen=True, kw_only=True)
class WriterRecord:
    """One image."""

    rank: int
    file: str  # relative to the attempt's folder
    nbytes: int
    header_bytes: int
    header_crc32c: int
    layout: str = ""  # digest of which parts of which parameters the rank held; "" when it held none


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says. Times are UTC, RFC 3339."""

    step: int
    attempt: str
    created: str
    program: str
    world: int  # ranks of the job that saved
    block_bytes: int
    num_tensors: int
    num_fragments: int
    tensor_bytes: int  # of all tensors, each counted once
    tensors: FileRecord
    fragments: FileRecord
    objects: FileRecord
    writers: list[WriterRecord]
    layout: dict[str, Any] | None = None  # the saved layout (docs/reference/layout-files.md)
    metadata: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    structure_changed: bool = False  # some rank's state had another structure than the plan; the next save plans anew
    rank_layouts: list[str] = field(default_factory=list)  # by rank of the job; empty: each writer's own (no reshard since)

    @property
    def layouts_by_rank(self) -> list[str]:
        """Digest of what each rank of the job that saved held, whoever writes its images now."""
        return self.rank_layouts or [writer.layout for writer in self.writers]


def canonical(document: dict[str, Any]) -> bytes:
    """The one way in which a manifest is written: two-space indent, ASCII, keys in order, a newline at the end."""
    return (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=True) + "\n").encode()


def pack(manifest: Manifest) -> bytes:
    """The manifest as bytes; its last field is the digest of the document without it."""
    document: dict[str, Any] = {"format": "ckpt", "version": FORMAT_VERSION, "requires": []}
    for key, value in vars(manifest).items():
        document[key] = value
    for key in ("tensors", "fragments", "objects"):
        document[key] = vars(document[key])
    document["writers"] = [vars(writer) for writer in manifest.writers]
    try:
        document["digest"] = sha256(canonical(document))
    except TypeError as error:
        raise InvalidInputError(f"metadata and metrics must be JSON values: {error}", kind="not-storable") from error
    return canonical(document)


def unpack(data: bytes, *, name: str) -> Manifest:
    """A manifest from its bytes.

    Raises VersionError for a newer format, DamagedError for anything that `pack` did not write.
    """
    document = _parse(data, name)
    version = document.get("version")
    unknown = [f for f in document.get("requires", []) if f not in KNOWN_FEATURES]
    if document.get("format") != "ckpt" or type(version) is not int:
        raise DamagedError(f"`{name}` is not a manifest of ckpt", kind="not-a-manifest")
    if version > FORMAT_VERSION or unknown:
        raise VersionError(
            f"`{name}` has format version {version}"
            + (f" and needs {', '.join(map(str, unknown))}" if unknown else "")
            + f"; this program reads up to version {FORMAT_VERSION}",
            hints=("install a newer ckpt",),
        )
    digest = document.pop("digest", None)
    found = sha256(canonical(document))
    if digest != found or canonical({**document, "digest": digest}) != data:
        raise DamagedError(f"`{name}` is damaged: expected digest {digest}, found {found}")
    fields = {k: v for k, v in document.items() if k in Manifest.__dataclass_fields__}
    try:
        for key in ("tensors", "fragments", "objects"):
            fields[key] = FileRecord(**fields[key])
        fields["writers"] = [WriterRecord(**writer) for writer in fields["writers"]]
        return Manifest(**fields)
    except (TypeError, KeyError) as error:
        raise DamagedError(f"`{name}` is damaged: {error}") from error


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MANIFEST_BYTES_MAX:
        raise DamagedError(f"`{name}` is damaged: {len(data)} bytes are too many for a manifest")
    try:
        document = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"`{name}` is damaged: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DamagedError(f"`{name}` is damaged: not a JSON object")
    return document
