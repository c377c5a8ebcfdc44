"""Erasure coding: n = k + m blocks of which any k give back all, over GF(2^8) with polynomial 0x11D.

In: buffers and coefficients. Out: other buffers, and CRC-32C checksums of both from the same pass over the memory; the GIL is
dropped meanwhile. A code is a record with the digest of its matrix, so that a decoder never guesses. Never checks what it
decodes: a flipped byte gives garbage without an error, so sums are verified before and digests after.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.config import KIB, Options
from ckpt.errors import DamagedError, InvalidInputError
from ckpt.kernels import choice, erasure_reference
from ckpt.kernels.choice import Status
from ckpt.kernels.columns import Buffer, bytes_view, integer_column

SOURCES_MAX = 64  # CKPT_CODE_SOURCES_MAX in native/include/ckpt_core.h
TARGETS_MAX = 32  # CKPT_CODE_TARGETS_MAX
_TRIED_MAX = 20_000  # choices of k of n pieces that are all tried when a code is made; takes a few ms
_TILE_ALIGN = 4 * KIB


class CodeId(IntEnum):
    """As `ckpt_code` in native/include/ckpt_core.h. Numbers and names are kept with what was coded: append-only."""

    xor = 1
    cauchy_rs = 2


@dataclass(frozen=True, kw_only=True)
class Code:
    """k blocks of data and m of parity, pieces 0 to k - 1 and k to n - 1. Made by `code_for` and `code_from_record`."""

    k: int
    m: int
    code: CodeId
    digest: str  # SHA-256 of the matrix [n, k], hexadecimal

    @property
    def n(self) -> int:
        return self.k + self.m

    def record(self) -> dict[str, Any]:
        """What is kept beside coded bytes; JSON-ready. `code_from_record` reads it."""
        return {"code": self.code.name, "k": self.k, "m": self.m, "matrix_sha256": self.digest}

    def parity_rows(self) -> NDArray[np.uint8]:
        """[m, k] coefficients of the parity blocks."""
        return _matrix(self.code, self.k, self.m)[self.k :].copy()

    def rows(self, *, have: Sequence[int], wanted: Sequence[int]) -> NDArray[np.uint8]:
        """[wanted, k] coefficients that give the pieces `wanted`, data or parity, from the k pieces `have`, in these orders."""
        pieces = {"have": have, "wanted": wanted}
        for name, numbers in pieces.items():
            if not all(0 <= piece < self.n for piece in numbers):
                raise InvalidInputError(f"`{name}` must name pieces 0 to {self.n - 1}, found {list(numbers)}")
        if len(have) != self.k or len(set(have)) != self.k:
            raise InvalidInputError(
                f"{self.k} different pieces of {self.n} are needed, found {list(have)}", kind="too-few-pieces"
            )
        matrix, out = _matrix(self.code, self.k, self.m), np.zeros((len(wanted), self.k), np.uint8)
        there, asked = np.array(have, np.int32), np.array(wanted, np.int32)
        if choice.coder_demanded() == choice.REFERENCE:
            status = erasure_reference.rows(matrix, there, asked, out)
        else:
            status = choice.native().code_rows(matrix.reshape(-1), self.k, self.m, there, asked, out.reshape(-1))
        if status == Status.SINGULAR:
            raise InvalidInputError(f"pieces {list(have)} do not determine the others", kind="singular")
        assert status == Status.OK, Status(status)
        return out


def code_for(k: int, m: int) -> Code:
    """The code of this version for k blocks of data and m of parity: exclusive or for m = 1, else Cauchy Reed-Solomon.

    Any k of the n pieces determine all. For a code with at most 20,000 choices of them this is tried here, once per process;
    Cauchy matrices are so by construction.
    """
    if not (1 <= k <= SOURCES_MAX and 1 <= m <= TARGETS_MAX):
        raise InvalidInputError(
            f"a code has 1 to {SOURCES_MAX} data and 1 to {TARGETS_MAX} parity blocks, found k = {k}, m = {m}"
        )
    return _code(CodeId.xor if m == 1 else CodeId.cauchy_rs, k, m)


def code_from_record(record: Mapping[str, Any]) -> Code:
    """The code that `Code.record` described. DamagedError when no code of this version has that matrix."""
    name, k, m, digest = (record.get(key) for key in ("code", "k", "m", "matrix_sha256"))
    known = isinstance(name, str) and name in CodeId.__members__
    sizes = type(k) is int and type(m) is int and 1 <= k <= SOURCES_MAX and 1 <= m <= TARGETS_MAX
    if not known or not sizes or (name == CodeId.xor.name and m != 1):
        raise DamagedError(f"unknown erasure code: {dict(record)}", kind="unknown-code")
    assert isinstance(name, str) and isinstance(k, int) and isinstance(m, int)
    code = _code(CodeId[name], k, m)
    if code.digest != digest:
        raise DamagedError(
            f"erasure code {name} ({k}, {m}) has another matrix: expected sha256 {digest}, found {code.digest}",
            kind="unknown-code",
        )
    return code


def count_singular(matrix: NDArray[np.uint8], k: int, m: int) -> int:
    """How many choices of k of the n pieces of a systematic matrix [k + m, k] do not determine the data; tries all."""
    matrix = integer_column("matrix", matrix, np.uint8, (k + m, k))
    if choice.coder_demanded() == choice.REFERENCE:
        status, count = erasure_reference.count_singular(matrix, k, m)
    else:
        status, count = choice.native().code_count_singular(matrix.reshape(-1), k, m)
    if status != Status.OK:
        raise InvalidInputError(f"not a systematic matrix of {k} data and {m} parity blocks")
    return int(count)


@lru_cache(maxsize=256)
def _code(code: CodeId, k: int, m: int) -> Code:
    matrix = _matrix(code, k, m)
    if math.comb(k + m, k) <= _TRIED_MAX:
        singular = count_singular(matrix, k, m)
        assert singular == 0, (code, k, m, singular)
    return Code(k=k, m=m, code=code, digest=hashlib.sha256(matrix.tobytes()).hexdigest())


def _matrix(code: CodeId, k: int, m: int) -> NDArray[np.uint8]:
    out = np.zeros((k + m, k), np.uint8)
    if choice.coder_demanded() == choice.REFERENCE:
        erasure_reference.matrix(code == CodeId.xor, k, m, out)
    else:
        status = choice.native().code_matrix(code, k, m, out.reshape(-1))
        assert status == Status.OK, Status(status)
    return out


@dataclass(frozen=True, kw_only=True)
class BlockSums:
    """CRC-32C of what one call read and wrote; empty where not asked for."""

    sources: NDArray[np.uint32]  # of the bytes that each source has, without the zeros after them
    targets: NDArray[np.uint32]  # of each whole target, as it is afterwards


def code_blocks(
    sources: Sequence[Buffer],
    targets: Sequence[Buffer],
    coefficients: NDArray[np.uint8],
    *,
    add: bool = False,
    sum_sources: bool = False,
    sum_targets: bool = False,
    tile_bytes: int = Options.code_tile_bytes,
) -> BlockSums:
    """Set each target to the sum of all sources times its row of coefficients, tile by tile, on the caller's thread.

    Encoding takes `Code.parity_rows`, rebuilding `Code.rows`. The same columns with `add` fold in sources as they arrive:
    clear the targets (or begin without `add`), then one call per source with its column. Any thread may call it.

    Args:
        sources: buffers of at most the size of the targets. What one is shorter counts as zero and is not read; with no
            target, they are only summed.
        targets: writable buffers of one size, which overlap neither the sources nor each other.
        coefficients: [targets, sources].
        add: to what the targets hold.
        sum_sources, sum_targets: also take checksums, of each tile while it is in the processor's cache.
        tile_bytes: of all sources together, in one go.

    Raises:
        InvalidInputError: naming the block at fault. Nothing was written.
    """
    source_views = [bytes_view(f"sources[{i}]", source) for i, source in enumerate(sources)]
    target_views = [bytes_view(f"targets[{i}]", target) for i, target in enumerate(targets)]
    rows = integer_column("coefficients", coefficients, np.uint8, (len(targets), len(sources)))
    block_bytes = _check_blocks(source_views, target_views, tile_bytes)
    source_crcs = np.zeros(len(sources) if sum_sources else 0, np.uint32)
    target_crcs = np.zeros(len(targets) if sum_targets else 0, np.uint32)
    columns = _columns(source_views, target_views, rows, block_bytes, tile_bytes)
    kernel = choice.coder()
    if kernel is None:
        status, bad_source, bad_target = erasure_reference.code_blocks(
            source_views, target_views, rows, block_bytes, add, source_crcs, target_crcs
        )
    else:
        status, bad_source, bad_target = choice.native().code_blocks(
            kernel, choice.crc_kernel(), **columns, add=add, source_crcs=source_crcs, target_crcs=target_crcs
        )
    if status != Status.OK:
        place = f"sources[{bad_source}]" if bad_source >= 0 else f"targets[{bad_target}]"
        reason = "overlaps another block" if status == Status.TARGET_OVERLAPS else "does not fit"
        raise InvalidInputError(f"cannot code blocks of {block_bytes} bytes: {place} {reason}", kind="bad-block")
    return BlockSums(sources=source_crcs, targets=target_crcs)


def isal_raw(
    sources: Sequence[Buffer], targets: Sequence[Buffer], coefficients: NDArray[np.uint8], *, tile_bytes: int
) -> None:
    """For benchmarks: the same by ISA-L's own `ec_encode_data` alone, over whole blocks of one size, without sums."""
    source_views = [bytes_view("sources", source) for source in sources]
    target_views = [bytes_view("targets", target) for target in targets]
    rows = integer_column("coefficients", coefficients, np.uint8, (len(targets), len(sources)))
    block_bytes = _check_blocks(source_views, target_views, tile_bytes)
    if any(view.size != block_bytes for view in source_views):
        raise InvalidInputError("`sources` must be as long as the targets")
    status = choice.native().code_isal_raw(**_columns(source_views, target_views, rows, block_bytes, tile_bytes))
    if status != Status.OK:
        raise InvalidInputError("ISA-L is not here", kind="no-kernel", hints=choice.ISAL_HINTS)


