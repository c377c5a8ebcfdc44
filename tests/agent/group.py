"""A group of real agents, and their trainers' side of it, without a training job: what is kept is any bytes.

In: options and how the ranks are grouped. Out: agents that have joined. One owner; `close` ends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckpt.agent.identity import Identity
from ckpt.agent.inventory import Inventory
from ckpt.agent.local import Client, Mapped
from ckpt.agent.owner import Owner
from ckpt.agent.pieces import Pieces
from ckpt.agent.protect import nbytes_needed
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import AGENT_RECORD_BYTES_MAX, Options
from ckpt.errors import CheckpointError
from tests.agent.conftest import kill_and_wait, until

IMAGE_BYTES = 100_000
SECRET = bytes(range(32)).hex()


class Rank:
    """One agent, and the connection of its trainer."""

    def __init__(self, identity: Identity, options: Options) -> None:
        self.identity, self.options = identity, options
        self.start()

    def start(self) -> None:
        """Start the agent, or another one in place of it."""
        self.client: Client = start_or_adopt(self.identity, self.options, epoch=1)
        self.address = self.client.call("listen", {"secret": SECRET, "host": "127.0.0.1", "port": 0})[0]["address"]
        self.mapped: dict[str, Mapped] = {}

    def join(self, members: Sequence[int], parity: int, addresses: Sequence[str], *, tell: bool = False) -> None:
        room = nbytes_needed(2 * IMAGE_BYTES, num_members=len(members), parity=parity) + AGENT_RECORD_BYTES_MAX
        self.mapped = {one.name: one for one in self.client.reserve(2 * IMAGE_BYTES + AGENT_RECORD_BYTES_MAX)}
        known = {str(rank): address for rank, address in enumerate(addresses)}
        params = {"rank": self.identity.rank, "world": len(addresses), "members": list(members), "parity": parity}
        told = {"tell": known} if tell else {}
        self.client.call("join", {**params, "addresses": known, "parity_bytes": room, **told})

    def keep(self, step: int, *, flips_at: int | None = None) -> None:
        """Stage bytes of this rank and step, and hand them over.

        Args:
            flips_at: a byte of which a bit flips, once the trainer has summed it up and before the agent hears of it.
        """
        began = self.client.begin(step, attempt(step))
        content = np.random.default_rng((self.identity.rank, step)).integers(0, 256, IMAGE_BYTES, np.uint8)
        memory = np.frombuffer(self.mapped[began.name].memory, np.uint8)
        memory[:IMAGE_BYTES] = content
        summed = Pieces.of(content.data).tell(memory[IMAGE_BYTES:].data)
        if flips_at is not None:
            memory[flips_at] ^= 1
        self.client.call(
            "keep",
            {
                "name": began.name,
                "generation": began.generation,
                "image_bytes": IMAGE_BYTES,
                "blob_bytes": IMAGE_BYTES,
                "changed": False,
                "summed": summed,
            },
        )

    def state(self, step: int) -> str:
        """How far the protection of a step is."""
        return str(self.client.call("progress", {"step": step, "attempt": attempt(step)})[0]["state"])

    def inventory(self) -> Inventory:
        return Inventory.from_fields(self.client.call("inventory")[0])

    def kill(self) -> None:
        kill_and_wait(self.client.agent["pid"])
        self.client.close()


class Group:
    """Ranks of one run. `groups` are the members of each; `options` may differ by rank."""

    def __init__(
        self,
        options: Options,
        groups: Sequence[Sequence[int]],
        *,
        run_id: uuid.UUID | None = None,
        **changes: dict[int, Any],
    ) -> None:
        """
        Args:
            run_id: of agents that may live already.
        """
        self.groups, self.world = groups, sum(map(len, groups))
        run = run_id or uuid.uuid4()
        self.ranks = []
        for rank in range(self.world):
            mine = {name: values[rank] for name, values in changes.items() if rank in values}
            identity = Identity(run_id=run, rank=rank, world=self.world)
            self.ranks.append(Rank(identity, dataclasses.replace(options, **mine)))
        for rank in range(self.world):
            self.join(rank)

    def join(self, rank: int, *, tell: bool = False) -> None:
        members = next(group for group in self.groups if rank in group)
        self.ranks[rank].join(members, 1, [one.address for one in self.ranks], tell=tell)

    def states(self, step: int) -> list[str]:
        return [one.state(step) for one in self.ranks]

    def until_decided(self, step: int, timeout_s: float = 60.0) -> list[str]:
        """The states of all ranks once none is under way."""
        until(lambda: "protecting" not in self.states(step), timeout_s)
        return self.states(step)

    def close(self) -> None:
        for one in self.ranks:
            with contextlib.suppress(CheckpointError):
                one.client.bye()
        for one in self.ranks:
            one.mapped.clear()
            until(lambda pid=one.client.agent["pid"]: Owner.of(pid) is None)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attempt(step: int) -> str:
    return f"{'0' * 16}-{step:06d}"


def quick(options: Options, **changes: Any) -> Options:
    """For tests that wait for what does not come."""
    return dataclasses.replace(options, protect_timeout_s=60.0, peer_connect_s=5.0, peer_progress_s=5.0, **changes)
