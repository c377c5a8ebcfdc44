"""A small save on opaque bytes, stores to run it on, and a clock that only moves when somebody sleeps."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt.commit import names
from ckpt.commit.publish import publish, refuse_existing
from ckpt.commit.receipts import collect_receipts, leave_receipt
from ckpt.config import Options
from ckpt.store.base import Store
from ckpt.store.open import open_store
from tests.fixtures_s3 import moto_s3, rclone_s3  # noqa: F401
from tests.servers import S3Server

OPTIONS = Options(store_attempts=3, connect_timeout_s=2.0, read_timeout_s=5.0, poll_start_s=0.001, poll_max_s=0.02)
WORLD = 2
OpenStore = Callable[[], Store]


class StepClock:
    """Time that passes in `sleep` only."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.slept_s.append(pause_s)
        self.now_s += pause_s


def manifest_of(attempt: str, step: int) -> bytes:
    """What stands for a manifest here."""
    return json.dumps({"attempt": attempt, "step": step}).encode()


def data_of(attempt: str, rank: int) -> bytes:
    """What stands for an image: it says whose it is, so that a mix of attempts is seen."""
    return f"image of {attempt} rank {rank} ".encode() * 50


def save(store: Store, step: int, attempt: str, *, options: Options = OPTIONS) -> None:
    """Steps 1 to 6 of a save by one process that plays all ranks."""
    refuse_existing(store, step)
    for rank in range(WORLD):
        writer = store.open_writer(f"{names.attempt_folder(step, attempt)}/{names.image_name(rank, WORLD)}")
        writer.write(memoryview(data_of(attempt, rank)))
        writer.commit()
        leave_receipt(store, step, attempt, rank, WORLD, f"receipt {rank}".encode())
    collect_receipts(store, step, attempt, WORLD, timeout_s=5.0, options=options)
    store.put(f"{names.attempt_folder(step, attempt)}/tensors.parquet", f"index of {attempt}".encode())
    publish(store, step, attempt, manifest_of(attempt, step), options=options)


def check_complete(store: Store, step: int) -> str:
    """The attempt of a complete step, after a look at every byte of it."""
    attempt = str(json.loads(store.read(names.manifest_key(step)))["attempt"])
    folder = names.attempt_folder(step, attempt)
    for rank in range(WORLD):
        assert store.read(f"{folder}/{names.image_name(rank, WORLD)}") == data_of(attempt, rank)
    assert store.read(f"{folder}/tensors.parquet") == f"index of {attempt}".encode()
    return attempt


@pytest.fixture
def posix_open(tmp_path: Path) -> OpenStore:
    """Opens the same fresh local folder again and again."""
    return lambda: open_store(tmp_path / "run", options=OPTIONS)


@pytest.fixture(params=["posix", "rclone", "moto"])
def any_open(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """The same, on a local folder and on both S3 servers."""
    if request.param == "posix":
        return lambda: open_store(tmp_path / "run", options=OPTIONS)
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    url = server.url(f"run-{uuid.uuid4().hex}")
    return lambda: open_store(url, options=OPTIONS, storage_options=server.storage_options)


@pytest.fixture
def weak_open() -> OpenStore:
    """A store without conditional creation, in memory."""
    url = f"memory://ckpt-{uuid.uuid4().hex}"
    return lambda: open_store(url, options=OPTIONS)