def _check_blocks(sources: list[NDArray[np.uint8]], targets: list[NDArray[np.uint8]], tile_bytes: int) -> int:
    """Bytes of a block."""
    if not 1 <= len(sources) <= SOURCES_MAX or len(targets) > TARGETS_MAX:
        raise InvalidInputError(
            f"1 to {SOURCES_MAX} sources and up to {TARGETS_MAX} targets, found {len(sources)} and {len(targets)}"
        )
    if tile_bytes <= 0:
        raise InvalidInputError(f"`tile_bytes` must be positive, found {tile_bytes}")
    sizes = {view.size for view in targets}
    if len(sizes) > 1:
        raise InvalidInputError(f"`targets` must be of one size, found {sorted(sizes)}", kind="bad-block")
    block_bytes = max(view.size for view in (targets or sources))
    for i, view in enumerate(sources):
        if view.size > block_bytes:
            raise InvalidInputError(
                f"sources[{i}] has {view.size} bytes, more than the targets' {block_bytes}", kind="bad-block"
            )
    for i, view in enumerate(targets):
        if not view.flags.writeable:
            raise InvalidInputError(f"targets[{i}] must be writable memory", kind="bad-block")
    return block_bytes


def _columns(
    sources: list[NDArray[np.uint8]],
    targets: list[NDArray[np.uint8]],
    rows: NDArray[np.uint8],
    block_bytes: int,
    tile_bytes: int,
) -> dict[str, Any]:
    of_each = tile_bytes // len(sources) // _TILE_ALIGN * _TILE_ALIGN
    return {
        "source": np.array([_address(view) for view in sources], np.uint64),
        "source_bytes": np.array([view.size for view in sources], np.int64),
        "target": np.array([_address(view) for view in targets], np.uint64),
        "coefficients": rows.reshape(-1),
        "block_bytes": block_bytes,
        "tile_bytes": min(max(of_each, _TILE_ALIGN), 1 << 30),
    }


def _address(view: NDArray[np.uint8]) -> int:
    return int(view.__array_interface__["data"][0])  # several times faster than `.ctypes.data`
