"""Saves that are killed or that fail: what the ranks run. The state is a function of the step, so anyone can check a file."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ckpt
import ckpt.api
import ckpt.engine.load
import ckpt.engine.run
from ckpt import failpoints
from ckpt.config import Options
from ckpt.errors import CheckpointError
from ckpt.layout.box import Box
from ckpt.store.testing import FaultyStore, parse_script

COMMIT_TIMEOUT_S = 3.0
OUTCOME_GRACE_S = 1.0
EXCHANGE_TIMEOUT_S = 30.0
SHORT_EXCHANGE_TIMEOUT_S = 4.0  # where a rank is missing in it
ROWS, COLUMNS = 96, 64
PATIENT = Options(exchange_timeout_s=EXCHANGE_TIMEOUT_S, commit_timeout_s=30.0, chunk_bytes=4096, poll_max_s=0.05)
OPTIONS = dataclasses.replace(PATIENT, commit_timeout_s=COMMIT_TIMEOUT_S, outcome_grace_s=OUTCOME_GRACE_S)
SCRIPTED = dataclasses.replace(OPTIONS, events=False)  # the log would take a share of the scripted faults
SHORT_REQUESTS = dataclasses.replace(OPTIONS, store_attempts=2, connect_timeout_s=1.0, read_timeout_s=2.0)

Outcome = dict[str, Any]


def state_of(step: int) -> dict[str, Any]:
    """A tensor cut over the ranks, one that all have, and an object."""
    rank, each = dist.get_rank(), ROWS // dist.get_world_size()
    # Annotated, not a DTensor: the first one costs half a second of imports, and here processes live for one save.
    cut = cut_values(step)[rank * each : (rank + 1) * each].clone()
    box = Box(offsets=(rank * each, 0), lengths=(each, COLUMNS))
    return {
        "cut": ckpt.annotate(cut, shape=(ROWS, COLUMNS), boxes=[(box, (0, 0))]),
        "whole": torch.arange(50.0) + step,
        "progress": {"step": step},
    }


def cut_values(step: int) -> torch.Tensor:
    """The whole of the tensor that is cut."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 1000 * step


def change_to(state: dict[str, Any], step: int) -> None:
    """The state of another step, in place."""
    rank, each = dist.get_rank(), ROWS // dist.get_world_size()
    state["cut"].copy_(cut_values(step)[rank * each : (rank + 1) * each])
    state["whole"].copy_(torch.arange(50.0) + step)
    state["progress"] = {"step": step}


def die_in_second_save(url: str, mode: str, failpoint_of: dict[int, str]) -> Outcome:
    """Save step 1, then step 2 with a failpoint on some ranks. What became of it on a rank that lives."""
    state = state_of(1)
    ckpt.save(state, url, step=1, options=PATIENT)
    change_to(state, 2)
    options = OPTIONS  # another run object: ranks exchange again
    if mode == "steady":  # no exchange: the session of step 1 goes on, with deadlines that a test can wait for
        session = ckpt.api._run_of(url, None, PATIENT, None)._session
        session._options = session._completion._options = OPTIONS
        options = PATIENT
    failpoints.reset()
    text = failpoint_of.get(dist.get_rank())
    if text is not None:
        os.environ["CKPT_FAILPOINT"], os.environ["CKPT_FAILPOINT_RANK"] = text, os.environ["RANK"]
    return outcome_of(lambda: _save(state, url, 2, mode, options))


def outcome_of(call: Any) -> Outcome:
    """What a call came to, as plain values."""
    start = time.monotonic()
    out: Outcome = {"error": "", "kind": "", "message": ""}
    try:
        call()
    except CheckpointError as error:
        out = {"error": type(error).__name__, "kind": error.kind, "message": str(error)}
    return out | {"seconds": time.monotonic() - start}


def _save(state: dict[str, Any], url: str, step: int, mode: str, options: Options = OPTIONS) -> None:
    if mode == "async":
        ckpt.async_save(state, url, step=step, options=options).wait(60.0)
    else:
        ckpt.save(state, url, step=step, options=options)


# Ranks that are missing while the others exchange


def die_before_first_save(url: str, with_group: bool) -> Outcome:
    """Rank 1 is gone when rank 0 waits for it. `with_group`: it dies after ckpt's own group was made."""
    state = state_of(1)
    options = dataclasses.replace(OPTIONS, exchange_timeout_s=SHORT_EXCHANGE_TIMEOUT_S)
    if with_group:
        ckpt.api._run_of(url, None, options, None)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome_of(lambda: ckpt.save(state, url, step=1, options=options))


