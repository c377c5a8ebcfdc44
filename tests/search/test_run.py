"""The run of a search: what is published, what is kept, kills, failures, hold-out, commands, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.cli import run as run_command
from ckpt.config import Options
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, MismatchError
from ckpt.search import Candidate, Command, Driver, Proposals, Session, on_checkpoint
from ckpt.search.document import any_method, sources_alone
from ckpt.search.drivers.greedy import GreedySoup
from ckpt.search.log import Evaluation, SearchLog
from ckpt.search.memory import range_products
from ckpt.search.point import Point
from ckpt.search.problem import Over, opened_problem
from ckpt.search.score import Score, evaluate
from ckpt.store.posix import PosixStore
from tests.cli.conftest import check_schema
from tests.merge.samples import bits, opened, random_arrays, save
from tests.search.samples import EVALUATOR, OPTIMUM, SHAPES, Near, distance, mixed, points, save_sources
from tests.servers import S3Server

DEADLINE_S = 100.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("driver", ["lcsc", "m2n2"])
def test_published_checkpoint_holds_the_bits_that_were_scored(tmp_path: Path, dtype: torch.dtype, driver: str) -> None:
    sources = save_sources(tmp_path / "run", dtype=dtype)
    seen: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}
    near = Near(mixed(sources, OPTIMUM))

    def evaluator(candidate: Candidate) -> float:
        seen[candidate.point.rows, candidate.point.stops] = candidate.state_dict()
        return near(candidate)

    found = ckpt.search(tmp_path / "run@0..", tmp_path / "out", evaluator=evaluator, driver=driver, budget=30)
    state = seen[found.best.point.rows, found.best.point.stops]
    made = opened(tmp_path / "out")
    assert set(made) == {*SHAPES, "count"} and int(made["count"]) == 2
    for name, tensor in state.items():
        assert made[name].dtype == tensor.dtype == dtype and bits(made[name]) == bits(tensor), name


def test_base_and_batch_norm_hold_the_bits_that_were_scored(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
        model(torch.randn(50, 4) * step)
        ckpt.save({"model": model}, tmp_path / "run", step=step)
    states: list[tuple[float, dict[str, torch.Tensor]]] = []

    def evaluator(candidate: Candidate) -> float:
        state = candidate.state_dict()
        states.append((-float(state["0.weight"].square().sum()), state))
        return states[-1][0]

    found = ckpt.search(
        [f"{tmp_path}/run@2", f"{tmp_path}/run@3"],
        tmp_path / "out",
        base=f"{tmp_path}/run@1",
        evaluator=evaluator,
        driver="lcsc",
        budget=9,
        references=False,
    )
    best = next(state for value, state in states if value == found.best.value)
    made = opened(tmp_path / "out")
    assert set(best) == set(made) and "1.running_var" in made
    assert [name for name in made if bits(made[name]) != bits(best[name])] == []


def test_explain_shows_the_coefficients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near = Near(mixed(save_sources(tmp_path / "run"), OPTIMUM))
    found = ckpt.search(tmp_path / "run@0..", tmp_path / "out", evaluator=near, driver="cma_es", budget=20, layers=2)
    assert run_command(["explain", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {t["name"]: [s["weight"] for s in t["shares"]] for t in document["tensors"] if t["method"] == "coefficients"}
    groups = {"model/layers.0.w": 0, "model/layers.1.w": 1, "model/layers.1.norm": 1, "model/head": 2}
    assert {name: rows[name] for name in groups} == {n: list(found.best.point.rows[g]) for n, g in groups.items()}


def test_holdout_scores_the_end_alone_and_decides_nothing(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    seen: list[Any] = []

    def holdout(candidate: Candidate) -> dict[str, float]:
        seen.append(candidate.point)
        return {"accuracy": 0.1 * len(seen)}

    def search(**more: Any) -> Any:
        near = Near(mixed(sources, OPTIMUM))
        return ckpt.search(tmp_path / "run@0..", evaluator=near, driver="lcsc", budget=25, seed=4, **more)

    with_it, without = search(holdout=holdout), search()
    assert with_it.evaluations[-1].point == without.evaluations[-1].point
    assert seen == [with_it.best.point, *(one.point for one in with_it.others)]
    assert with_it.best.holdout.metrics == {"accuracy": 0.1} and [o.name for o in with_it.others] == [
        "newest source",
        "mean",
    ]


@pytest.mark.parametrize("driver", ["greedy", "cma_es", "lcsc", "map", "m2n2"])
def test_interrupted_search_goes_on_with_the_same_points(tmp_path: Path, driver: str) -> None:
    sources = save_sources(tmp_path / "run")
    target = mixed(sources, OPTIMUM)

    def search(out: str, evaluator: Callable[[Candidate], float]) -> Any:
        return ckpt.search(tmp_path / "run@0..", tmp_path / out, evaluator=evaluator, driver=driver, budget=24, seed=7)

    class Stops(Near):
        def __call__(self, candidate: Candidate) -> float:
            np.random.seed(candidate.number)  # an evaluator may use the global random state: drivers do not
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(candidate)

    class Near2(Near):
        pass

    Stops.__qualname__ = Near2.__qualname__ = "Near"
    whole = search("whole", Near2(target))
    with pytest.raises(KeyboardInterrupt):
        search("cut", Stops(target))
    assert len(points(tmp_path / "cut.search")) == 4
    evaluator = Near2(target)
    again = search("cut", evaluator)
    assert points(tmp_path / "cut.search") == points(tmp_path / "whole.search")
    assert again.num_before == 4 and again.best.point == whole.best.point
    assert evaluator.calls <= len(whole.evaluations) - 4 + 2  # and two references
    ended = Near2(target)
    assert search("cut", ended).best == again.best and ended.calls == 0  # one that has ended scores nothing


@pytest.mark.timeout(150)
def test_killed_command_search_goes_on_with_the_same_points(tmp_path: Path) -> None:
    """SIGKILL in the middle, evaluator a command, candidates on disk."""
    recipe = _recipe(tmp_path, "lcsc", 7, pause_s=0.2)
    words = [sys.executable, "-m", "ckpt", "search", str(recipe), "-q", "--scratch", str(tmp_path)]
    process = subprocess.Popen([*words, "-o", f"{tmp_path}/out"])
    deadline = time.monotonic() + DEADLINE_S
    while len(points(tmp_path / "out.search")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    before = points(tmp_path / "out.search")
    assert 2 <= len(before) < 7 and not (tmp_path / "out" / "step-000000000030").exists()
    subprocess.run([*words, "-o", f"{tmp_path}/out"], check=True, timeout=DEADLINE_S)
    found = points(tmp_path / "out.search")
    # the same sequence as an evaluator in memory makes, which sees the same bits
    sources = [random_arrays(100 + i, SHAPES) for i in range(3)]
    whole = ckpt.search(tmp_path / "run@0..", evaluator=Near(mixed(sources, OPTIMUM)), driver="lcsc", budget=7, seed=5)
    assert found[: len(before)] == before
    assert found == [[list(row) for row in one.point.rows] for one in whole.evaluations]
    assert len(opened(tmp_path / "out")) == len(SHAPES) + 1


def _recipe(folder: Path, driver: str, budget: int, pause_s: float = 0.0) -> Path:
    sources = save_sources(folder / "run")
    np.savez(folder / "target.npz", **mixed(sources, OPTIMUM))
    command = [sys.executable, str(EVALUATOR), f"{folder}/target.npz", "{url}", "{step}", str(pause_s)]
    search = {"driver": driver, "budget": budget, "seed": 5, "evaluator": {"command": command}, "references": False}
    path = folder / "search.yaml"
    path.write_text(json.dumps({"recipe": 1, "sources": [f"{folder}/run@10..30"], "search": search}))
    return path


def test_command_line_prints_a_table_and_leaves_no_candidates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, "greedy", 5)
    (tmp_path / "scratch").mkdir()
    words = ["search", str(recipe), "-o", f"{tmp_path}/out@77", "--scratch", f"{tmp_path}/scratch"]
    assert run_command(words) == 0
    out, err = capsys.readouterr()
    assert "best" in out and "run@10" in out and "5 of 5" in err
    assert list((tmp_path / "scratch").iterdir()) == []
    assert opened(tmp_path / "out", step=77)
    assert run_command([*words, "--json"]) == 0  # again: nothing is scored
    document = json.loads(capsys.readouterr().out)
    check_schema(document, "search")
    assert document["best"]["metrics"].keys() == {"score"} and document["num_evaluated_before"] == 5


def test_failed_evaluations_count_and_rank_last(tmp_path: Path) -> None:
    near = Near(mixed(save_sources(tmp_path / "run"), OPTIMUM))

    def shaky(candidate: Candidate) -> Any:
        score = near(candidate)
        kinds: list[Any] = [score, math.nan, score, score, "text", {"score": 1.0, "per_example": [math.inf]}, {}]
        if candidate.number % 14 == 13:
            raise ValueError("no memory left")
        return kinds[candidate.number % 7]

    found = ckpt.search(tmp_path / "run@0..", evaluator=shaky, driver="cma_es", budget=28, seed=1, failures_max=4)
    failed = [one for one in found.evaluations if one.score.failure]
    assert len(found.evaluations) == 28 and len(failed) == 16
    assert {one.number % 7 for one in failed} <= {1, 4, 5, 6}
    assert found.best.value == max(one.score.value(None) for one in found.evaluations)
    assert "score is nan" in failed[0].score.failure
    assert any(one.score.failure == "ValueError: no memory left" for one in failed)


def test_too_many_failures_stop_and_are_tried_again(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    near = Near(mixed(sources, OPTIMUM))
    broken = True

    def evaluator(candidate: Candidate) -> float:
        if broken and candidate.number >= 4:
            raise RuntimeError("the machine is away")
        return near(candidate)

    def search() -> Any:
        return ckpt.search(tmp_path / "run@0..", tmp_path / "out", evaluator=evaluator, driver="lcsc", budget=12)

    with pytest.raises(CheckpointError, match="3 evaluations in a row have failed.*the machine is away"):
        search()
    broken = False
    found = search()
    assert found.num_before == 4 and not any(one.score.failure for one in found.evaluations)


def test_evaluator_may_be_given_a_checkpoint(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    target = mixed(sources, OPTIMUM)
    urls: set[str] = set()

    @on_checkpoint
    def near(url: str, step: int) -> float:
        urls.add(url)
        return -distance(opened(Path(url), step), target)

    found = ckpt.search(tmp_path / "run@0..", evaluator=near, driver=GreedySoup(), budget=5, scratch=tmp_path)
    same = ckpt.search(tmp_path / "run@0..", evaluator=Near(target), driver="greedy", budget=5)
    assert [one.score for one in found.evaluations] == [one.score for one in same.evaluations]
    assert urls and not any(os.path.exists(url) for url in urls)


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import sys; sys.exit('no such split')", "exit code 1: no such split"),
        ("print('fine')", "no number and no JSON object: 'fine'"),
        ("print('true')", "no number"),
        ("print('NaN')", "score is nan"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_command_that_fails_says_how(code: str, failure: str) -> None:
    command = Command(words=(sys.executable, "-c", code, "{url}"), timeout_s=1 if "sleep" in code else 30)
    score = evaluate(command, Candidate(number=0, point=ckpt.search.Point(rows=((1.0,),)), where=("x", 1)))
    assert failure in score.failure


def test_overflow_of_a_candidate_is_a_failed_evaluation(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "run", i, {"w": np.array([6e4 * (1 if i else -1)], np.float32)}, dtype=torch.float16)
    found = ckpt.search(
        tmp_path / "run@0..", evaluator=lambda c: float(c.state_dict()["w"][0]), driver=Asks(), budget=3
    )
    assert ["too large for float16" in one.score.failure for one in found.evaluations] == [True, False]
    assert found.best.value == 30000.0


@dataclass(frozen=True, kw_only=True)
class Asks(Driver):
    """A driver of one's own: two points, the second of which follows from the score of the first."""

    def propose(self, session: Session) -> Proposals:
        (score,) = yield [session.space.point([-0.5, 1.5])]
        yield [session.space.point([0.25, 0.75] if score.failure else [0, 1])]


