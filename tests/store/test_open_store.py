"""Goal: what the user writes opens that very store or is refused clearly. Method: tables of right and wrong names."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.config import Options
from ckpt.errors import InvalidInputError
from ckpt.store.fsspec import FsspecStore
from ckpt.store.open import open_store
from ckpt.store.posix import PosixStore
from ckpt.store.s3 import S3Store

OPTIONS = Options()


@pytest.mark.parametrize(
    ("url", "kind"),
    [("runs/gpt", PosixStore), ("/tmp/x", PosixStore), ("./s3:x", PosixStore), ("a/b:c", PosixStore),
     ("step:1", PosixStore), (Path("runs/gpt"), PosixStore), ("file:///tmp/x", PosixStore),
     ("s3://bucket/run", S3Store), ("S3://bucket", S3Store), ("s3a://bucket/x/", S3Store),
     ("memory://run", FsspecStore)],
)  # fmt: skip
def test_names_open_the_store_they_name(url: str | Path, kind: type) -> None:
    store = open_store(url, options=OPTIONS)
    assert type(store) is kind
    store.close()


def test_opening_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs/gpt", options=OPTIONS)
    assert (store.list(""), store.list_folders(""), store.exists("x")) == ([], [], False)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = open_store("run", options=OPTIONS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("x", b"1")
    assert (tmp_path / "run" / "x").read_bytes() == b"1"
    assert store.url == "run"


@pytest.mark.parametrize(
    "url",
    ["s3:/bucket/run", "s3:bucket/run", "S3:/bucket", "s3:///run", "s3://", "s3://bucket//run", "s3://bucket/../x",
     Path("s3://bucket/run"), Path("gs://bucket/run"), "nfs:/host/run", "foo://bucket/run", "ttps://x", "file://run",
     "", "  ", "a\x00b", "simplecache::s3://bucket/x", "memory:/run"],
)  # fmt: skip
def test_mistyped_urls_are_refused_and_make_no_folder(
    url: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError) as caught:
        open_store(url, options=OPTIONS)
    assert caught.value.kind == "bad-url"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["s3://AKIAKEY:hunter2@bucket/run", "ftp://me:hunter2@host/run", "s3://bucket/run?X-Amz-Signature=hunter2"]
)
def test_credentials_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        open_store(url, options=OPTIONS)
    assert "hunter2" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


def test_secrets_of_storage_options_show_nowhere() -> None:
    store = open_store("s3://bucket/run", options=OPTIONS, storage_options={"key": "AKIAKEY", "secret": "hunter2"})
    assert "hunter2" not in f"{store.url} {store!r} {store}"
