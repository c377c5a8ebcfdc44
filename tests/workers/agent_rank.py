"""A rank under torchrun that saves step 7 into its agent, begins step 8, says so in a file, and waits to be killed.

`python -m torch.distributed.run ... -m tests.workers.agent_rank FOLDER RUN_ID OPTIONS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from ckpt.agent.identity import Identity
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import Options

NBYTES = 64 * 1024
ALONE_S = 60.0  # a rank that nobody kills


def main(folder: str, run_id: str, options: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(torch.ones(1))  # threads, sockets and all else that an agent must not inherit are there
    client = start_or_adopt(Identity(run_id=uuid.UUID(run_id), rank=rank, world=world), Options(**json.loads(options)))
    mapped = {one.name: one for one in client.reserve(NBYTES)}
    began = client.begin(7, "attempt-7")
    mapped[began.name].memory[:NBYTES] = bytes([rank + 1]) * NBYTES
    client.seal(began, NBYTES)
    mapped[client.begin(8, "attempt-8").name].memory[:NBYTES] = b"\xff" * NBYTES
    told = {"rank": rank, "pid": os.getpid(), "agent_pid": client.agent["pid"]}
    path = Path(folder) / f"{rank}.new"
    path.write_text(json.dumps(told))
    path.rename(path.with_suffix(".json"))
    time.sleep(ALONE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
