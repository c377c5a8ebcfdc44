"""Run one phase under torchrun, watch it, and leave no process behind.

In: a `Phase` and folders. Out: an `Outcome`, or DemoError with the tail of the job's output. Every wait has a deadline.
Kills only processes that it started, each by its id.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.rehearsal.phases import FAILPOINT, KILLED_RANK, SAVE_EVERY, Phase, Script

ROOT = Path(__file__).resolve().parents[2]
STALL_S = 180.0  # a job that makes no step for so long, its start included, has failed
PHASE_S = 900.0  # the longest that a phase may take
KILL_GRACE_S = 15.0  # between asking a job to stop and killing it
LOOK_S = 0.1  # between two looks at a job
KEPT_CHECKPOINTS = 4
TAIL_LINES = 40


class DemoError(Exception):
    """The demo did not show what it should; the message says what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one phase did."""

    phase: Phase
    losses: dict[int, float]  # by step
    seconds: float
    newest_checkpoint: int  # step of the newest complete one when the phase ended; 0: none


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """Where a running phase stands."""

    step: int
    loss: float | None
    newest_checkpoint: int


def run_phase(phase: Phase, script: Script, out: Path, watch: Callable[[Glimpse], None]) -> Outcome:
    """Run `phase` to its end, telling `watch` how it goes."""
    run = out / "runs" / phase.run
    if phase.fork_of is not None:
        shutil.copytree(out / "runs" / phase.fork_of, run)
    stem = phase.name.replace(" ", "-")
    loss_log, output = out / "logs" / f"{stem}.jsonl", out / "logs" / f"{stem}.txt"
    loss_log.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    with output.open("wb") as stream:
        job = subprocess.Popen(
            _command(phase, script, run, loss_log),
            cwd=ROOT,
            env=_environment(phase),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(job, phase, run, loss_log, output, watch)
        finally:
            stop(job)
    if phase.kill_at is None and job.returncode != 0:
        raise DemoError(f"phase `{phase.name}` failed with exit code {job.returncode}\n{_tail(output)}")
    outcome = Outcome(
        phase=phase,
        losses=_read_losses(loss_log),
        seconds=time.monotonic() - start_s,
        newest_checkpoint=newest_checkpoint(run),
    )
    check_course(outcome, run, job.returncode, output)
    return outcome


def newest_checkpoint(run: Path) -> int:
    """The step of the newest complete checkpoint of a run; 0 when there is none. Complete is what has a manifest."""
    return max(
        (int(manifest.parent.name.removeprefix("step-")) for manifest in run.glob("step-*/manifest.json")), default=0
    )


def _command(phase: Phase, script: Script, run: Path, loss_log: Path) -> list[str]:
    arguments = {
        "--layout": phase.layout,
        "--layers": script.layers,
        "--steps": script.steps,
        "--stop": phase.stop,
        "--checkpoints": run,
        "--every": SAVE_EVERY,
        "--keep-last": KEPT_CHECKPOINTS,
        "--loss-log": loss_log,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(phase.num_ranks)]
    return [*torchrun, "-m", "examples.gpt.train", *(str(word) for pair in arguments.items() for word in pair)]


def _environment(phase: Phase) -> dict[str, str]:
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if phase.kill_at is not None:
        changes["CKPT_FAILPOINT"] = f"{FAILPOINT}:kill@{phase.kill_at // SAVE_EVERY}"
        changes["CKPT_FAILPOINT_RANK"] = str(KILLED_RANK)
    return {**os.environ, **changes}


def _wait(
    job: subprocess.Popen[bytes],
    phase: Phase,
    run: Path,
    loss_log: Path,
    output: Path,
    watch: Callable[[Glimpse], None],
) -> None:
    """Until the job ends by itself; DemoError when it takes too long."""
    start_s = moved_s = time.monotonic()
    last = Glimpse(step=phase.resumes_from, loss=None, newest_checkpoint=0)
    while job.poll() is None:
        time.sleep(LOOK_S)
        losses = _read_losses(loss_log)
        step = max(losses, default=phase.resumes_from)
        glimpse = Glimpse(step=step, loss=losses.get(step), newest_checkpoint=newest_checkpoint(run))
        watch(glimpse)
        now_s = time.monotonic()
        moved_s = now_s if glimpse != last else moved_s
        last = glimpse
        if now_s - moved_s > STALL_S or now_s - start_s > PHASE_S:
            raise DemoError(
                f"phase `{phase.name}` stands at step {step} of {phase.stop}: no progress for {now_s - moved_s:.0f} s,"
                f" running for {now_s - start_s:.0f} s\n{_tail(output)}"
            )


def stop(job: subprocess.Popen[bytes]) -> None:
    """End the job and every process it started, if they still run."""
    if job.poll() is not None:
        return
    try:
        family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    except psutil.NoSuchProcess:  # it ended just now
        family = []
    job.terminate()  # torchrun passes it on
    try:
        job.wait(KILL_GRACE_S)
    except subprocess.TimeoutExpired:
        job.kill()
    _, alive = psutil.wait_procs(family, timeout=1.0)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait(KILL_GRACE_S)


def check_course(outcome: Outcome, run: Path, code: int, output: Path) -> None:
    """It began and ended where it should; where it was to be killed, it was, and the cut-off save does not show."""
    phase = outcome.phase
    first, last = min(outcome.losses, default=0), max(outcome.losses, default=0)
    if first != phase.resumes_from + 1:
        raise DemoError(
            f"phase `{phase.name}` should resume from step {phase.resumes_from}, its first step is {first}"
            f"\n{_tail(output)}"
        )
    if phase.kill_at is None:
        if (last, outcome.newest_checkpoint) != (phase.stop, phase.stop):
            raise DemoError(
                f"phase `{phase.name}` should end with step {phase.stop} and its checkpoint, found step {last} and the"
                f" checkpoint of step {outcome.newest_checkpoint}\n{_tail(output)}"
            )
        return
    if code == 0 or "exitcode  : -9" not in output.read_text(errors="replace"):
        raise DemoError(f"rank {KILLED_RANK} should die of SIGKILL; torchrun ended with {code}\n{_tail(output)}")
    if outcome.newest_checkpoint != phase.kill_at - SAVE_EVERY:
        raise DemoError(
            f"the newest checkpoint after the kill should be that of step {phase.kill_at - SAVE_EVERY}, found step"
            f" {outcome.newest_checkpoint}"
        )
    if not any((run / f"step-{phase.kill_at:012d}").rglob("*.safetensors*")):
        raise DemoError(f"the save of step {phase.kill_at} left no partial file: the kill was not in the middle of it")


def _read_losses(loss_log: Path) -> dict[int, float]:
    if not loss_log.exists():
        return {}
    # A line without its end is still being written.
    lines = loss_log.read_text().rpartition("\n")[0].splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def _tail(output: Path) -> str:
    lines = output.read_text(errors="replace").splitlines()
    # What torchrun says of the failure comes last and hides the failure itself.
    own = next((i for i, line in enumerate(lines) if "torch/distributed/elastic/" in line), len(lines)) or len(lines)
    shown = [f"    {line}" for line in lines[:own][-TAIL_LINES:]]
    return "\n".join([f"the end of its output ({output}):", *shown])
