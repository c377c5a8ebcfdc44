"""Goal: an average that is kept up holds just what is in the run, whatever is killed, replayed, rolled back or late.

Method: `ckpt watch` and `Checkpointer(merge=...)` on real runs; the result must be bit for bit that of one merge of all its
checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.commit import find, pins, retention
from ckpt.commit.gc import collect_garbage
from ckpt.config import OnlineAverage, Options
from ckpt.merge.applied import Version, next_update, rule_of
from ckpt.store.open import open_store
from tests.merge.samples import bits, images, merged, opened, random_arrays, save
from tests.servers import S3Server

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"a.weight": (24, 16), "b.weight": (16,)}


def land(run: Path, step: int, seed: int | None = None) -> None:
    """A checkpoint with a parameter in bf16 (whose sums are exact), a counter, and a progress object."""
    more = {"progress": {"step": step}}
    arrays = random_arrays(step if seed is None else seed, SHAPES)
    save(run, step, arrays, dtype=torch.bfloat16, metrics={"loss": 1.0 / step}, more=more)


def recipe(folder: Path, **rule: Any) -> Path:
    file = folder / "online.yaml"
    file.write_text(json.dumps({"online": 1, "into": str(folder / "average"), **rule}))
    return file


def watch(folder: Path, *more: str, fail: str | None = None) -> list[dict[str, Any]]:
    """`ckpt watch --once --json` on the run in `folder`; what it told. With `fail` it is killed there."""
    words = [sys.executable, "-m", "ckpt", "watch", str(folder / "run"), "--recipe", str(folder / "online.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"CKPT_FAILPOINT": fail} if fail else {})}
    done = subprocess.run(
        [*words, "--once", "--json", *more], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (-signal.SIGKILL if fail else 0), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kinds(told: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(one["kind"], one["step"]) for one in told]


def check_mean(folder: Path, steps: list[int]) -> None:
    """The newest average is that of these steps, to the bit, and the rest is the newest step's."""
    expected, _ = merged([f"{folder}/run@{step}" for step in steps], folder / f"whole-{len(steps)}-{time.time_ns()}")
    found = opened(folder / "average", step=max(steps))
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in expected.items()}
    state: dict[str, Any] = {"progress": {"step": 0}}
    ckpt.load(state, folder / "average", step=max(steps))
    assert state["progress"]["step"] == max(steps)


def test_an_average_grows_with_the_run_and_a_replay_adds_nothing(tmp_path: Path) -> None:
    recipe(tmp_path)
    for step in (10, 20):
        land(tmp_path / "run", step)
    assert kinds(watch(tmp_path)) == [("added", 10), ("published", 10), ("added", 20), ("published", 20)]
    before = images(tmp_path / "average")
    assert watch(tmp_path) == [] and images(tmp_path / "average") == before
    land(tmp_path / "run", 30)
    told = watch(tmp_path)
    assert kinds(told) == [("added", 30), ("published", 30)] and told[-1]["applied"] == 3
    check_mean(tmp_path, [10, 20, 30])
    assert (
        len(find.steps(open_store(tmp_path / "average" / "sums", options=Options()))) == 2
    )  # two versions of the sums


@pytest.mark.parametrize(
    "place",
    [
        "merge.in-image:kill@1",
        "merge.before-image-commit:kill@2",
        "merge.before-index:kill@3",
        "commit.before-manifest:kill@1",
        "commit.before-manifest:kill@2",
        "commit.before-manifest:kill@3",
        "forget.after-record:kill@1",
        "gc.after-verdict:kill@1",
    ],
)
def test_killed_anywhere_it_goes_on_and_adds_nothing_twice(tmp_path: Path, place: str) -> None:
    recipe(tmp_path)
    for step in (10, 20, 30):
        land(tmp_path / "run", step)
    watch(tmp_path, fail=place)
    watch(tmp_path)
    check_mean(tmp_path, [10, 20, 30])


