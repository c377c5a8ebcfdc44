"""What an evaluator says of a candidate, and what one is.

In: numbers, or the output of a command. Out: `Score` records. A failed evaluation is a score as well: it counts as one, keeps its
reason, and ranks below every other.

The protocol: an evaluator is a callable that is given a `Candidate` and returns a number, or a mapping of metric names to
numbers, which may also hold `per_example`: a list with one number for each example. **Higher is better**, always. It reads the
merged model from memory (`candidate.state_dict()`); one made by `on_checkpoint` is given a URL and a step instead, and so is a
command.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ckpt.errors import CheckpointError, InvalidInputError, first_line

if TYPE_CHECKING:
    from ckpt.search.candidate import Candidate

EXAMPLES = "per_example"
SCORE = "score"  # the name of the metric of an evaluator that returns a number
OUTPUT_SHOWN_MAX = 500  # characters of what a command wrote, in an error
FAILURE_CHARS_MAX = 2000
COMMAND_TIMEOUT_S = 3600.0
Objective = str | Mapping[str, float] | None
Given = Literal["memory", "checkpoint"]


class Evaluator(Protocol):
    """Scores a candidate; higher is better. May have an attribute `given`: "memory" (the default), or "checkpoint"."""

    def __call__(self, candidate: Candidate, /) -> float | Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation gave."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[float, ...] = ()  # one per example, where the evaluator gives them
    failure: str = ""  # why there are no metrics

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        out: dict[str, Any] = {"metrics": dict(self.metrics)}
        if self.examples:
            out[EXAMPLES] = list(self.examples)
        if self.failure:
            out["failure"] = self.failure
        return out

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Score:
        """The score of a record."""
        return Score(
            metrics={str(k): float(v) for k, v in plain["metrics"].items()},
            examples=tuple(float(value) for value in plain.get(EXAMPLES, ())),
            failure=str(plain.get("failure", "")),
        )

    def value(self, objective: Objective) -> float:
        """The one number that is maximised; minus infinity of a failed evaluation.

        InvalidInputError (`no-objective`) when it is not told which of several metrics counts, or names one that is not there.
        """
        if self.failure:
            return -math.inf
        if isinstance(objective, Mapping):
            return math.fsum(weight * self._metric(name) for name, weight in objective.items())
        if objective is not None:
            return self._metric(objective)
        if SCORE in self.metrics or len(self.metrics) == 1:
            return self.metrics.get(SCORE, next(iter(self.metrics.values())))
        raise InvalidInputError(
            f"the evaluator returns {', '.join(sorted(self.metrics))}: which one is to be maximised is not said",
            kind="no-objective",
            hints=("name one as `objective`, or give each its weight: `objective: {a: 1.0, b: 0.5}`",),
        )

    def _metric(self, name: str) -> float:
        if name not in self.metrics:
            raise InvalidInputError(
                f"the objective `{name}` is none of what the evaluator returns: {', '.join(sorted(self.metrics))}",
                kind="no-objective",
            )
        return self.metrics[name]


def evaluate(evaluator: Evaluator, candidate: Candidate) -> Score:
    """Ask for a score. Whatever goes wrong in an evaluator (an exception, NaN, something that is no score) is a failed one."""
    try:
        return score_of(evaluator(candidate))
    except Exception as error:
        return Score(failure=first_line(error)[:FAILURE_CHARS_MAX])


def score_of(answer: object) -> Score:
    """The score that an answer is; a failed one for NaN, infinity, or what is no answer."""
    found: dict[Any, Any] = dict(answer) if isinstance(answer, Mapping) else {SCORE: answer}
    examples = found.pop(EXAMPLES, None)
    try:
        metrics = {str(name): float(value) for name, value in found.items()}
        each = () if examples is None else tuple(float(value) for value in examples)
    except (TypeError, ValueError):
        return Score(failure=f"the evaluator returned {str(answer)[:OUTPUT_SHOWN_MAX]!r}, which is no score")
    odd = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    odd += [f"{EXAMPLES}[{i}] is {value}" for i, value in enumerate(each) if not math.isfinite(value)][:1]
    if odd or not metrics:
        return Score(failure=", ".join(odd) or "the evaluator returned no metric")
    return Score(metrics=metrics, examples=each)


def given(evaluator: Evaluator) -> Given:
    """What an evaluator is to be given."""
    return "checkpoint" if getattr(evaluator, "given", "memory") == "checkpoint" else "memory"


def name_of(evaluator: Evaluator | None) -> str:
    """What is recorded of it."""
    if evaluator is None:
        return ""
    return str(getattr(evaluator, "label", "") or getattr(evaluator, "__qualname__", type(evaluator).__qualname__))


@dataclass(frozen=True)
class on_checkpoint:  # noqa: N801  # a decorator
    """An evaluator out of a function of (url, step) of a checkpoint on disk, which is removed afterwards."""

    function: Callable[[str, int], float | Mapping[str, Any]]
    given: Given = "checkpoint"

    @property
    def label(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__qualname__))

    def __call__(self, candidate: Candidate, /) -> float | Mapping[str, Any]:
        return self.function(candidate.url, candidate.step)


@dataclass(frozen=True, kw_only=True)
class Command:
    """An evaluator that runs a command for each candidate, a checkpoint on disk.

    `{url}` and `{step}` in its words stand for the checkpoint. The last line that it writes to stdout is the score: a number, or
    a JSON object of metrics. Another exit code than 0, or no end within `timeout_s`, is a failed evaluation.
    """

    words: tuple[str, ...]
    timeout_s: float = COMMAND_TIMEOUT_S
    given: Given = "checkpoint"

    def __post_init__(self) -> None:
        if not self.words or not any("{url}" in word for word in self.words):
            raise InvalidInputError(
                f"the command of an evaluator must have `{{url}}` in its words, found {shlex.join(self.words)!r}",
                kind="bad-evaluator",
                hints=("for example: python evaluate.py {url} {step}",),
            )
        if not self.timeout_s > 0:
            raise InvalidInputError(f"`timeout_s` must be above 0, found {self.timeout_s}", kind="bad-evaluator")

    @property
    def label(self) -> str:
        return shlex.join(self.words)

    def __call__(self, candidate: Candidate, /) -> float | Mapping[str, Any]:
        code, out, err = _run(_filled(self.words, candidate.url, candidate.step), self.timeout_s)
        if code is None:
            raise CheckpointError(f"`{self.label}` did not end within {self.timeout_s:g} s")
        if code:
            raise CheckpointError(
                f"`{self.label}` ended with exit code {code}: {(err or out).strip()[-OUTPUT_SHOWN_MAX:]}"
            )
        return _parsed(out, self.label)


def _run(words: Sequence[str], timeout_s: float) -> tuple[int | None, str, str]:
    """Exit code (None: it did not end in time), stdout, stderr. In a session of its own, so that all of it ends with it."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        return None, "", ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _filled(words: Sequence[str], url: str, step: int) -> list[str]:
    return [word.replace("{url}", url).replace("{step}", str(step)) for word in words]


def _parsed(output: str, label: str) -> float | Mapping[str, Any]:
    last = output.strip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, (int, float, dict)):
        raise CheckpointError(
            f"the last line of `{label}` is no number and no JSON object: {last[:OUTPUT_SHOWN_MAX]!r}"
        )
    return found
