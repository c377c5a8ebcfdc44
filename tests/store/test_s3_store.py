"""Goal: an S3 store resolves what the network leaves open, within limits.

Method: real servers, answers lost on purpose, wrong credentials, servers that are not there, forked children.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import botocore.exceptions
import pytest

from ckpt.config import MIB, Options
from ckpt.errors import AlreadyExistsError, CheckpointError, InvalidInputError, NotFoundError, StoreError
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.s3 import S3Store
from ckpt.store.s3_upload import PARTS_MAX, part_size
from tests.servers import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.store.conftest import OPTIONS

QUICK = Options(part_bytes=5 * MIB, store_attempts=2, connect_timeout_s=1.0, read_timeout_s=1.0)


def open_at(server: S3Server, *, options: Options = OPTIONS, url: str | None = None, **changes: Any) -> S3Store:
    """A store in a fresh folder of the server's bucket."""
    url = url or server.url(f"run-{uuid.uuid4().hex}")
    store = open_store(url, options=options, storage_options={**server.storage_options, **changes})
    assert isinstance(store, S3Store)
    return store


class Interceptor:
    """Stands between a store and its requests: `faults` maps a method to what happens at its next calls."""

    def __init__(self, store: S3Store, **faults: list[Any]) -> None:
        self.calls: list[str] = []
        self._faults = faults
        self._call: Callable[..., Any] = store._call
        store._call = self  # type: ignore[method-assign, assignment]

    async def __call__(self, method: str, **arguments: Any) -> Any:
        self.calls.append(method)
        script = self._faults.get(method, [])
        fault = script.pop(0) if script else None
        if fault == "timeout":
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="http://here")
        if isinstance(fault, BaseException):
            raise fault
        answer = await self._call(method, **arguments)
        if fault == "lost":
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="http://here")
        if fault == "412 to our own":
            raise refusal("PreconditionFailed", 412)
        return answer


def refusal(code: str, status: int) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")  # type: ignore[arg-type]


# ---- creating once


@pytest.mark.parametrize("fault", ["lost", "412 to our own"])
def test_a_create_whose_answer_was_lost_is_won_after_reading_back(moto_s3: S3Server, fault: str) -> None:
    store = open_at(moto_s3)
    assert store.conditional_create
    Interceptor(store, put_object=[fault])
    store.create("m.json", b"mine")
    assert store.read("m.json") == b"mine"


