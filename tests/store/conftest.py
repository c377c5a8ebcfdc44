"""One fixture, `place`, that is every kind of store in turn, each with a back door that shares no code with it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from ckpt.config import MIB, Options
from ckpt.store.base import Store
from ckpt.store.open import open_store
from tests.fixtures_s3 import moto_s3, rclone_s3  # noqa: F401
from tests.servers import BUCKET, S3Server

OPTIONS = Options(part_bytes=5 * MIB, chunk_bytes=1 * MIB, store_attempts=2, connect_timeout_s=2.0, read_timeout_s=5.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A fresh, empty store, and ways around it."""

    kind: str
    open: Callable[[], Store]  # one more store object on the same place
    store: Store
    backdoor_put: Callable[[str, bytes], None]
    backdoor_get: Callable[[str], bytes]


@pytest.fixture(params=["posix", "memory", "rclone", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of store, empty."""
    made = _MAKERS[request.param](request, tmp_path)
    yield made
    made.store.close()


def _posix(_request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = tmp_path / "run"

    def put(key: str, data: bytes) -> None:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)

    def open_one() -> Store:
        return open_store(root, options=OPTIONS)

    return Place(
        kind="posix",
        open=open_one,
        store=open_one(),
        backdoor_put=put,
        backdoor_get=lambda key: (root / key).read_bytes(),
    )


def _memory(_request: pytest.FixtureRequest, _tmp_path: Path) -> Place:
    root = f"/ckpt-{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")

    def open_one() -> Store:
        return open_store(f"memory:/{root}", options=OPTIONS)

    return Place(
        kind="memory",
        open=open_one,
        store=open_one(),
        backdoor_put=lambda key, data: memory.pipe_file(f"{root}/{key}", data),
        backdoor_get=lambda key: memory.cat_file(f"{root}/{key}"),
    )


def _s3(request: pytest.FixtureRequest, _tmp_path: Path) -> Place:
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    prefix = f"run-{uuid.uuid4().hex}"

    def open_one() -> Store:
        return open_store(server.url(prefix), options=OPTIONS, storage_options=server.storage_options)

    assert server.url(prefix) == f"s3://{BUCKET}/{prefix}"
    return Place(
        kind=request.param,
        open=open_one,
        store=open_one(),
        backdoor_put=lambda key, data: server.backdoor_put(f"{prefix}/{key}", data),
        backdoor_get=lambda key: server.backdoor_get(f"{prefix}/{key}"),
    )


_MAKERS = {"posix": _posix, "memory": _memory, "rclone": _s3, "moto": _s3}