def test_a_run_that_was_rolled_back_takes_its_average_along(tmp_path: Path) -> None:
    recipe(tmp_path)
    for step in (10, 20, 30):
        land(tmp_path / "run", step)
        watch(tmp_path)
    store = open_store(tmp_path / "run", options=Options())
    retention.forget(store, [20, 30])
    collect_garbage(store, options=Options())
    land(tmp_path / "run", 20, seed=77)

    told = watch(tmp_path)
    assert kinds(told) == [("rolled-back", 20), ("rolled-back", 30), ("added", 10), ("added", 20), ("published", 20)]
    check_mean(tmp_path, [10, 20])
    land(tmp_path / "run", 30, seed=78)
    watch(tmp_path)
    check_mean(tmp_path, [10, 20, 30])


def test_a_checkpoint_that_comes_late_is_in_the_next_average(tmp_path: Path) -> None:
    recipe(tmp_path)
    for step in (10, 20, 30):
        land(tmp_path / "run", step)
    late = shutil.move(tmp_path / "run" / "step-000000000020", tmp_path / "late")
    watch(tmp_path)
    shutil.move(late, tmp_path / "run" / "step-000000000020")
    assert kinds(watch(tmp_path)) == [("added", 20)]
    land(tmp_path / "run", 40)
    watch(tmp_path)
    check_mean(tmp_path, [10, 20, 30, 40])


def test_an_exponential_average_is_that_of_one_merge_also_with_a_late_checkpoint(tmp_path: Path) -> None:
    recipe(tmp_path, method="ema", half_life=15, dtype="float64")
    for step in (10, 20, 30):
        land(tmp_path / "run", step)
    late = shutil.move(tmp_path / "run" / "step-000000000020", tmp_path / "late")
    watch(tmp_path)
    shutil.move(late, tmp_path / "run" / "step-000000000020")
    land(tmp_path / "run", 40)
    assert ("late", 20) not in kinds(watch(tmp_path))
    expected, _ = merged(f"{tmp_path}/run@10..40", tmp_path / "whole", "ema", half_life=15.0, dtype="float64")
    found = opened(tmp_path / "average", step=40)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=1e-15)


def test_a_late_checkpoint_that_cannot_be_had_in_order_is_told(tmp_path: Path) -> None:
    rule = OnlineAverage(into="x", method="ema", decay=0.5)
    version = Version(number=3, applied=((10, "a"), (30, "c")), total=1.0, rule=rule_of(rule))
    complete = {20: "b", 30: "c", 40: "d"}  # 10 was retired: there is no going back to before 20
    update = next_update(rule, [version], complete, frozenset())
    assert (update.base, update.add, update.late) == (version, (40,), (20,))


def test_a_window_is_the_mean_of_the_newest_and_keeps_them(tmp_path: Path) -> None:
    recipe(tmp_path, method="window", last=3)
    for step in (10, 20, 30, 40, 50):
        land(tmp_path / "run", step)
    assert kinds(watch(tmp_path)) == [("published", 50)]
    check_mean(tmp_path, [30, 40, 50])

    store = open_store(tmp_path / "run", options=Options())
    verdicts = retention.decide(
        [retention.StepRecord(step=step) for step in find.steps(store)],
        retention.Policy(last=1),
        pins.pinned(store, find.steps(store)),
    )
    assert [v.step for v in verdicts if v.keep] == [30, 40, 50] and "the average in" in verdicts[2].reason
    retention.forget(store, [10, 40])  # named by a user: forgotten, but the data of what is pinned stay
    kept = collect_garbage(store, options=Options()).plan.kept
    assert [(one.step, "pinned" in one.reason) for one in kept] == [(40, True)]
    retention.unforget(store, 40)
    assert find.steps(store) == [20, 30, 40, 50]


