"""Goal: what the local store reports as written is durable, and nothing planted in the folder leads it astray.

Method: planted links and devices, injected errors of each system call, real full and read-only file systems, a trace of
the order of syncs.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.config import MIB, Options
from ckpt.errors import AlreadyExistsError, DamagedError, InvalidInputError, StoreError
from ckpt.kernels import choice
from ckpt.store.posix import PosixStore

OPTIONS = Options(chunk_bytes=64 * 1024)
DATA = np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8).tobytes()


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    """A store on a folder that does not exist yet."""
    return PosixStore(tmp_path / "deep" / "run", options=OPTIONS)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# ---- durability


def _trace(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Record sync, link, rename and mkdir calls, with the paths that they act on."""
    events: list[str] = []

    def path_of(fd: int | None) -> str:
        return "?" if fd is None else os.readlink(f"/proc/self/fd/{fd}").replace(str(root), "").lstrip("/") or "."

    def wrap(name: str, describe: Callable[..., str]) -> None:
        real = getattr(os, name)

        def traced(*arguments: Any, **named: Any) -> Any:
            events.append(f"{name} {describe(*arguments, **named)}")
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, traced)

    wrap("fsync", lambda fd: "folder " + path_of(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
    wrap("link", lambda source, target, **named: f"{path_of(named['dst_dir_fd'])}/{target}")
    wrap("rename", lambda source, target, **named: f"{path_of(named['dst_dir_fd'])}/{target}")
    wrap("mkdir", lambda name, **named: f"{path_of(named.get('dir_fd'))}/{name}".replace(str(root), "").lstrip("?/"))
    return events


def write_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers call os.pwrite, where a test can step in. The native writer has the same tests in native/tests."""
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, choice.REFERENCE)


@pytest.mark.parametrize(("method", "publish"), [("put", "rename"), ("create", "link")])
def test_small_objects_are_synced_before_and_their_folders_after_they_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, publish: str
) -> None:
    events = _trace(monkeypatch, tmp_path)
    store = PosixStore(tmp_path, options=OPTIONS)
    getattr(store, method)("step/manifest.json", b"data")
    assert events == ["mkdir ./step", "fsync file", "fsync folder .", f"{publish} step/manifest.json",
                      "fsync folder step"]  # fmt: skip


def test_a_writer_syncs_the_file_and_then_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = _trace(monkeypatch, tmp_path)
    writer = PosixStore(tmp_path, options=OPTIONS).open_writer("step/attempt/image")
    writer.write(memoryview(DATA))
    assert events == ["mkdir ./step", "mkdir step/attempt"]
    writer.commit()
    assert events[2:] == ["fsync file", "fsync folder .", "fsync folder step", "fsync folder step/attempt"]


def test_every_new_level_above_the_root_is_synced_in_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _trace(monkeypatch, tmp_path)
    PosixStore(tmp_path / "a" / "b", options=OPTIONS).put("x", b"")
    assert events[:4] == ["mkdir a", "fsync folder .", "mkdir a/b", "fsync folder a"]


@pytest.mark.parametrize("failing", ["file", "folder"])
@pytest.mark.parametrize("method", ["put", "create", "writer"])
def test_a_failed_sync_fails_the_write_and_is_never_repeated(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch, failing: str, method: str, tmp_path: Path
) -> None:
    store.put("step/first", b"")  # so that the folders are there and synced
    real_fsync, calls = os.fsync, []

    def fsync(fd: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        calls.append(kind)
        if kind == failing:
            raise OSError(errno.EIO, "injected")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="step/new") as caught:
        if method == "writer":
            writer = store.open_writer("step/new")
            writer.write(memoryview(DATA))
            writer.commit()
        else:
            getattr(store, method)("step/new", b"data")
    assert caught.value.kind == "io"
    assert calls.count(failing) == 1
    if failing == "file":
        assert files_below(tmp_path) == ["deep/run/step/first"]


def test_a_writer_that_failed_once_keeps_failing(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = store.open_writer("image")
    write_by_python(monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda *_: _raise(OSError(errno.EIO, "injected")))
    for _ in range(2):
        with pytest.raises(StoreError):
            writer.write(memoryview(DATA))
    monkeypatch.undo()
    with pytest.raises(StoreError):
        writer.commit()
    writer.abort()
    assert not store.exists("image")


# ---- writing


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 150_000), max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 3]),
)
def test_any_sequence_of_writes_gives_the_same_bytes_direct_or_not(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    aligned: bool,
    direct: bool,
    offset: int,
    in_flight: int,
) -> None:
    options = Options(chunk_bytes=64 * 1024, direct_io=direct, write_in_flight=in_flight, write_slice_bytes=8 * 1024)
    store = PosixStore(tmp_path_factory.mktemp("direct"), options=options)
    writer = store.open_writer("image")
    expected = b""
    with contextlib.closing(mmap.mmap(-1, 160_000)) as pages:
        for size in sizes:
            part = DATA[len(expected) : len(expected) + size]
            start = 0 if aligned else offset
            pages[start : start + len(part)] = part
            with memoryview(pages) as view, view[start : start + len(part)] as window:
                writer.write(window)
            expected += part
    writer.commit()
    assert store.read("image") == expected


def test_direct_io_is_used_where_the_file_system_has_it_and_says_so(tmp_path: Path) -> None:
    store = PosixStore(tmp_path, options=OPTIONS)
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    os.close(probe)
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_DIRECT))
        expected = True
    except OSError:
        expected = False
    writer = store.open_writer("image", nbytes=len(DATA))
    writer.write(memoryview(DATA))
    assert writer.direct == expected
    writer.commit()
    assert store.read("image") == DATA


def test_small_images_are_written_through_the_page_cache(store: PosixStore) -> None:
    writer = store.open_writer("image", nbytes=100)
    assert not writer.direct
    writer.abort()


@pytest.mark.parametrize("when", ["open", "first write", "third write"])
def test_direct_io_that_is_refused_falls_back_with_the_same_bytes(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real_open, real_pwrite, calls = os.open, os.pwrite, []

    def refusing_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and when == "open":
            os.close(real_open(path, flags & ~os.O_DIRECT, *rest, **named))  # Linux makes the file and then refuses
            raise OSError(errno.EINVAL, "injected")
        return real_open(path, flags, *rest, **named)

    def refusing_pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == {"first write": 1, "third write": 3}.get(when, 0):
            raise OSError(errno.EINVAL, "injected")
        return real_pwrite(fd, data, offset)

    write_by_python(monkeypatch)
    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "pwrite", refusing_pwrite)
    writer = store.open_writer("image")
    for start in range(0, len(DATA), 70_001):
        writer.write(memoryview(DATA)[start : start + 70_001])
    writer.commit()
    assert not writer.direct
    assert store.read("image") == DATA


@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_continued(store: PosixStore, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    real_pwrite, real_write = os.pwrite, os.write
    write_by_python(monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_pwrite(fd, data[: max(1, len(data) // 2)], offset))
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:7]))
    writer = store.open_writer("image", nbytes=None if direct else 1)
    writer.write(memoryview(DATA))
    writer.commit()
    store.put("small", DATA[:100])
    assert (store.read("image"), store.read("small")) == (DATA, DATA[:100])


def test_short_reads_are_continued(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("small", DATA[:1000])
    real_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real_preadv(fd, [views[0][:13]], offset))
    assert store.read("small", 5, 905) == DATA[5:905]


def test_a_file_that_shrinks_while_it_is_read_is_truncated(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("small", DATA[:1000])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(DamagedError, match="truncated"):
        store.read("small")


def test_umask_is_respected(store: PosixStore, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        store.put("x", b"")
        store.create("y", b"")
        store.open_writer("z").commit()
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "run").iterdir()}
    assert modes == {"x": 0o640, "y": 0o640, "z": 0o640}


def test_file_systems_without_hard_links_still_create_once(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_, **__: _raise(OSError(errno.EPERM, "no links here")))
    store.create("m", b"mine")
    with pytest.raises(AlreadyExistsError):
        store.create("m", b"theirs")
    assert store.read("m") == b"mine"
    assert [entry.key for entry in store.list("")] == ["m"]


def test_a_folder_pruned_by_another_process_is_made_again(store: PosixStore, tmp_path: Path) -> None:
    stop = threading.Event()
    root = tmp_path / "deep" / "run"

    def prune() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                os.rmdir(root / "claims")
            time.sleep(0.001)

    thread = threading.Thread(target=prune)
    thread.start()
    try:
        for number in range(100):
            store.put(f"claims/{number}", b"x")
            assert store.read(f"claims/{number}") == b"x"
            store.delete([f"claims/{number}"])
    finally:
        stop.set()
        thread.join()


def test_delete_takes_empty_folders_along_but_not_the_root(store: PosixStore, tmp_path: Path) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete(["a/b/c"])
    assert files_below(tmp_path) == ["deep/run/a/d"]
    assert not (tmp_path / "deep" / "run" / "a" / "b").exists()
    store.delete(["a/d"])
    assert list((tmp_path / "deep" / "run").iterdir()) == []


# ---- planted things


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that must be neither read, nor written, nor deleted through the store."""
    path = tmp_path / "outside"
    path.write_bytes(b"secret")
    return path


def test_links_are_never_followed_to_read(store: PosixStore, outside: Path, tmp_path: Path) -> None:
    store.put("x/y", b"")
    (tmp_path / "deep" / "run" / "link").symlink_to(outside)
    (tmp_path / "deep" / "run" / "folder").symlink_to(tmp_path)
    for key in ("link", "folder/outside"):
        for call in (store.read, store.size, lambda key: store.read_into(key, 0, memoryview(bytearray(1)))):
            with pytest.raises(DamagedError) as caught:
                call(key)
            assert caught.value.kind == "not-a-file"
        assert not store.exists(key)
    assert [entry.key for entry in store.list("")] == ["x/y"]
    assert store.list_folders("") == ["x"]


def test_links_are_never_followed_to_write_or_delete(store: PosixStore, outside: Path, tmp_path: Path) -> None:
    store.put("x", b"")
    root = tmp_path / "deep" / "run"
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "new")
    (root / "folder").symlink_to(tmp_path)
    for key in ("link", "dangling"):
        with pytest.raises(AlreadyExistsError):
            store.open_writer(key)
        with pytest.raises(DamagedError):
            store.create(key, b"planted")
    for call in (
        lambda: store.put("folder/outside", b"planted"),
        lambda: store.create("folder/new", b"planted"),
        lambda: store.open_writer("folder/new"),
        lambda: store.delete(["folder/outside"]),
    ):
        with pytest.raises(DamagedError):
            call()
    store.put("link", b"replaces the link, not what it points to")
    assert outside.read_bytes() == b"secret"
    assert not (tmp_path / "new").exists()


def test_a_fifo_neither_blocks_nor_passes_for_data(store: PosixStore, tmp_path: Path) -> None:
    store.put("x", b"")
    os.mkfifo(tmp_path / "deep" / "run" / "pipe")
    with pytest.raises(DamagedError, match="not a regular file"):
        store.read("pipe")
    assert [entry.key for entry in store.list("")] == ["x"]


def test_unfinished_files_are_no_objects(store: PosixStore, tmp_path: Path) -> None:
    store.put("x", b"")
    (tmp_path / "deep" / "run" / ".tmp-0123").write_bytes(b"half")
    assert [entry.key for entry in store.list("")] == ["x"]
    with pytest.raises(InvalidInputError):
        store.read(".tmp-0123")


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = PosixStore(tmp_path / "file", options=OPTIONS)
    assert store.list("") == []
    with pytest.raises(InvalidInputError, match="is a file"):
        store.put("x", b"")


# ---- no space, no permission


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """A file system mounted on `folder`; skips, and says why, where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        store = PosixStore(tmp_path / "small", options=OPTIONS)
        store.put("old", b"kept")
        writer = store.open_writer("image")
        with pytest.raises(StoreError, match="image") as caught:
            for _ in range(20):
                writer.write(memoryview(DATA))
            writer.commit()
        assert caught.value.kind == "full"
        with pytest.raises(StoreError) as caught:
            store.put("big", DATA * 4)
        assert caught.value.kind == "full"
        assert [entry.key for entry in store.list("")] == ["old"]
        assert files_below(tmp_path / "small") == ["old"]
        assert store.read("old") == b"kept"


def test_an_image_that_cannot_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        store = PosixStore(tmp_path / "small", options=OPTIONS)
        with pytest.raises(StoreError, match=f"{100 * MIB} bytes wanted") as caught:
            store.open_writer("image", nbytes=100 * MIB)
        assert caught.value.kind == "full"
        assert files_below(tmp_path / "small") == []


def test_the_file_size_limit_is_reported_as_full(store: PosixStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        writer = store.open_writer("image")
        with pytest.raises(StoreError) as caught:
            writer.write(memoryview(DATA))
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.kind == "full"
    assert store.list("") == []


def test_a_read_only_file_system_is_reported_as_denied(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        store = PosixStore(tmp_path / "fixed", options=OPTIONS)
        for call in (lambda: store.put("a/x", b""), lambda: store.create("x", b""), lambda: store.open_writer("x")):
            with pytest.raises(StoreError, match="permissions and mount options") as caught:
                call()
            assert caught.value.kind == "denied"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EACCES, "denied"), (errno.EPERM, "denied"), (errno.EROFS, "denied"), (errno.ENOSPC, "full"),
     (errno.EDQUOT, "full"), (errno.EFBIG, "full"), (errno.EIO, "io"), (errno.ESTALE, "unreachable")],
)  # fmt: skip
def test_errors_of_the_system_get_their_kind(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    store.put("x", b"")
    write_by_python(monkeypatch)
    monkeypatch.setattr(os, "write", lambda *_: _raise(OSError(code, os.strerror(code))))
    monkeypatch.setattr(os, "pwrite", lambda *_: _raise(OSError(code, os.strerror(code))))
    for call in (
        lambda: store.put("y", b"1"),
        lambda: store.create("y", b"1"),
        lambda: store.open_writer("y", nbytes=1).write(memoryview(DATA)),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.kind == kind
    assert [entry.key for entry in store.list("")] == ["x"]


def test_no_permission_for_a_common_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (tmp_path / "locked").mkdir(mode=0o700)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from ckpt.config import Options; from ckpt.store.posix import PosixStore; from ckpt.errors import StoreError\n"
        "store = PosixStore(sys.argv[1], options=Options())\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: store.put('x', b'')\n"
        "except StoreError as error: sys.exit(7 if error.kind == 'denied' else 8)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "locked"), root], check=False, timeout=60)
    assert done.returncode == 7


def test_no_descriptor_is_left_open(store: PosixStore, tmp_path: Path) -> None:
    store.put("x", b"")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store.put("y", b"1")
        store.read("y")
        store.list("")
        writer = store.open_writer(f"z{number}")
        writer.write(memoryview(DATA))
        writer.abort() if number % 2 else writer.commit()
        with contextlib.suppress(AlreadyExistsError, DamagedError):
            store.create("x", b"2")
            store.read("x", 0, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def _raise(error: Exception) -> Any:
    raise error
