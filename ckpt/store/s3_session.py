"""One s3fs file system for all stores of a process that are configured alike.

In: options and storage options. Out: an `S3FileSystem` without caches and without retries of its own. Never shared with
a forked child: its event loop and connections stay with the parent.

Making a client costs 0.3 s of a core (botocore reads its service model), so stores share it; it lives as long as the
process, as do the instances in fsspec's own cache, which is not used because its key leaves out the environment.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import botocore.handlers
from s3fs import S3FileSystem

from ckpt.config import Options

_shared: dict[tuple[int, str], S3FileSystem] = {}  # by process id and configuration
_lock = threading.Lock()


class QuietFileSystem(S3FileSystem):  # type: ignore[misc]
    """s3fs without `Expect: 100-continue`.

    With that header aiohttp waits for the server's word without any timeout: a server that accepts connections and then
    hangs would hold a put until our own last limit, instead of being retried after `read_timeout_s`.
    """

    async def set_session(self, refresh: bool = False, kwargs: Mapping[str, Any] | None = None) -> Any:
        client = await super().set_session(refresh=refresh, kwargs=kwargs or {})
        client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        return client


def shared_filesystem(options: Options, storage_options: Mapping[str, Any]) -> S3FileSystem:
    """The file system for this configuration and the `AWS_...` variables of this moment."""
    key = (os.getpid(), _configuration(options, storage_options))
    with _lock:
        if key not in _shared:
            _shared[key] = _make(options, storage_options)
        return _shared[key]


def _configuration(options: Options, storage_options: Mapping[str, Any]) -> str:
    environment = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    given = sorted((name, repr(value)) for name, value in storage_options.items())
    # A digest, so that no credential stands in a key that a debugger or a memory dump would show.
    return hashlib.sha256(repr((options, environment, given)).encode()).hexdigest()


def _make(options: Options, storage_options: Mapping[str, Any]) -> S3FileSystem:
    given = dict(storage_options)
    config = {
        "connect_timeout": options.connect_timeout_s,
        "read_timeout": options.read_timeout_s,
        "retries": {"total_max_attempts": options.store_attempts, "mode": "standard"},
        "max_pool_connections": 2 * options.store_threads,
        # Checksums are ours; many S3 servers refuse the trailing ones that new SDKs send unasked.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **given.pop("config_kwargs", {}),
    }
    fs = QuietFileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, **given)
    fs.retries = 1  # botocore retries already
    return fs


def _forget_parent() -> None:
    """A fork may have copied the lock while another thread held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_parent)
