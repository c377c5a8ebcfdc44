"""Segments belong to one living agent; what others left is judged by name, header, lock and age."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ckpt.agent import budget, identity, process, segments
from ckpt.agent.budget import Memory
from ckpt.agent.header import HEADER_BYTES, State
from ckpt.agent.identity import Identity, check_private, make_private, memory_folder, run_id_of
from ckpt.agent.owner import Owner
from ckpt.agent.slots import Slots
from ckpt.config import AGENT_BESIDE_BYTES, Options
from ckpt.errors import AgentError, BudgetError, DamagedError, InvalidInputError, NotFoundError

GIB = 1 << 30


@pytest.fixture
def folder(options: Options) -> Path:
    return memory_folder(options)


def test_an_adopted_segment_has_the_same_image_and_a_new_owner(folder: Path, identity: Identity) -> None:
    made = segments.create(folder, identity, 10_000)
    made.populate()
    made.begin(generation=1, step=5, attempt="a", epoch=2, world=4)
    with open(made.path, "r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"x" * 10_000)
    made.seal(10_000)
    made.close()

    again = segments.adopt(made.path, dataclasses.replace(identity, incarnation=9))

    with again.image() as image:
        assert bytes(image) == b"x" * 10_000
    assert (again.header.state, again.header.step, again.header.incarnation) == (State.SEALED, 5, 9)
    assert again.header.owner == Owner.current() and again.header.capacity_bytes % os.sysconf("SC_PAGESIZE") == 0
    again.unlink()


def test_an_image_that_was_being_written_is_given_up_at_adoption(folder: Path, identity: Identity) -> None:
    made = segments.create(folder, identity, 10)
    made.begin(generation=1, step=5, attempt="a", epoch=2, world=4)
    made.close()
    again = segments.adopt(made.path, identity)
    assert (again.header.state, again.header.generation) == (State.EMPTY, 1)
    again.unlink()


def test_a_sweep_touches_nothing_that_lives(folder: Path, identity: Identity) -> None:
    code = (
        "import sys, uuid; from pathlib import Path; from ckpt.agent import segments; from ckpt.agent.identity import Identity;"
        "made = segments.create(Path(sys.argv[1]), Identity(run_id=uuid.UUID(sys.argv[2]), rank=1, world=4), 10);"
        "print(made.name, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder), identity.run_id.hex]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        name = other.stdout.readline().strip()
        swept = segments.sweep(folder, identity, lease_s=0.0)
        alive = [path.name for path in folder.iterdir()]
        with pytest.raises(NotFoundError) as refused:
            segments.adopt(folder / name, identity)
        other.kill()
        other.wait()
    after = segments.sweep(folder, identity, lease_s=0.0)
    adopted = [one.name for one in after.adopted]
    for one in after.adopted:
        one.unlink()
    folder.rmdir()
    assert (swept.adopted, swept.removed, alive, refused.value.kind, adopted) == ([], [], [name], "held", [name])


def test_of_what_dead_agents_left_only_what_is_over_is_removed(folder: Path, identity: Identity) -> None:
    others = {
        "another rank": dataclasses.replace(identity, rank=2),
        "another run": dataclasses.replace(identity, run_id=uuid.uuid4()),
    }
    made = {name: segments.create(folder, who, 10) for name, who in others.items()}
    old = segments.create(folder, others["another run"], 10)
    rebooted = segments.create(folder, others["another run"], 10)
    old.update(alive_ns=old.header.alive_ns - 100 * 10**9)
    rebooted.update(owner=dataclasses.replace(Owner.current(), boot_id=uuid.uuid4()))
    for one in (*made.values(), old, rebooted):
        one.close()

    first = segments.sweep(folder, identity, lease_s=60.0)
    kept = {path.name for path in folder.iterdir()}
    second = segments.sweep(folder, None, lease_s=0.0)
    folder.rmdir()

    assert {one.path.name for one in first.removed} == {old.name, rebooted.name}
    assert kept == {one.name for one in made.values()} == {one.path.name for one in second.removed}


def test_what_is_no_segment_is_refused_and_not_followed(folder: Path, identity: Identity, tmp_path: Path) -> None:
    make_private(folder)
    name = f"{identity.run_id.hex}-00001-0000000{{}}.seg"
    paths = [folder / name.format(number) for number in range(6)]
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(HEADER_BYTES))
    paths[0].symlink_to(precious)
    os.mkfifo(paths[1], 0o600)
    paths[2].touch(0o600)
    paths[3].touch(0o644)
    paths[4].mkdir(0o700)
    made = segments.create(folder, identity, 10_000)
    made.close()
    os.truncate(made.path, HEADER_BYTES + 10)
    kinds = []
    for path in (*paths, made.path):
        try:
            segments.adopt(path, identity)
        except (DamagedError, NotFoundError) as error:
            kinds.append(error.kind)
    swept = segments.sweep(folder, identity, lease_s=0.0)

    assert kinds == ["unsafe-segment"] * 2 + ["no-header"] + ["unsafe-segment"] * 2 + ["no-segment", "wrong-size"]
    assert swept.adopted == [] and precious.exists()
    assert not made.path.exists() and not paths[2].exists()  # of our own name, and worth nothing
    for path in (paths[0], paths[1], paths[3]):
        path.unlink(missing_ok=True)
    paths[4].rmdir()
    folder.rmdir()


def test_folders_that_others_could_enter_or_planted_are_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch(0o700)
    kinds = {}
    for name in ("open", "real", "link", "file"):
        try:
            make_private(tmp_path / name)
            kinds[name] = "fine"
        except InvalidInputError as error:
            kinds[name] = error.kind
    assert kinds == {"open": "unsafe-folder", "real": "fine", "link": "unsafe-folder", "file": "unsafe-folder"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "his").mkdir(mode=0o700)
    os.chown(tmp_path / "his", 65534, 65534)
    with pytest.raises(InvalidInputError, match="belongs to user 65534"):
        check_private(tmp_path / "his")


def test_a_socket_path_that_is_too_long_is_told_with_a_way_out(
    tmp_path: Path, options: Options, identity: Identity
) -> None:
    long = dataclasses.replace(options, agent_runtime_folder=str(tmp_path / ("x" * 100)))
    with pytest.raises(InvalidInputError, match="CKPT_AGENT_RUNTIME_FOLDER") as refused:
        identity_places(identity, long)
    assert refused.value.kind == "long-path"


def identity_places(who: Identity, options: Options) -> identity.Places:
    return identity.places(who, options)


def test_a_run_has_one_id_however_its_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = {run_id_of("run"), run_id_of(str(tmp_path / "run")), run_id_of(f"{tmp_path}/x/../run/")}
    assert len(same) == 1 and run_id_of("s3://a/run") == run_id_of("s3://a/run/") != run_id_of("s3://b/run")


@pytest.mark.parametrize(
    ("need", "host", "cgroup", "shm", "fits"),
    [
        (2, 3, None, 2, True),
        (2, 2.9, None, 9, False),  # the reserve is 1; what an agent takes beside comes on top
        (2, 9, 2.9, 9, False),
        (2, 9, 3, 9, True),
        (2, 9, None, 1.9, False),
    ],
)
def test_a_budget_needs_host_control_group_and_folder(
    need: float, host: float, cgroup: float | None, shm: float, fits: bool
) -> None:
    memory = Memory(
        host_bytes=int(host * GIB) + AGENT_BESIDE_BYTES,
        cgroup_bytes=None if cgroup is None else int(cgroup * GIB) + AGENT_BESIDE_BYTES,
        folder_bytes=int(shm * GIB),
        folder="/dev/shm",
    )
    try:
        budget.check(int(need * GIB), memory, Options(agent_reserve_bytes=GIB))
        found = True
    except BudgetError as error:
        found = False
        found_bytes = [one for one in (memory.host_bytes, memory.cgroup_bytes, memory.folder_bytes) if one is not None]
        for figure in (int(need * GIB), GIB, AGENT_BESIDE_BYTES, *found_bytes):
            assert f"{figure:,}" in error.message
    assert found == fits


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_around_the_process_counts(tmp_path: Path, version: int) -> None:
    base, limit, usage, stat = {
        1: (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: (tmp_path, "memory.max", "memory.current", "inactive_file"),
    }[version]
    (base / "job" / "rank").mkdir(parents=True)
    for group, (limit_bytes, usage_bytes) in {"job": ("1000", 700), "job/rank": ("max", 100)}.items():
        (base / group / limit).write_text(limit_bytes)
        (base / group / usage).write_text(str(usage_bytes))
        (base / group / "memory.stat").write_text(f"anon 5\n{stat} 50\n")
    groups = tmp_path / "cgroup"
    groups.write_text("3:cpu,memory:/job/rank\n" if version == 1 else "0::/job/rank\n")
    assert budget.cgroup_free_bytes(tmp_path, groups) == 350


def test_the_newest_whole_image_is_never_written_over(options: Options, identity: Identity) -> None:
    slots = Slots(memory_folder(options), identity, options)
    with pytest.raises(AgentError) as none:
        slots.begin(step=1, attempt="a", epoch=0, world=4)
    slots.reserve(4096)
    seen = []
    for step in (5, 6, 7, 4):  # the last after a return to an older step: age is generation
        one = slots.begin(step=step, attempt="a", epoch=0, world=4)
        if slots.newest() is not None:
            with pytest.raises(AgentError) as busy:
                slots.begin(step=step, attempt="b", epoch=0, world=4)
            assert busy.value.kind == "busy"
        slots.seal(one.name, one.header.generation, 100, None)
        seen.append(sorted(header.step for header in slots.headers()))
    slots.close()
    assert none.value.kind == "not-reserved"
    assert seen == [[-1, 5], [5, 6], [6, 7], [4, 7]]


def test_with_a_group_an_image_counts_once_it_is_protected(options: Options, identity: Identity) -> None:
    slots = Slots(memory_folder(options), identity, options, complete=State.PROTECTED)
    slots.reserve(4096)
    first = slots.begin(step=1, attempt="a", epoch=0, world=4)
    slots.seal(first.name, 1, 100, None)
    second = slots.begin(step=2, attempt="a", epoch=0, world=4)
    slots.seal(second.name, 2, 100, None)
    with pytest.raises(AgentError, match="step 1 SEALED, step 2 SEALED|step 2 SEALED, step 1 SEALED"):
        slots.begin(step=3, attempt="a", epoch=0, world=4)
    slots.protect(second.name, 2)
    with slots.pinned(first.name, 1), pytest.raises(AgentError):  # somebody still reads it
        slots.begin(step=3, attempt="a", epoch=0, world=4)
    third = slots.begin(step=3, attempt="a", epoch=0, world=4)
    with pytest.raises(AgentError) as stale:
        slots.protect(first.name, 1)
    slots.close()
    assert third.name == first.name and stale.value.kind == "stale-generation"


def test_a_larger_image_gets_new_memory_and_the_whole_one_stays_until_the_next(
    options: Options, identity: Identity
) -> None:
    slots = Slots(memory_folder(options), identity, options)
    slots.reserve(4096)
    old = slots.begin(step=1, attempt="a", epoch=0, world=4)
    slots.seal(old.name, 1, 4096, None)
    slots.reserve(100_000)
    during = sorted((header.capacity_bytes, header.step) for header in slots.headers())
    new = slots.begin(step=2, attempt="a", epoch=0, world=4)
    slots.seal(new.name, new.header.generation, 100_000, None)
    after = sorted((header.capacity_bytes, header.step) for header in slots.headers())
    slots.close()
    assert during == [(4096, 1), (102_400, -1), (102_400, -1)]
    assert after == [(102_400, -1), (102_400, 2)]


def test_a_refused_reservation_takes_nothing_and_keeps_what_there_is(options: Options, identity: Identity) -> None:
    slots = Slots(memory_folder(options), identity, options)
    slots.reserve(4096)
    one = slots.begin(step=1, attempt="a", epoch=0, world=4)
    slots.seal(one.name, 1, 4096, None)
    before = slots.headers()
    with pytest.raises(BudgetError):
        slots.reserve(10**15)
    after = slots.headers()
    slots.close()
    assert after == before


def test_only_old_logs_in_folders_of_this_user_alone_are_removed(tmp_path: Path, options: Options) -> None:
    runtime, names = Path(options.agent_runtime_folder), [uuid.uuid4().hex for _ in range(3)]
    elsewhere = tmp_path / "elsewhere"
    for folder in (runtime / names[0], runtime / names[1], elsewhere):
        folder.mkdir(mode=0o700)
        for name in ("00000.log", "00000.err"):
            (folder / name).touch()
            os.utime(folder / name, (0, 0))
    (runtime / names[1] / "00001.log").touch()
    (runtime / names[2]).symlink_to(elsewhere)
    process._remove_old_logs(options)
    left = sorted(str(path.relative_to(runtime)) for path in runtime.glob("*/*") if not path.parent.is_symlink())
    assert left == [f"{names[1]}/00001.log"] and len(list(elsewhere.iterdir())) == 2
    assert not (runtime / names[0]).exists()
