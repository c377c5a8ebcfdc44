"""The failure drill: a real job under a random schedule of faults comes back whole each time (drill.py).

A few seeds in the normal suite; hours with CKPT_TEST_DRILL_SECONDS (of each seed), CKPT_TEST_DRILL_SEEDS (`7,8,9`, or a number of
them from the clock as `20*`). A failure names its seed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.drill.drill import Drill
from tests.drill.job import Job

SECONDS = float(os.environ.get("CKPT_TEST_DRILL_SECONDS", "15"))
_GIVEN = os.environ.get("CKPT_TEST_DRILL_SEEDS", "1,2,3")
SEEDS = (
    [time.time_ns() % 10**9 + i for i in range(int(_GIVEN[:-1]))]
    if _GIVEN.endswith("*")
    else [int(seed) for seed in _GIVEN.split(",")]
)


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_comes_back_is_what_was_saved_and_never_older_than_what_was_reported(seed: int, tmp_path: Path) -> None:
    num_nodes = 3 + seed % 2
    job = Job(tmp_path, num_nodes, parity=1 if num_nodes == 3 else 1 + seed % 4 // 2)
    print(f"drill: seed {seed}, {num_nodes} nodes, parity {job.parity}, {SECONDS:.0f} s")  # noqa: T201 - shown on failure
    drill = Drill(job, seed, tell=lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True))  # noqa: T201
    try:
        drill.run(SECONDS)
    except AssertionError as error:
        again = f"CKPT_TEST_DRILL_SEEDS={seed} CKPT_TEST_DRILL_SECONDS={SECONDS:.0f} pytest -s tests/drill"
        raise AssertionError(f"{error}\nrun again: {again}") from error
    finally:
        job.close()
    print(dict(drill.done))  # noqa: T201 - what this seed has tried
    assert drill.done["from memory"] > 0 or job.lives < 8, "the drill has recovered nothing out of memory"