def test_state_of_another_search_and_an_output_that_exists_are_refused(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    near = Near(mixed(sources, OPTIMUM))

    def search(**more: Any) -> Any:
        more = {"driver": "lcsc", "budget": 6, "seed": 0, "into": tmp_path / "out", **more}
        return ckpt.search(tmp_path / "run@0..", evaluator=near, **more)

    search()
    for more, what in (({"seed": 1}, "seed"), ({"driver": "greedy"}, "driver"), ({"budget": 9}, "budget")):
        with pytest.raises(MismatchError, match=f"begun with other .*{what}"):
            search(**more)
    shutil.rmtree(tmp_path / "out.search")
    calls = near.calls
    with pytest.raises(AlreadyExistsError):
        search()
    assert near.calls == calls and not (tmp_path / "out.search").exists()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"driver": "cma"}, "unknown search driver `cma`"),
    ({"driver": "cma_es", "sigma": 1}, "no parameter `sigma`"),
    ({"driver": "cma_es", "sigma0": -1.0}, "`sigma0` must be above 0"),
    ({"driver": "greedy", "budget": 4}, "up to 5 evaluations, and `budget` is 4"),
    ({"driver": "map", "budget": 6}, "at least 6 samples"),
    ({"driver": "m2n2", "layers": 2}, "takes no groups"),
    ({"budget": 0}, "`budget` must be a whole number from 1"),
    ({"budget": None}, "no `budget`"),
    ({"driver": None}, "no `driver`"),
    ({"evaluator": None}, "no evaluator"),
    ({"groups": {"a": "nothing.*"}}, "group `a` has no tensor"),
    ({"groups": {"a": "head"}, "layers": 2}, "either `groups` or `layers`"),
    ({"groups": {"a": "{"}}, "without its partner"),
    ({"abs_sum_max": 0.5}, "bound is 0.5"),
    ({"rules": [{"match": "**", "policy": "newest"}]}, "no tensor is left|leave no tensor"),
    ({"sources": "run@10"}, "at least 2 sources"),
    ({"sources": [{"run": "run@10", "weight": 2.0}, "run@20"]}, "has no `weight`"),
    ({"memory": "1B"}, "sources in memory take"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_cannot_be_is_refused_before_anything_is_scored_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    near = Near(mixed(save_sources(tmp_path / "run"), OPTIMUM))
    monkeypatch.chdir(tmp_path)
    given = {"sources": "run@0..", "into": "out", "evaluator": near, "driver": "cma_es", "budget": 10, **more}
    with pytest.raises(CheckpointError, match=message):
        ckpt.search(**given)
    assert near.calls == 0 and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"driver": "lcsc", "budget": 3, "evaluater": "x"}}, "line 1: unknown key `evaluater` in `search`"),
        ({"search": {"driver": "lcsc", "budget": 3, "evaluator": {"command": "python eval.py"}}}, "must have `{url}`"),
        ({"search": {"driver": "lcsc", "budget": 3, "objective": {"a": "x"}}}, "weight of `a` must be a number"),
        ({"method": "uniform"}, "`method` is not for a search"),
        ({"search": None}, "`search` has no `driver`"),
    ],
)
def test_bad_recipes_name_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    recipe = _recipe(tmp_path, "lcsc", 3)
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **change}))
    assert run_command(["search", str(recipe), "-o", f"{tmp_path}/out"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.search").exists()


def test_metric_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    save_sources(tmp_path / "run")
    for objective in (None, "c"):
        with pytest.raises(InvalidInputError) as caught:
            ckpt.search(
                tmp_path / "run@0..", evaluator=lambda c: {"a": 1.0, "b": 2.0}, driver="lcsc", budget=5,
                objective=objective,
            )  # fmt: skip
        assert caught.value.kind == "no-objective"


@pytest.mark.parametrize("base", [None, 10])
def test_pull_back_is_the_gradient_by_the_weights(tmp_path: Path, base: int | None) -> None:
    sources = save_sources(tmp_path / "run")
    target = mixed(sources, (0.3, 0.3, 0.9))
    chosen = ["run@20", "run@30"] if base else ["run@10", "run@20", "run@30"]
    with ckpt.search.open_space(
        [f"{tmp_path}/{one}" for one in chosen], base=f"{tmp_path}/run@10" if base else None, layers=2, dtype="float64"
    ) as opened:

        def loss(weights: Any) -> torch.Tensor:
            state = {n: t.requires_grad_() for n, t in opened.state_dict(opened.space.point(weights)).items()}
            total = sum(((state[n] - torch.from_numpy(target[n])) ** 2).sum() for n in target)
            assert isinstance(total, torch.Tensor)
            total.backward()
            gradients.update({f"model/{n}": t.grad for n, t in state.items()})
            return total.detach()

        gradients: dict[str, Any] = {}
        start = opened.space.mean().array
        loss(start)
        found = opened.pull_back(gradients)
        for group, source in np.ndindex(*start.shape):  # a quadratic: central differences are exact
            step = np.zeros_like(start)
            step[group, source] = 0.5
            ahead, behind = (float(loss(start + sign * step)) for sign in (1, -1))
            assert found[group, source] == pytest.approx(ahead - behind, rel=1e-9, abs=1e-9)


def test_products_of_ranges_are_those_of_the_elements(tmp_path: Path) -> None:
    sources = save_sources(tmp_path / "run")
    flat = np.stack([np.concatenate([s[n].reshape(-1) for n in sorted(s)]) for s in sources]).astype(np.float64)
    recipe = any_method(sources_alone([f"{tmp_path}/run@0.."], "test"))
    with opened_problem(recipe, Over(), Options()) as problem:
        stops = [1, 40, 41, 90, flat.shape[1]]
        found = range_products(problem.reference, problem.space, stops)
        parts = np.split(flat, stops[:-1], axis=1)
        np.testing.assert_allclose(found, [part @ part.T for part in parts], rtol=1e-12)
        assert problem.space.splits == tuple(range(1, flat.shape[1] + 1))


def test_state_is_written_by_one_search_and_damage_is_named(tmp_path: Path) -> None:
    store = PosixStore(tmp_path, options=Options())
    log = SearchLog(store, 7)
    one = Evaluation(
        number=0, point=Point(rows=((0.1, 0.9),), stops=(5,)), score=Score(metrics={"a": 1.0}), seconds=0.5
    )
    log.add(one)
    assert log.evaluations() == [one]
    with pytest.raises(AlreadyExistsError, match="another search"):
        SearchLog(store, 7).add(dataclasses.replace(one, seconds=0.25))
    log.add(dataclasses.replace(one, number=2))
    with pytest.raises(DamagedError, match="evaluation 1 .* is missing"):
        log.evaluations()
    file = tmp_path / "step-000000000007" / "evaluations" / "000000.json"
    for text in ("{", "[]", '{"number": 0}'):
        file.write_text(text)
        with pytest.raises(DamagedError, match="000000.json"):
            log.evaluations()


@pytest.mark.s3
def test_output_and_state_on_an_object_store(
    tmp_path: Path, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    near = Near(mixed(save_sources(tmp_path / "run"), OPTIMUM))
    out = moto_s3.url(f"{tmp_path.name}/out")

    def search() -> Any:
        return ckpt.search(tmp_path / "run@0..", out, evaluator=near, driver="greedy", budget=5, references=False)

    first = search()
    assert near.calls == 5 and search().best == first.best and near.calls == 5
    with ckpt.open(out) as made:
        assert made.step == 30