def test_a_create_whose_answer_was_lost_while_another_won_is_lost(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    assert store.conditional_create
    open_at(moto_s3, url=store.url).create("m.json", b"theirs")
    Interceptor(store, put_object=["timeout"])
    with pytest.raises(AlreadyExistsError):
        store.create("m.json", b"mine")


@pytest.mark.parametrize("fault", ["timeout", refusal("ConditionalRequestConflict", 409), refusal("SlowDown", 503)])
def test_a_create_that_did_not_land_is_tried_again(moto_s3: S3Server, fault: Any) -> None:
    store = open_at(moto_s3)
    assert store.conditional_create
    seen = Interceptor(store, put_object=[fault])
    store.create("m.json", b"mine")
    assert seen.calls.count("put_object") == 2
    assert store.read("m.json") == b"mine"


def test_endless_conflicts_end_at_the_limit_of_attempts(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    assert store.conditional_create
    seen = Interceptor(store, put_object=[refusal("ConditionalRequestConflict", 409)] * 50)
    with pytest.raises(AlreadyExistsError):
        store.create("m.json", b"mine")
    assert seen.calls.count("put_object") == OPTIONS.store_attempts


@pytest.mark.parametrize(("code", "status"), [("NotImplemented", 501)])
def test_a_server_that_refuses_conditions_is_one_without_them(moto_s3: S3Server, code: str, status: int) -> None:
    store = open_at(moto_s3)
    Interceptor(store, put_object=[refusal(code, status)])
    assert store.conditional_create is False


def test_the_probe_is_made_once(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    seen = Interceptor(store)
    assert [store.conditional_create for _ in range(3)] == [True] * 3
    assert seen.calls.count("put_object") == 2


# ---- uploads


def test_a_failed_part_fails_the_writer_and_abort_leaves_nothing_open(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    Interceptor(store, upload_part=[None, refusal("AccessDenied", 403)])
    writer = store.open_writer("image")
    with pytest.raises(StoreError) as caught:
        for _ in range(4):
            writer.write(memoryview(bytes(5 * MIB)))
        writer.commit()
    assert caught.value.kind == "denied"
    writer.abort()
    assert not store.exists("image")
    uploads = moto_s3.backdoor.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [upload for upload in uploads if upload["Key"].startswith(store.url.removeprefix(f"s3://{BUCKET}/"))] == []


def test_a_lost_answer_to_the_end_of_an_upload_is_resolved_by_looking(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    Interceptor(store, complete_multipart_upload=["lost"])
    writer = store.open_writer("image")
    writer.write(memoryview(bytes(11 * MIB)))
    writer.commit()
    assert store.size("image") == 11 * MIB


def test_no_more_parts_are_in_memory_than_there_are_slots(moto_s3: S3Server) -> None:
    store = open_at(moto_s3, options=Options(part_bytes=5 * MIB, store_threads=2, store_attempts=2))
    now, most, lock = 0, 0, threading.Lock()
    real = store._call

    async def slow(method: str, **arguments: Any) -> Any:
        nonlocal now, most
        if method != "upload_part":
            return await real(method, **arguments)
        with lock:
            now += 1
            most = max(most, now)
        await asyncio.sleep(0.05)
        try:
            return await real(method, **arguments)
        finally:
            with lock:
                now -= 1

    store._call = slow  # type: ignore[method-assign, assignment]
    writers = [store.open_writer(f"image{number}") for number in range(2)]
    data = os.urandom(22 * MIB)
    threads = [threading.Thread(target=lambda w=w: (w.write(memoryview(data)), w.commit())) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    assert store.read("image1") == data


@pytest.mark.parametrize("server", ["moto_s3", "rclone_s3"])
def test_memory_that_lasts_is_sent_as_parts_without_a_copy(server: str, request: pytest.FixtureRequest) -> None:
    store = open_at(request.getfixturevalue(server), options=QUICK)
    data = os.urandom(5 * MIB)
    image = memoryview(b"".join([data, data, data[: 3 * MIB]]))
    writer = store.open_writer("image", nbytes=len(image))
    for start in range(0, len(image), 7 * MIB):
        writer.write_lasting(image[start : start + 7 * MIB])  # type: ignore[attr-defined]
    writer.commit()
    assert store.read("image") == bytes(image)


@pytest.mark.parametrize("nbytes", [None, 0, 1, 5 * MIB, 10**11, 5 * 10**12])
def test_parts_keep_within_the_limits_of_s3(nbytes: int | None) -> None:
    size = part_size(nbytes, 16 * MIB)
    assert size >= 16 * MIB
    assert nbytes is None or -(-nbytes // size) <= PARTS_MAX


def test_sweep_aborts_open_uploads_of_its_own_prefix_only(moto_s3: S3Server) -> None:
    mine, theirs = open_at(moto_s3), open_at(moto_s3)
    writers = [store.open_writer("step/image") for store in (mine, theirs)]
    for writer in writers:
        writer.write(memoryview(bytes(6 * MIB)))
    assert mine.sweep("step/", older_than_s=0.0) == 1
    assert mine.sweep("step/", older_than_s=0.0) == 0
    writers[1].commit()
    assert theirs.size("step/image") == 6 * MIB
    writers[0].abort()


def test_sweep_on_a_server_that_lists_no_uploads_finds_none(rclone_s3: S3Server) -> None:
    assert open_at(rclone_s3).sweep("step/", older_than_s=0.0) == 0


# ---- reading


def test_a_body_that_breaks_off_is_asked_for_again(rclone_s3: S3Server) -> None:
    store = open_at(rclone_s3)
    store.put("x", b"0123456789")
    real, left = store._call, [2]

    class Broken:
        async def __aenter__(self) -> Broken:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def read(self) -> bytes:
            return b"01"

    async def breaking(method: str, **arguments: Any) -> Any:
        answer = await real(method, **arguments)
        if method == "get_object" and left[0] > 1:
            left[0] -= 1
            answer["Body"].close()
            answer["Body"] = Broken()
        return answer

    store._call = breaking  # type: ignore[method-assign, assignment]
    assert store.read("x") == b"0123456789"
    left[0] = 50
    with pytest.raises(StoreError, match="2 of 10 bytes came") as caught:
        store.read("x")
    assert caught.value.kind == "unreachable"


# ---- refusals


@pytest.mark.parametrize(
    "changes", [{"key": "nobody", "secret": "wrong-secret"}, {"key": ACCESS_KEY, "secret": "wrong-secret"}]
)
def test_wrong_credentials_are_denied_with_a_hint_and_without_the_secret(
    rclone_s3: S3Server, changes: dict[str, str]
) -> None:
    store = open_at(rclone_s3, **changes)
    for call in every_call(store):
        with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert caught.value.kind == "denied"
        assert "wrong-secret" not in str(caught.value) and SECRET_KEY not in str(caught.value)


def test_no_credentials_at_all_are_denied(monkeypatch: pytest.MonkeyPatch, rclone_s3: S3Server, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = open_store("s3://bucket/x", options=QUICK, storage_options={"endpoint_url": rclone_s3.endpoint_url})
    with pytest.raises(StoreError) as caught:
        store.list("")
    assert caught.value.kind == "denied"


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch, rclone_s3: S3Server) -> None:
    for name, value in rclone_s3.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(rclone_s3.url("env"), options=OPTIONS)
    store.put("x", b"1")
    assert rclone_s3.backdoor_get("env/x") == b"1"


def test_a_bucket_that_is_not_there_is_named(moto_s3: S3Server) -> None:
    store = open_at(moto_s3, url="s3://no-such-bucket/run")
    for call in (lambda: store.put("x", b""), lambda: store.list("")):
        with pytest.raises(StoreError, match="no such bucket") as caught:
            call()
        assert caught.value.kind == "no-bucket"


def test_a_server_that_is_not_there_is_unreachable_in_bounded_time() -> None:
    access = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}
    store = open_store("s3://bucket/run", options=QUICK, storage_options=access)
    for call in every_call(store):
        start_s = time.monotonic()
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as caught:
            call()
        assert caught.value.kind == "unreachable"
        assert time.monotonic() - start_s < 10.0


def test_a_server_that_accepts_and_never_answers_is_unreachable_in_bounded_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        access = {"endpoint_url": f"http://127.0.0.1:{listener.getsockname()[1]}", "key": "k", "secret": "s"}
        store = open_store("s3://bucket/run", options=QUICK, storage_options=access)
        start_s = time.monotonic()
        with pytest.raises(StoreError) as caught:
            store.put("x", b"1")
        assert caught.value.kind == "unreachable"
        assert time.monotonic() - start_s < 15.0


def test_an_endpoint_that_is_no_url_is_the_callers_mistake() -> None:
    access = {"endpoint_url": "localhost-without-scheme", "key": "k", "secret": "s"}
    store = open_store("s3://bucket/run", options=QUICK, storage_options=access)
    with pytest.raises(InvalidInputError, match="AWS_ENDPOINT_URL"):
        store.list("")


def every_call(store: Store) -> list[Callable[[], Any]]:
    return [
        lambda: store.read("x"),
        lambda: store.read_into("x", 0, memoryview(bytearray(2))),
        lambda: store.exists("x"),
        lambda: store.list(""),
        lambda: store.put("x", b""),
        lambda: store.open_writer("x"),
    ]


# ---- processes


def test_a_forked_child_uses_connections_of_its_own(rclone_s3: S3Server) -> None:
    store = open_at(rclone_s3)
    store.put("parent", b"1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store.put("child", store.read("parent"))
            code = 0
        finally:
            os._exit(code)
    deadline_s = time.monotonic() + 30
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    if done == (0, 0):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert done == (pid, 0)
    assert store.read("child") == b"1"
    store.put("parent", b"2")


def test_bodies_are_files_because_aiohttp_warns_about_large_bytes(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    bodies: list[type] = []
    real = store._call

    async def looking(method: str, **arguments: Any) -> Any:
        bodies.append(type(arguments.get("Body")))
        return await real(method, **arguments)

    store._call = looking  # type: ignore[method-assign, assignment]
    store.put("index", bytes(3 * MIB))
    assert bodies == [io.BytesIO]


def test_absent_keys_and_lost_uploads_are_told_apart_from_refusals(moto_s3: S3Server) -> None:
    store = open_at(moto_s3)
    with pytest.raises(NotFoundError):
        store.request("x", "abort", "abort_multipart_upload", UploadId="no-such-upload")
    with pytest.raises(CheckpointError):
        store.request("x", "tag", "get_object_tagging")
