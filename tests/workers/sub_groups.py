"""Worlds of sub-groups whose members are in different numbers of groups. All functions on all ranks together."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from ckpt.engine.torch_world import current_world


def members_of_other_groups_too() -> list[list[int]]:
    """Ranks 0 and 1 exchange twice over worlds of their own; rank 0 is in one group more. What each world gathered."""
    alone, both = dist.new_group([0]), dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return []
    assert (alone is not dist.GroupMember.NON_GROUP_MEMBER) == (dist.get_rank() == 0)
    out = []
    for _ in range(2):
        answers = current_world(both, 10.0).all_gather(np.array([dist.get_rank()], np.uint8))
        out.append([int(answer[0]) for answer in answers])
    return out
