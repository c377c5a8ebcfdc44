"""From what the user writes to a store.

In: a path or URL. Out: a `Store`. Never makes a local folder out of a mistyped URL, never keeps or repeats credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ckpt.config import Options
from ckpt.errors import InvalidInputError
from ckpt.store.base import Store
from ckpt.store.posix import PosixStore

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_LOCAL = ("file", "local")
_S3 = ("s3", "s3a")


def open_store(
    url: str | os.PathLike[str], *, options: Options, storage_options: Mapping[str, Any] | None = None
) -> Store:
    """The store at `url`: a local path, `file://`, `s3://bucket/prefix`, or any other URL that fsspec knows.

    Nothing is made and no request sent yet. Endpoint and credentials of S3 come from the usual AWS variables and files,
    or from `storage_options`, which go to the fsspec file system.

    Raises:
        InvalidInputError: `bad-url` for what is neither a path nor a known URL, or holds credentials.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text.strip() or "\x00" in text:
        raise InvalidInputError("a store is named by a path or a URL, found an empty or binary name", kind="bad-url")
    match = _URL.fullmatch(text)
    if match is None:
        _refuse_near_url(text)
        return PosixStore(text, options=options)
    scheme, rest = match[1].lower(), match[2]
    if scheme in _LOCAL:
        if not rest.startswith("/"):
            raise _bad_url(f"{scheme}://{rest}", f"write {scheme}:///absolute/path, or just the path")
        return PosixStore(rest, options=options)
    _refuse_secrets(scheme, rest)
    if scheme in _S3:
        return _open_s3(rest, options, storage_options)
    _refuse_unknown(scheme, text)
    from ckpt.store.fsspec import FsspecStore

    return FsspecStore(text, options=options, storage_options=storage_options)


def _open_s3(rest: str, options: Options, storage_options: Mapping[str, Any] | None) -> Store:
    bucket, _, prefix = rest.rstrip("/").partition("/")
    if not bucket or prefix.startswith("/") or "//" in prefix or any(part in (".", "..") for part in prefix.split("/")):
        raise _bad_url(f"s3://{rest}", "write s3://bucket/folder")
    try:
        from ckpt.store.s3 import S3Store
    except ImportError as error:
        raise InvalidInputError(
            f"s3:// needs a package that is not installed: {error.name}",
            kind="missing-package",
            hints=("pip install 'ckpt[s3]'",),
        ) from error
    return S3Store(f"s3://{rest}", options=options, storage_options=storage_options)


def _refuse_near_url(text: str) -> None:
    """`s3:/bucket`, `s3:bucket` and what `pathlib.Path` makes of a URL are mistakes, not folders named `s3:`."""
    match = _SCHEME.match(text)
    if match is None or "/" in match[1]:
        return
    scheme, rest = match[1].lower(), match[2].lstrip("/")
    if match[2].startswith("/") or _is_known(scheme):
        hint = f"write {scheme}://{rest}; for a folder of that name write ./{text}; do not wrap URLs in pathlib.Path"
        raise _bad_url(text, hint)


def _refuse_secrets(scheme: str, rest: str) -> None:
    if "@" in rest.partition("/")[0]:
        raise InvalidInputError(
            f"the {scheme}:// URL holds credentials, which would end up in logs",
            kind="bad-url",
            hints=("put them into the environment (AWS_ACCESS_KEY_ID, ...), a profile, or storage_options",),
        )
    if "?" in rest or "#" in rest.partition("/")[0]:
        raise InvalidInputError(f"the {scheme}:// URL of a run may not have a query", kind="bad-url")


def _refuse_unknown(scheme: str, text: str) -> None:
    if "::" in text:
        raise _bad_url(text, "chained URLs are not stores: name the store itself")
    if not _is_known(scheme):
        raise _bad_url(text, f"fsspec knows no protocol {scheme!r}; a package may be missing")


def _is_known(scheme: str) -> bool:
    import fsspec

    return scheme in fsspec.available_protocols()


def _bad_url(text: str, hint: str) -> InvalidInputError:
    return InvalidInputError(f"not a path or URL of a store: {text}", kind="bad-url", hints=(hint,))