def stop_before_first_save(url: str, with_group: bool) -> Outcome:
    """Rank 1 is there and does nothing for longer than rank 0 waits. `with_group`: it is there for ckpt's own group."""
    state = state_of(1)
    options = dataclasses.replace(OPTIONS, exchange_timeout_s=SHORT_EXCHANGE_TIMEOUT_S)
    if with_group:
        ckpt.api._run_of(url, None, options, None)
    if dist.get_rank() == 1:
        time.sleep(SHORT_EXCHANGE_TIMEOUT_S + 3.0)
    return outcome_of(lambda: ckpt.save(state, url, step=1, options=options))


def die_in_load(url: str) -> Outcome:
    """Rank 1 is killed when it is about to read, rank 0 waits for it after its own reads."""
    state = state_of(1)
    ckpt.save(state, url, step=1, options=PATIENT)
    if dist.get_rank() == 1:
        ckpt.engine.load.read_together = lambda *_a, **_k: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    return outcome_of(lambda: ckpt.load(state, url, options=OPTIONS))


# Stores that fail


def store_hiccup_in_steady_state(url: str, script: str, methods: list[str]) -> list[Outcome]:
    """Steps 1 to 3 in one session, the store failing for rank 1 in step 2 only."""
    state = state_of(1)
    faulty: list[FaultyStore] = []
    plain = ckpt.engine.run.open_store
    if dist.get_rank() == 1:

        def open_faulty(*args: Any, **kwargs: Any) -> FaultyStore:
            faulty.append(FaultyStore(plain(*args, **kwargs), "", methods=frozenset(methods)))
            return faulty[0]

        ckpt.engine.run.open_store = open_faulty  # type: ignore[assignment]
    with ckpt.Checkpointer(url, every=1, background=False, options=SCRIPTED) as run:
        run.step(1, state)
        if faulty:
            faulty[0]._script = parse_script(script)
        change_to(state, 2)
        second = outcome_of(lambda: run.step(2, state))
        if faulty:
            faulty[0]._script = []
        change_to(state, 3)
        dist.barrier()
        return [second, outcome_of(lambda: run.step(3, state))]


def scripted_second_save(url: str, script_of: dict[int, tuple[str, list[str]]], mode: str) -> Outcome:
    """Save step 1, then step 2 on a store that follows a script on some ranks."""
    state = state_of(1)
    ckpt.save(state, url, step=1, options=PATIENT)
    change_to(state, 2)
    dist.barrier()
    plain = ckpt.engine.run.open_store
    if dist.get_rank() in script_of:
        script, methods = script_of[dist.get_rank()]
        ckpt.engine.run.open_store = lambda *a, **k: FaultyStore(plain(*a, **k), script, methods=frozenset(methods))  # type: ignore[assignment,return-value]
    try:
        run = ckpt.Checkpointer(url, every=1, background=mode == "async", options=SCRIPTED)
        return outcome_of(lambda: _wait(run.step(2, state)))
    finally:
        ckpt.engine.run.open_store = plain


def _wait(pending: Any) -> None:
    pending.wait(60.0)


def file_too_large_on_rank_1(url: str) -> Outcome:
    """The kernel refuses the write that would go over the limit: a full disk as the process sees it."""
    state = state_of(1)
    ckpt.save(state, url, step=1, options=PATIENT)
    change_to(state, 2)
    dist.barrier()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))
    try:
        return outcome_of(lambda: _save(state, url, 2, "sync"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def nobody_may_write(url: str) -> Outcome:
    """The folder is not ours. As root that takes another user; the folder is given up by whoever owns it otherwise."""
    state = state_of(1)
    ckpt.save(state, url, step=1, options=PATIENT)
    change_to(state, 2)
    dist.barrier()
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            return outcome_of(lambda: _save(state, url, 2, "sync"))
        finally:
            os.seteuid(0)
    os.chmod(url, 0o555)
    dist.barrier()
    try:
        return outcome_of(lambda: _save(state, url, 2, "sync"))
    finally:
        os.chmod(url, 0o755)


def save_one(url: str, step: int, short: bool) -> Outcome:
    """Save one step; for a server that the test process stops in between. `short`: give up on requests soon."""
    return outcome_of(lambda: ckpt.save(state_of(step), url, step=step, options=SHORT_REQUESTS if short else PATIENT))


def check(checkpoint: Any, step: int) -> None:
    """An open checkpoint holds exactly what `state_of(step)` held."""
    assert checkpoint.step == step
    assert np.array_equal(checkpoint["cut"][...].numpy(), cut_values(step).numpy())
    assert np.array_equal(checkpoint["whole"][...].numpy(), np.arange(50.0, dtype=np.float32) + step)
