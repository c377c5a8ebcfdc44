"""Real agents with real snapshots, without a job: a stored checkpoint is cut for many ranks, and each rank's image is given to an
agent of its own, on a "node" of its own (folders of its own), as a trainer would.

`ckpt.engine.reshard` makes the images and receipts; everything after that is what a trainer's `Tier` asks of its agent.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.agent import blob, discover, protect
from ckpt.agent.identity import Identity, run_id_of
from ckpt.agent.local import Client
from ckpt.agent.owner import Owner
from ckpt.agent.spawn import start_or_adopt
from ckpt.commit.complete import Request
from ckpt.config import AGENT_RECORD_BYTES_MAX, Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import _Reshard, plan_reshard
from ckpt.engine.substitute import only
from ckpt.format import receipt
from ckpt.format.receipt import Receipt
from ckpt.layout.layout import Layout
from ckpt.store.posix import PosixStore
from tests.agent.conftest import until

SECRET = bytes(range(32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """One rank's part of a checkpoint."""

    image: bytes
    receipt: bytes
    request: Request
    attempt: str


def cut(url: Path, step: int, layout: Layout, folder: Path, *, metrics: dict[str, float] | None = None) -> list[Cut]:
    """The images and receipts of `step` of `url`, as the ranks of `layout` would have made them."""
    options = Options()
    stored = StoredCheckpoint(PosixStore(url, options=options), step, options)
    into = PosixStore(folder, options=options)
    plan = plan_reshard(stored, layout, options=options)
    run = _Reshard(plan, into, options, 1 << 30, lambda nbytes: None)
    run.run()
    request = Request(
        step=step, metrics=metrics or {}, metadata=dict(stored.manifest.metadata), layout=stored.manifest.layout
    )
    out = []
    for image in plan.images:
        found: Receipt = run._receipt(image)
        assert found.image is not None
        held = {found.image.specs[tensor].name for tensor in found.image.rows.tensor.tolist()}
        found = only(found, held.__contains__)  # a rank of a job knows the tensors of its own state
        data = into.read(f"{run._folder}/{found.file}")
        out.append(Cut(image=data, receipt=receipt.pack(found), request=request, attempt=run._attempt))
    return out


class Node:
    """One node with one agent, and the trainer's connection to it."""

    def __init__(self, number: int, url: str, **options: Any) -> None:
        self.runtime = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
        self.memory = Path(tempfile.mkdtemp(prefix="ckpt-test-", dir="/dev/shm"))
        self.number = number
        given = {"agent_reserve_bytes": 0, "agent_lease_s": 60.0, "agent_stop_grace_s": 5.0, **options}
        self.options = Options(
            agent_runtime_folder=str(self.runtime), agent_memory_folder=str(self.memory), peer_connect_s=2.0, **given
        )
        self.identity = Identity(run_id=run_id_of(url), rank=0, world=1)
        self.client: Client = start_or_adopt(self.identity, self.options)
        self.pid = int(self.client.agent["pid"])
        params = {"secret": SECRET.hex(), "host": "127.0.0.1", "port": 0}
        self.address = str(self.client.call("listen", params)[0]["address"])

    def environment(self) -> dict[str, str]:
        """Of a command that runs on this node."""
        return {
            "CKPT_AGENT_RUNTIME_FOLDER": str(self.runtime),
            "CKPT_AGENT_MEMORY_FOLDER": str(self.memory),
            "CKPT_PEER_CONNECT_S": "2",
        }

    def join(self, *, world: int, members: Sequence[int], parity: int, addresses: dict[str, str], nbytes: int) -> None:
        room = protect.nbytes_needed(nbytes, num_members=len(members), parity=parity) + AGENT_RECORD_BYTES_MAX
        self.mapped = {one.name: one for one in self.client.reserve(nbytes + (1 << 20))}
        given = {"members": list(members), "parity": parity, "addresses": addresses, "parity_bytes": room}
        self.client.call("join", {"rank": self.number, "world": world, **given})

    def keep(self, part: Cut) -> None:
        began = self.client.begin(part.request.step, part.attempt)
        data = part.image + blob.pack_rest(part.receipt, part.request)
        memory = np.frombuffer(self.mapped[began.name].memory, np.uint8)
        memory[: len(data)] = np.frombuffer(data, np.uint8)
        del memory
        given = {"name": began.name, "generation": began.generation, "blob_bytes": len(data)}
        self.client.call("keep", {**given, "image_bytes": len(part.image), "changed": False})

    def state_of(self, part: Cut) -> str:
        return str(self.client.call("progress", {"step": part.request.step, "attempt": part.attempt})[0]["state"])

    def leave(self) -> None:
        """The trainer is gone; the agent stays."""
        for one in self.mapped.values():
            one.close()
        self.client.close()

    def kill(self) -> None:
        """The node is gone, its memory too."""
        os.kill(self.pid, signal.SIGKILL)
        until(lambda: Owner.of(self.pid) is None)
        shutil.rmtree(self.memory)

    def wake(self) -> None:
        """Go on, if somebody has stopped it."""
        if Owner.of(self.pid) is not None:
            os.kill(self.pid, signal.SIGCONT)

    def clean(self) -> None:
        self.client.close()
        try:
            for found in discover.agents(self.options):
                discover.stop(found, self.options, force=True)
            left = [path.name for path in self.memory.rglob("*.seg")] if self.memory.exists() else []
        finally:
            shutil.rmtree(self.memory, ignore_errors=True)
            shutil.rmtree(self.runtime, ignore_errors=True)
        assert left == []


class Cluster:
    """Nodes, a rank on each, in groups. A context manager."""

    def __init__(self, url: str, groups: Sequence[Sequence[int]], parity: int, **options: Any) -> None:
        self.groups, self.parity = groups, parity
        self.nodes: list[Node] = []
        try:
            for number in range(sum(len(group) for group in groups)):
                self.nodes.append(Node(number, url, **options))
        except BaseException:
            self.close()
            raise

    def join(self, nbytes: int) -> None:
        addresses = {str(node.number): node.address for node in self.nodes}
        for group in self.groups:
            for rank in group:
                self.nodes[rank].join(
                    world=len(self.nodes), members=group, parity=self.parity, addresses=addresses, nbytes=nbytes
                )

    def keep(self, parts: Sequence[Cut]) -> None:
        """Each rank's part into its agent; returns when all are protected."""
        for node, part in zip(self.nodes, parts, strict=True):
            node.keep(part)
        pairs = list(zip(self.nodes, parts, strict=True))
        until(lambda: all(node.state_of(part) != "protecting" for node, part in pairs))
        assert [node.state_of(part) for node, part in pairs] == ["protected"] * len(pairs)

    def leave(self) -> None:
        for node in self.nodes:
            node.leave()

    def close(self) -> None:
        for node in self.nodes:
            node.wake()
        errors = [error for node in self.nodes if (error := _failure(node.clean)) is not None]
        if errors:
            raise errors[0]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _failure(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the other nodes are to be cleaned as well
        return error
    return None