def test_a_checkpoint_with_nan_is_left_out_and_told_once(tmp_path: Path) -> None:
    recipe(tmp_path)
    land(tmp_path / "run", 10)
    save(tmp_path / "run", 20, {**random_arrays(1, SHAPES), "b.weight": [float("nan")] * 16}, dtype=torch.bfloat16)
    land(tmp_path / "run", 30)
    told = watch(tmp_path)
    assert kinds(told) == [("added", 10), ("published", 10), ("skipped", 20), ("added", 30), ("published", 30)]
    assert "b.weight" in told[2]["text"] and watch(tmp_path) == []
    check_mean(tmp_path, [10, 30])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"method": "emma"}, "uniform, ema or window"),
        ({"method": "ema"}, "half_life"),
        ({"lats": 3}, "unknown key `lats`"),
        ({"online": 7}, "another version"),
        ({"every": 0}, "every"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    from ckpt.merge.api import recipe_file
    from ckpt.merge.online_recipe import rule_from

    with pytest.raises(ckpt.InvalidInputError, match=message):
        rule_from(recipe_file(recipe(tmp_path, **rule)))


def test_an_average_of_another_rule_is_not_touched(tmp_path: Path) -> None:
    recipe(tmp_path)
    land(tmp_path / "run", 10)
    watch(tmp_path)
    before = images(tmp_path / "average")
    recipe(tmp_path, method="ema", decay=0.5)
    words = [sys.executable, "-m", "ckpt", "watch", str(tmp_path / "run"), "--recipe", str(tmp_path / "online.yaml")]
    done = subprocess.run([*words, "--once"], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2 and "another rule" in done.stderr
    assert images(tmp_path / "average") == before


# beside a training loop


def train(run: Path | str, average: OnlineAverage, steps: range, act: Callable[[int, ckpt.Checkpointer], None]) -> Any:
    """A loop that saves at every step; `act` after each of them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ckpt.Checkpointer(run, every=1, keep_last=1, merge=average) as checkpointer:
        for step in steps:
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            pending = checkpointer.step(step, {"model": model, "optimizer": optimizer})
            assert pending is not None
            pending.wait()
            act(step, checkpointer)
    return checkpointer.average


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in 60 s"
        time.sleep(0.02)


def test_a_training_loop_keeps_a_window_up_beside_it(tmp_path: Path) -> None:
    rule = OnlineAverage(into=str(tmp_path / "average"), method="window", last=3)
    beside = train(tmp_path / "run", rule, range(1, 7), lambda step, checkpointer: None)
    assert (beside.failures, beside.published, beside.pid) == ([], 6, None)
    assert find.steps(open_store(tmp_path / "run", options=Options())) == [4, 5, 6]  # keep_last=1, and the window's pin
    expected, _ = merged(f"{tmp_path}/run@4..6", tmp_path / "whole")
    found = opened(tmp_path / "average", step=6)
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in expected.items()}


@pytest.mark.s3
def test_run_and_average_lie_on_object_stores(
    moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = moto_s3.url(tmp_path.name)
    rule = OnlineAverage(into=f"{bucket}/average")
    beside = train(f"{bucket}/run", rule, range(1, 4), lambda step, checkpointer: None)  # keep_last=1: sums go on
    assert (beside.failures, beside.published) == ([], 3)
    with ckpt.open(f"{bucket}/average") as newest:
        assert newest.step == 3 and len(newest.manifest.metadata["online"]["applied"]) == 3


def test_a_process_that_dies_is_told_and_started_anew(tmp_path: Path) -> None:
    killed: list[int] = []

    def act(step: int, checkpointer: ckpt.Checkpointer) -> None:
        assert checkpointer.average is not None
        wait_for(lambda: checkpointer.average.published == step)
        if step == 2:
            killed.append(checkpointer.average.pid or 0)
            os.kill(killed[0], signal.SIGKILL)
            wait_for(lambda: checkpointer.average.failures)

    rule = OnlineAverage(into=str(tmp_path / "average"))
    beside = train(tmp_path / "run", rule, range(1, 5), act)
    assert beside.published == 4 and len(beside.failures) == 1 and "ended" in beside.failures[0]


def test_what_goes_wrong_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "average").write_text("a file, where a folder should be")
    rule = OnlineAverage(into=str(tmp_path / "average"))
    beside = train(tmp_path / "run", rule, range(1, 3), lambda step, checkpointer: None)
    assert beside.failures and "average" in caplog.text
    with ckpt.open(tmp_path / "run") as newest:
        assert newest.step == 2
