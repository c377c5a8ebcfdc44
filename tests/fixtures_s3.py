"""Fixtures `rclone_s3` and `moto_s3`: one S3 server of each kind per test session, for any test folder.

Import them in a conftest (`from tests.fixtures_s3 import moto_s3, rclone_s3`), or load this file as a plugin.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import S3Server, moto_server, rclone_server


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that ignores conditional puts and checks credentials."""
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that honours conditional puts and takes any credentials."""
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server
