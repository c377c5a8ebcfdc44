"""Real S3 servers in processes of their own, on loopback, with credentials: started, checked, stopped.

`rclone serve s3` ignores conditional puts (it answers 200 and overwrites), `moto_server` honours them: what must work
with S3 is run on both. A server is stopped by the process object that started it, and only that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
from botocore.config import Config

ACCESS_KEY = "ckpt-test"
SECRET_KEY = "ckpt-test-secret"
BUCKET = "bucket"
_START_DEADLINE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server with one bucket."""

    name: str
    endpoint_url: str
    process: subprocess.Popen[bytes]
    honours_conditions: bool
    backdoor: Any  # a plain botocore client, which shares no code with the stores

    def url(self, prefix: str) -> str:
        """URL of a run in the bucket."""
        return f"s3://{BUCKET}/{prefix}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """For `open_store(..., storage_options=...)`."""
        return {"endpoint_url": self.endpoint_url, "key": ACCESS_KEY, "secret": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        """For a child process, which then needs no storage options."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def backdoor_put(self, key: str, data: bytes) -> None:
        """Write an object behind the store's back."""
        self.backdoor.put_object(Bucket=BUCKET, Key=key, Body=data)

    def backdoor_get(self, key: str) -> bytes:
        """Read an object behind the store's back."""
        body = self.backdoor.get_object(Bucket=BUCKET, Key=key)["Body"]
        with contextlib.closing(body):
            return bytes(body.read())


def _client(endpoint_url: str) -> Any:
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 3}),
    )


def free_port() -> int:
    """A port of loopback that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """`rclone serve s3` on `folder`. It ignores `If-None-Match`."""
    port = free_port()
    (folder / "data" / BUCKET).mkdir(parents=True)
    command = [
        _program("rclone"), "serve", "s3", str(folder / "data"), "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", str(folder / "none.conf"),
        "--cache-dir", str(folder / "cache"), "--log-level", "ERROR",
    ]  # fmt: skip
    with _running("rclone", command, port, honours_conditions=False, log=folder / "rclone.log") as server:
        yield server


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """`moto_server`. It honours `If-None-Match`, and takes any credentials."""
    port = free_port()
    command = [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _running("moto", command, port, honours_conditions=True, log=folder / "moto.log") as server:
        yield server


def _program(name: str) -> str:
    """The program of this Python environment, else that of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is not installed: pip install 'ckpt[test]'"
    return found


@contextlib.contextmanager
def _running(name: str, command: list[str], port: int, *, honours_conditions: bool, log: Path) -> Iterator[S3Server]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RCLONE_", "AWS_"))}
    with log.open("wb") as output:
        client = _client(f"http://127.0.0.1:{port}")
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            server = S3Server(
                name=name,
                endpoint_url=f"http://127.0.0.1:{port}",
                process=process,
                honours_conditions=honours_conditions,
                backdoor=client,
            )
            _wait_until_up(server, log)
            yield server
        finally:
            client.close()
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)


def _wait_until_up(server: S3Server, log: Path) -> None:
    """Return when the bucket can be listed; the server's own words when it does not come up."""
    deadline_s = time.monotonic() + _START_DEADLINE_S
    while True:
        try:
            names = [bucket["Name"] for bucket in server.backdoor.list_buckets()["Buckets"]]
            if BUCKET not in names:
                server.backdoor.create_bucket(Bucket=BUCKET)
            return
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            if server.process.poll() is not None or time.monotonic() > deadline_s:
                text = log.read_text(errors="replace")
                raise AssertionError(f"{server.name} did not come up: {error}\n{text}") from error
        time.sleep(0.1)
