"""The self tests of `ckpt doctor`: kernels against known answers, and what a store can do.

In: nothing, or a store. Out: `Check`s. Leaves nothing in the store. A store that cannot be reached is an error, not a check.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass

import numpy as np

from ckpt.errors import AlreadyExistsError, CheckpointError
from ckpt.kernels import code_blocks, code_for, copy_boxes, crc32c
from ckpt.store.base import Store
from ckpt.store.posix import PosixStore

_FOLDER = ".ckpt-doctor"
_PROBE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test and its outcome. A store that lacks a feature is not a failure: the detail says so."""

    name: str
    ok: bool
    detail: str


def check_crc() -> Check:
    """CRC-32C of the check string of every CRC catalogue."""
    found = crc32c(b"123456789")
    return Check(name="crc32c", ok=found == 0xE3069283, detail=f"expected e3069283, found {found:08x}")


def check_copy() -> Check:
    """A strided 3-d box copy against NumPy."""
    source = np.arange(6 * 7 * 8, dtype=np.int32).reshape(6, 7, 8)
    target = np.zeros((3, 4, 5), np.int32)
    start = source[2:5, 1:5, 3:8]
    copy_boxes(
        source=np.array([start.ctypes.data], np.uint64),
        source_limit=np.array([source.ctypes.data + source.nbytes], np.uint64),
        target=np.array([target.ctypes.data], np.uint64),
        target_limit=np.array([target.ctypes.data + target.nbytes], np.uint64),
        lengths=np.array([target.shape], np.int64),
        source_strides=np.array([source.strides], np.int64),
        target_strides=np.array([target.strides], np.int64),
        itemsize=np.array([4], np.int64),
    )
    same = bool(np.array_equal(target, start))
    return Check(name="box copy", ok=same, detail="equal to NumPy" if same else "differs from NumPy")


def check_coder() -> Check:
    """Two lost blocks of six come back from the others."""
    code = code_for(4, 2)
    blocks = [np.random.default_rng(i).integers(0, 256, 10_007, np.uint8) for i in range(4)]
    parity = [np.zeros(10_007, np.uint8) for _ in range(2)]
    code_blocks(blocks, parity, code.parity_rows())
    back = [np.zeros(10_007, np.uint8) for _ in range(2)]
    code_blocks([*blocks[2:], *parity], back, code.rows(have=[2, 3, 4, 5], wanted=[0, 1]))
    same = all(np.array_equal(a, b) for a, b in zip(back, blocks, strict=False))
    detail = "2 lost blocks of 6 came back" if same else "lost blocks came back with other bytes"
    return Check(name="erasure coding", ok=same, detail=detail)


def check_store(store: Store) -> list[Check]:
    """Write, read, create, list and delete under a folder of our own. StoreError where the store refuses."""
    prefix = f"{_FOLDER}/{secrets.token_hex(8)}"
    keys = [f"{prefix}/written", f"{prefix}/created"]
    try:
        checks = [_write_and_read(store, keys[0]), _create_once(store, keys[1]), _list(store, prefix, keys)]
        if isinstance(store, PosixStore):
            checks.append(_direct_io(store, keys[0]))
    finally:
        with contextlib.suppress(CheckpointError):  # the error that brought us here is the one to report
            store.delete(keys)
    gone = not store.list(f"{prefix}/")
    checks.append(
        Check(name="delete", ok=gone, detail="removed what was written" if gone else f"{prefix} is still there")
    )
    return checks


def _write_and_read(store: Store, key: str) -> Check:
    data = np.random.default_rng(0).bytes(_PROBE_BYTES)
    start = time.perf_counter()
    writer = store.open_writer(key, nbytes=len(data))
    try:
        writer.write(memoryview(data))
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    written = time.perf_counter() - start
    start = time.perf_counter()
    same = store.read(key) == data
    took = f"{_PROBE_BYTES >> 20} MiB durable in {written * 1000:.0f} ms, read in {(time.perf_counter() - start) * 1000:.0f} ms"
    return Check(name="durable write", ok=same, detail=took if same else "read other bytes than were written")


def _create_once(store: Store, key: str) -> Check:
    """Whether a second creation is refused, which is what keeps two writers of one step apart."""
    conditional = store.conditional_create
    store.create(key, b"first")
    try:
        store.create(key, b"second")
        refused = False
    except AlreadyExistsError:
        refused = True
    kept = store.read(key) == b"first"
    if conditional:
        ok, detail = (
            refused and kept,
            "atomic" if refused and kept else "said to be atomic, but a second create was not refused",
        )
    else:
        ok, detail = True, "not atomic here: two writers of one step are kept apart by claims"
    return Check(name="conditional create", ok=ok, detail=detail)


def _list(store: Store, prefix: str, keys: list[str]) -> Check:
    found = [entry.key for entry in store.list(f"{prefix}/")]
    ok = found == sorted(keys)
    return Check(name="list", ok=ok, detail=f"{len(found)} of {len(keys)} found")


def _direct_io(store: PosixStore, key: str) -> Check:
    """Whether the file system lets us go around the page cache; a help for speed only."""
    if not hasattr(os, "O_DIRECT"):
        return Check(name="direct I/O", ok=True, detail="not on this platform; writes go through the page cache")
    path = os.path.join(os.path.abspath(store.url), key)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        return Check(
            name="direct I/O", ok=True, detail=f"not here ({error.strerror}); writes go through the page cache"
        )
    return Check(name="direct I/O", ok=True, detail="available")
