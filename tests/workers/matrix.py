"""What the ranks of the layout matrix run: save every layout, load every saved run onto every layout.

All functions are called on all ranks together. What they return goes back to the test process.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

import ckpt
from ckpt.config import Options
from tests.workers import layouts
from tests.workers import model as net

STEP = 41
# The gap that is read over is meant for tensors of megabytes; against tensors of a kilobyte it would hide what is counted.
# On one host "auto" may read twice what several ranks want; "always" is what ranks of several hosts do.
OPTIONS = Options(
    commit_timeout_s=20.0, outcome_grace_s=5.0, exchange_timeout_s=30.0, read_gap_bytes_max=1, exchange="always"
)


def save_all(root: str, kinds: Sequence[str] = (), options: Options = OPTIONS) -> dict[str, str]:
    """Save these layouts (all of this number of ranks when none) to runs of their own; kind -> "" or what went wrong."""
    out = {}
    world = dist.get_world_size()
    for kind in kinds or layouts.LAYOUTS[world]:
        try:
            job = layouts.build(kind, filled=True)
            wrong = layouts._param_faults(job)  # the source itself must be right, else the matrix says nothing
            problems = [f"before the save: {fault}" for fault in wrong]
            ckpt.save(job.state, f"{root}/{kind}-{world}", step=STEP, layout=job.layout, options=options)
            out[kind] = "; ".join(problems)
        except Exception:
            out[kind] = traceback.format_exc()
    return out


def load_all(
    root: str, work: list[tuple[tuple[str, int], list[str]]], options: Options = OPTIONS
) -> list[dict[str, Any]]:
    """Load each source onto its targets; one record per pair."""
    rank = dist.get_rank()
    logging.getLogger("ckpt").setLevel(logging.ERROR)  # that random streams end or are new, some hundred times
    jobs = {kind: layouts.build(kind, filled=False) for kind in sorted({kind for _, kinds in work for kind in kinds})}
    out = []
    for number, ((source, source_world), kinds) in enumerate(work):
        for kind in kinds:
            job = jobs[kind]
            record: dict[str, Any] = {"source": source, "source_world": source_world, "target": kind, "faults": []}
            layouts.scramble(job, drop_slots=bool(number % 2))
            saved_dp = data_parallel(source, source_world)
            try:
                loaded = ckpt.load(
                    job.state, f"{root}/{source}-{source_world}", step=STEP, layout=job.layout, options=options
                )
                record |= {
                    "wanted": loaded.wanted_nbytes, "read": loaded.read_nbytes, "exchanged": loaded.exchanged
                }  # fmt: skip
                record["faults"] = layouts.faults(job, (source_world, saved_dp, rank))
            except Exception:
                record["faults"] = [traceback.format_exc()]
            out.append(record)
    return out


def load_model(url: str) -> dict[str, list[str]]:
    """Load the model and the optimizer of a checkpoint onto every layout of these ranks; what is wrong, by kind."""
    out: dict[str, list[str]] = {}
    for kind in layouts.LAYOUTS[dist.get_world_size()]:
        job = layouts.build(kind, filled=False)
        layouts.scramble(job, drop_slots=False)
        state = {name: job.state[name] for name in ("model", "optimizer")}
        ckpt.load(state, url, step=STEP, layout=job.layout, options=OPTIONS)
        out[kind] = [*layouts._param_faults(job), *layouts._slot_faults(job)]
    return out


def all_against_all(root: str, kinds: list[str], factor: int) -> list[dict[str, Any]]:
    """Save and load between layouts of these ranks, of a model that is larger, with gaps read over."""
    world = dist.get_world_size()
    options = Options(commit_timeout_s=20.0, outcome_grace_s=5.0, exchange_timeout_s=30.0, exchange="always")
    with net.scaled(factor):
        problems = save_all(root, kinds, options)
        assert not any(problems.values()), problems
        return load_all(root, [((kind, world), kinds) for kind in kinds], options)


def data_parallel(kind: str, world: int) -> int:
    """Number of data-parallel ranks of a layout."""
    if kind in ("single", "tp", "pp", "megatron"):
        return 1
    return world // 2 if kind in ("tp_fsdp2", "pp_fsdp2") else world
