"""A job under torchrun: `python -m torch.distributed.run ... -m tests.workers.torchrun_job ROOT SAVE_KIND LOAD_KIND`.

Saves one layout, loads it onto another, exits with 0 when nothing differs.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist

from tests.workers.matrix import load_all, save_all


def main(root: str, source: str, target: str) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    problems = [text for text in save_all(root, [source]).values() if text]
    records = [] if problems else load_all(root, [((source, dist.get_world_size()), [target])])
    problems += [fault for record in records for fault in record["faults"]]
    print("\n".join(problems), file=sys.stderr)
    dist.destroy_process_group()
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
