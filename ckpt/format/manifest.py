"""The manifest: the small record whose existence means that a checkpoint is complete.

In: `Manifest`. Out: canonical JSON bytes that carry their own digest, and back, every field checked. Pure.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from ckpt.config import BLOCK_BYTES_LIMIT, INDEX_ROWS_MAX, MANIFEST_BYTES_MAX, WORLD_MAX
from ckpt.errors import DamagedError, InvalidInputError, VersionError
from ckpt.format.checksum import sha256

FORMAT_VERSION = 1
REFERENCES = "references"  # a feature: fragments may lie in images of earlier attempts
KNOWN_FEATURES: frozenset[str] = frozenset({REFERENCES})


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


@dataclass(frozen=True, kw_only=True, order=True)
class ReferenceRecord:
    """An image of another attempt that holds fragments of this checkpoint. Never one that itself only refers to them."""

    step: int
    attempt: str
    file: str  # relative to that attempt's folder
    nbytes: int
    header_bytes: int
    header_crc32c: int
    used_bytes: int  # of the fragments of this checkpoint that lie there


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
    rank_layouts: list[str] = field(
        default_factory=list
    )  # by rank of the job; empty: each writer's own (no reshard since)
    references: list[ReferenceRecord] = field(default_factory=list)  # sorted; numbered on from the writers

    @property
    def layouts_by_rank(self) -> list[str]:
        """Digest of what each rank of the job that saved held, whoever writes its images now."""
        return self.rank_layouts or [writer.layout for writer in self.writers]


def canonical(document: dict[str, Any]) -> bytes:
    """The one way in which a manifest is written: ASCII, fields in order, indented by one space, a newline at the end."""
    return (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def pack(manifest: Manifest) -> bytes:
    """The manifest as bytes; its last field is the digest of the document without it.

    InvalidInputError for metadata or metrics that are no JSON values.
    """
    requires = [REFERENCES] if manifest.references else []
    document: dict[str, Any] = {"format": "ckpt", "version": FORMAT_VERSION, "requires": requires}
    for key, value in vars(manifest).items():
        document[key] = value
    document.pop(REFERENCES)  # a checkpoint that refers to nothing is written as before there were references
    if manifest.references:
        document[REFERENCES] = [vars(reference) for reference in manifest.references]
    for key in _INDEX_FILES:
        document[key] = vars(document[key])
    document["writers"] = [vars(writer) for writer in manifest.writers]
    try:
        document["metrics"] = {key: _metric_out(value) for key, value in manifest.metrics.items()}
        without = canonical(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"metadata and metrics must be JSON values: {error}",
            kind="not-storable",
            hints=("JSON has no NaN and no infinity: metrics may have them, metadata may not",),
        ) from error
    return without.removesuffix(_END) + _DIGEST_LINE % sha256(without).encode()


# The digest stands in the last line but one and covers the bytes of the file without that line, so that a reader in any
# language can check it without writing numbers and text the way this one does.
_END = b"\n}\n"
_DIGEST_LINE = b',\n "digest": "%s"' + _END
_DIGEST_BYTES = len(sha256(b""))
_INDEX_FILES = ("tensors", "fragments", "objects")


def unpack(data: bytes, *, name: str) -> Manifest:
    """A manifest from its bytes.

    Raises VersionError for a newer format, DamagedError for anything that `pack` did not write.
    """
    document = _parse(data, name)
    version, requires = document.get("version"), document.get("requires", [])
    if document.get("format") != "ckpt" or type(version) is not int or not isinstance(requires, list):
        raise DamagedError(f"`{name}` is not a manifest of ckpt", kind="not-a-manifest")
    unknown = [str(feature) for feature in requires if feature not in list(KNOWN_FEATURES)]
    if version > FORMAT_VERSION or unknown:
        raise VersionError(
            f"`{name}` has format version {version}"
            + (f" and needs {', '.join(unknown)}" if unknown else "")
            + f"; this program reads up to version {FORMAT_VERSION}",
            hints=("install a newer ckpt",),
        )
    _check_digest(data, document.get("digest"), name)
    if (REFERENCES in requires) != (REFERENCES in document):
        raise DamagedError(f"`{name}` is damaged: `requires` and the field `{REFERENCES}` disagree")
    return _manifest(document, name)


def _check_digest(data: bytes, digest: Any, name: str) -> None:
    tail = len(_DIGEST_LINE) - 2 + _DIGEST_BYTES
    found = sha256(data[:-tail] + _END)
    if data[-tail:] != _DIGEST_LINE % found.encode():
        raise DamagedError(f"`{name}` is damaged: expected digest {str(digest)[:80]}, found {found}")


def _manifest(document: dict[str, Any], name: str) -> Manifest:
    """The fields, each of its type and within its limits. Fields that this version does not know are passed over."""
    checked = _Checked(document, f"`{name}` is damaged: ")
    world, writers = checked.count("world", 1, WORLD_MAX), checked.get("writers", list)
    layouts = checked.texts("rank_layouts", {0, world})
    if not layouts and len(writers) != world:
        raise DamagedError(f"`{name}` is damaged: {len(writers)} writers, expected {world}")
    metrics = checked.get("metrics", dict)
    try:
        numbers = {key: _metric_in(value) for key, value in metrics.items()}
    except ValueError as error:
        raise DamagedError(f"`{name}` is damaged: {error}") from None
    return Manifest(
        step=checked.count("step"),
        attempt=checked.get("attempt", str),
        created=checked.get("created", str),
        program=checked.get("program", str),
        world=world,
        block_bytes=checked.count("block_bytes", 1, BLOCK_BYTES_LIMIT),
        num_tensors=checked.count("num_tensors", 0, INDEX_ROWS_MAX),
        num_fragments=checked.count("num_fragments", 0, INDEX_ROWS_MAX),
        tensor_bytes=checked.count("tensor_bytes"),
        tensors=_file_record(checked.inner("tensors")),
        fragments=_file_record(checked.inner("fragments")),
        objects=_file_record(checked.inner("objects")),
        writers=[
            _writer_record(_Checked(writer, f"`{name}` is damaged: writer {i}: ")) for i, writer in enumerate(writers)
        ],
        layout=checked.get("layout", dict) if document.get("layout") is not None else None,
        metadata=checked.get("metadata", dict),
        metrics=numbers,
        structure_changed=checked.get("structure_changed", bool),
        rank_layouts=layouts,
        references=_references(document.get(REFERENCES, []), name),
    )


class _Checked:
    """Typed access to the fields of a JSON object; DamagedError for a field that is missing or of another type."""

    def __init__(self, document: Any, where: str) -> None:
        self._where = where
        if type(document) is not dict:
            raise DamagedError(f"{where}not a JSON object")
        self._document = document

    def get(self, key: str, kind: type) -> Any:
        value = self._document.get(key)
        if type(value) is not kind:
            raise DamagedError(f"{self._where}field `{key}` must be a {kind.__name__}, found {str(value)[:60]!r}")
        return value

    def count(self, key: str, low: int = 0, high: int = 2**62) -> int:
        value: int = self.get(key, int)
        if not low <= value <= high:
            raise DamagedError(f"{self._where}field `{key}` must be {low} to {high}, found {value}")
        return value

    def counts(self, key: str, length: int) -> list[int]:
        """A list of `length` numbers of 32 bits."""
        values: list[int] = self.get(key, list)
        if len(values) != length or not all(type(value) is int and 0 <= value < 2**32 for value in values):
            raise DamagedError(f"{self._where}field `{key}` must be {length} numbers of 32 bits")
        return values

    def texts(self, key: str, lengths: set[int]) -> list[str]:
        """A list of texts, of one of these lengths."""
        values: list[str] = self.get(key, list)
        if len(values) not in lengths or not all(type(value) is str for value in values):
            raise DamagedError(f"{self._where}field `{key}` must be {sorted(lengths)} texts")
        return values

    def inner(self, key: str) -> _Checked:
        return _Checked(self._document.get(key), f"{self._where}`{key}`: ")


def _file_record(checked: _Checked) -> FileRecord:
    nbytes, block_bytes = checked.count("nbytes"), checked.count("block_bytes", 1, BLOCK_BYTES_LIMIT)
    return FileRecord(
        file=checked.get("file", str),
        nbytes=nbytes,
        digest=checked.get("digest", str),
        block_bytes=block_bytes,
        crc32c=checked.counts("crc32c", -(-nbytes // block_bytes)),
    )


def _writer_record(checked: _Checked) -> WriterRecord:
    nbytes = checked.count("nbytes")
    return WriterRecord(
        rank=checked.count("rank"),
        file=checked.get("file", str),
        nbytes=nbytes,
        header_bytes=checked.count("header_bytes", 8, nbytes),
        header_crc32c=checked.count("header_crc32c", 0, 2**32 - 1),
        layout=checked.get("layout", str),
    )


def _references(found: Any, name: str) -> list[ReferenceRecord]:
    if type(found) is not list:
        raise DamagedError(f"`{name}` is damaged: field `{REFERENCES}` must be a list")
    out = [_reference(_Checked(one, f"`{name}` is damaged: reference {i}: ")) for i, one in enumerate(found)]
    places = [(one.step, one.attempt, one.file) for one in out]
    if places != sorted(set(places)):
        raise DamagedError(f"`{name}` is damaged: its references are not sorted, or one stands twice")
    return out


def _reference(checked: _Checked) -> ReferenceRecord:
    nbytes = checked.count("nbytes")
    return ReferenceRecord(
        step=checked.count("step"),
        attempt=checked.get("attempt", str),
        file=checked.get("file", str),
        nbytes=nbytes,
        header_bytes=checked.count("header_bytes", 8, nbytes),
        header_crc32c=checked.count("header_crc32c", 0, 2**32 - 1),
        used_bytes=checked.count("used_bytes", 0, nbytes),
    )


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _metric_out(value: Any) -> Any:
    """A metric as JSON: a loss that is not a number is worth knowing, and JSON has no word for it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a metric must be a number, found {value!r}")
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _metric_in(value: Any) -> Any:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise ValueError(f"a metric must be a number, found {str(value)[:60]!r}")
    return value


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MANIFEST_BYTES_MAX:
        raise DamagedError(f"`{name}` is damaged: {len(data)} bytes are too many for a manifest")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a field stands twice")
        return out

    try:
        document = json.loads(data.decode("ascii"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"`{name}` is damaged: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DamagedError(f"`{name}` is damaged: not a JSON object")
    return document
