"""Goal: the log beside a run holds what was told, whatever happens to it, and disturbs nothing of the run.

Method: write through `EventLog` to folders and to an object store in memory, damage the files, read back.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt
from ckpt import config
from ckpt.commit import find, retention
from ckpt.commit.gc import collect_garbage
from ckpt.config import Options
from ckpt.errors import StoreError
from ckpt.events import Events, Timeline
from ckpt.observe import default_sinks
from ckpt.observe.log import EventLog, read_events, read_log
from ckpt.store.base import Store
from ckpt.store.counting import CountingStore
from ckpt.store.open import open_store
from ckpt.store.posix import PosixStore
from tests.observe.synthetic import load_events, run_events, save_events


@pytest.fixture(params=["folder", "object-store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path.name}"
    return open_store(url, options=Options())


def log_of(store: Store, world: int = 2) -> list[EventLog]:
    return [EventLog(store, rank=rank, world=world) for rank in range(world)]


def test_what_was_told_is_read_back(store: Store) -> None:
    told = run_events(2)
    store.put("step-000000000001/manifest.json", b"{}")
    for rank, log in enumerate(log_of(store)):
        for step in sorted({event.step for event in told}):
            for operation in ("save", "load"):
                log.emit([e for e in told if (e.rank, e.step, e.operation) == (rank, step, operation)])
        log.close()
        log.close()

    assert sorted(map(repr, read_events(store))) == sorted(map(repr, told))


def test_one_step_is_read_alone(store: Store) -> None:
    log = EventLog(store, rank=0, world=1)
    for step in (5, 50, 500):
        log.emit(save_events(step, 1))
    log.emit(load_events(5, 1))
    told = save_events(5, 1) + load_events(5, 1)

    assert sorted(map(repr, read_log(store, step=5).events)) == sorted(map(repr, told))


def test_a_save_costs_one_write(tmp_path: Path) -> None:
    folder = PosixStore(tmp_path / "run", options=Options())
    log = EventLog(folder, rank=0, world=1)
    for step in range(3):
        log.emit(save_events(step, 1))
    objects = CountingStore(open_store(f"memory://{tmp_path.name}", options=Options()))
    log = EventLog(objects, rank=0, world=1)
    for step in range(3):
        log.emit(save_events(step, 1))

    assert len(folder.list("events/")) == 1
    assert objects.traffic.calls["put"] == 3 and len(objects.list("events/")) == 3


def test_restarts_of_a_rank_do_not_share_a_file(store: Store) -> None:
    for _ in range(3):
        EventLog(store, rank=0, world=1).emit(save_events(1, 1))

    assert len(store.list("events/")) == 3
    assert len(read_events(store)) == 3 * len(save_events(1, 1))


def test_a_log_cut_anywhere_gives_all_whole_lines(tmp_path: Path) -> None:
    store = PosixStore(tmp_path, options=Options())
    EventLog(store, rank=0, world=1).emit(save_events(1, 1))
    path = next((tmp_path / "events").rglob("*.jsonl"))
    data = path.read_bytes()
    whole = read_events(store)
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        found = read_log(store)
        lines = data[:cut].split(b"\n")
        # A last line that lacks nothing but its line feed is an event as well.
        assert found.events == whole[: len(found.events)]
        assert len(found.events) >= len(lines) - 1 and found.num_lines_skipped <= 1


def test_what_is_no_event_is_counted_and_passed_over(tmp_path: Path) -> None:
    store = PosixStore(tmp_path, options=Options())
    EventLog(store, rank=0, world=1).emit(save_events(1, 1))
    path = next((tmp_path / "events").rglob("*.jsonl"))
    path.write_bytes(b"rubbish\n" + path.read_bytes() + b'\x00\x00\x00\n{"operation":')
    (tmp_path / "events" / "notes.txt").write_text("not ours")
    (tmp_path / "events" / "link.jsonl").symlink_to("/etc/passwd")

    found = read_log(store)

    assert (found.events, found.num_lines_skipped) == (save_events(1, 1), 3)


def test_a_log_does_not_grow_beyond_its_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "EVENT_LOG_BYTES_MAX", 40_000)
    monkeypatch.setattr(config, "EVENT_LOG_PART_BYTES", 8_000)
    log = EventLog(store, rank=0, world=1)
    for step in range(100):
        log.emit(save_events(step, 1))
        assert sum(entry.nbytes for entry in store.list("events/")) <= 40_000
    steps = {event.step for event in read_events(store)}

    assert max(steps) == 99 and steps == set(range(min(steps), 100))


def test_reading_a_long_log_stops_at_its_limit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PosixStore(tmp_path, options=Options())
    for number in range(4):
        EventLog(store, rank=0, world=1).emit(save_events(number, 1))
        path = max((tmp_path / "events").rglob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(path, (number, number))
    of_one = next(iter(store.list("events/"))).nbytes
    monkeypatch.setattr(config, "EVENT_LOG_READ_BYTES_MAX", of_one + 1)

    found = read_log(store)

    assert ({event.step for event in found.events}, found.num_files_left_out) == ({2, 3}, 2)


def test_a_load_from_a_mistyped_folder_leaves_no_folder(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "typo", options=Options())
    EventLog(store, rank=0, world=1).emit(load_events(1, 1, outcome="failed"))

    assert not (tmp_path / "typo").exists()


def test_a_run_that_may_not_be_written_to_can_be_loaded_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PosixStore(tmp_path, options=Options())
    (tmp_path / "step-000000000001").mkdir()

    def denied(key: str, data: bytes) -> None:
        raise StoreError(f"cannot append to `{key}`", kind="denied")

    monkeypatch.setattr(store, "append", denied)
    events = Events([EventLog(store, rank=0, world=1)])
    timeline = Timeline()
    timeline.add("total", 0.0, 1.0)
    with caplog.at_level(logging.WARNING, logger="ckpt"):
        events.tell(timeline, operation="load", run="r", step=1, attempt="", rank=0, world=1)

    assert caplog.records == []


def test_a_full_disk_stops_the_log_and_never_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PosixStore(tmp_path, options=Options())
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    events = Events([EventLog(store, rank=0, world=1)])
    timeline = Timeline()
    timeline.add("total", 0.0, 1.0)
    for _ in range(2):
        events.tell(timeline, operation="save", run="r", step=1, attempt="", rank=0, world=1)
    monkeypatch.undo()

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (read_log(store).events, read_log(store).num_lines_skipped) == ([], 1)


def test_processes_that_append_to_one_file_tear_no_line(tmp_path: Path) -> None:
    code = (
        "import sys; from ckpt.store.posix import PosixStore; from ckpt.config import Options\n"
        "store = PosixStore(sys.argv[1], options=Options())\n"
        "for i in range(200): store.append('events/x/000001.jsonl', sys.argv[2].encode() * 3000 + b'\\n')\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter]) for letter in "ab"]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    lines = (tmp_path / "events/x/000001.jsonl").read_bytes().splitlines()

    assert sorted(set(lines)) == [b"a" * 3000, b"b" * 3000] and len(lines) == 400


def test_append_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "events").symlink_to(tmp_path / "elsewhere")
    store = PosixStore(tmp_path / "run", options=Options())

    with pytest.raises(ckpt.DamagedError):
        store.append("events/x.jsonl", b"x\n")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def run_with_log(tmp_path: Path) -> Store:
    """A run with steps 1, 2, 3 and their events."""
    url = tmp_path / "run"
    for step in (1, 2, 3):
        ckpt.save({"x": step}, url, step=step)
    store = open_store(url, options=Options())
    shutil.rmtree(url / "events", ignore_errors=True)
    log = EventLog(store, rank=0, world=1)
    for step in (1, 2, 3):
        log.emit(save_events(step, 1))
    return store


def test_the_log_is_no_part_of_the_run(run_with_log: Store) -> None:
    assert find.steps(run_with_log) == find.step_folders(run_with_log) == [1, 2, 3]
    assert {attempt.state for attempt in find.attempts(run_with_log)} == {"complete"}


def test_events_of_forgotten_and_removed_steps_stay(run_with_log: Store) -> None:
    retention.forget(run_with_log, [1, 2])
    report = collect_garbage(run_with_log, options=Options(), force_unfinished=True)

    assert find.step_folders(run_with_log) == [3]
    assert not any("events" in key for removal in report.plan.removals for key in removal.keys)
    assert {event.step for event in read_events(run_with_log)} == {1, 2, 3}


def test_the_option_turns_the_log_off(store: Store) -> None:
    assert default_sinks(store, Options(events=False), rank=0, world=1) == []
    assert [type(sink) for sink in default_sinks(store, Options(), rank=0, world=1)] == [EventLog]
    assert store.list("") == []
