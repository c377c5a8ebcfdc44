"""One rank of the drill's job: a state that follows from the step alone, kept in memory and in a store.

Run: `python -m tests.drill.trainer`. Imports once, then forks a trainer for every line of JSON that it reads, and prints its pid.
A trainer tells what happens in JSON lines in a file of its own. Ends when told to stop, or killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ckpt
from ckpt.agent import tier
from ckpt.config import Memory
from ckpt.engine.pending import PendingSave
from ckpt.errors import CheckpointError, StoreError
from ckpt.store.posix import PosixStore

EVERY, MEMORY_EVERY = 120, 4  # steps between saves to the store, and to memory
LENGTHS = (1, 4097, 0, 2048, 8192, 513)  # of the tensors that all ranks have
OWN_LENGTH = 3000  # of the one that each rank has for itself


def state_at(step: int, rank: int) -> dict[str, Any]:
    """What a rank has after `step` steps."""
    state = first_state(rank)
    for number in range(1, step + 1):
        advance(state, number)
    return state


def first_state(rank: int) -> dict[str, Any]:
    shared = {f"t{i}": torch.arange(i, i + length, dtype=torch.int64) for i, length in enumerate(LENGTHS)}
    return {"model": shared, "own": {f"r{rank}": torch.arange(OWN_LENGTH, dtype=torch.int64) * (rank + 1)}}


def advance(state: dict[str, Any], step: int) -> None:
    """One step: whole numbers, so that it gives the same bits wherever and however often it is done."""
    for part in state.values():
        for tensor in part.values():
            tensor.mul_(6364136223846793005).add_(2 * step + 1)


def differences(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of tensors that are not equal, bit for bit."""
    return [
        f"{part}/{name}"
        for part, tensors in expected.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, state[part][name])
    ]


class Trainer:
    """One rank, one life."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given, self.rank = given, int(given["rank"])
        self._log = os.open(given["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._pending: list[PendingSave] = []

    def tell(self, event: str, **fields: Any) -> None:
        """One line, whole, so that a kill leaves no half of one but at the end."""
        line = json.dumps({"event": event, "rank": self.rank, "at": time.time(), **fields})
        os.write(self._log, line.encode() + b"\n")

    def run(self) -> None:
        given = self._given
        dist.init_process_group(
            "gloo", init_method=f"file://{given['meet']}", rank=self.rank, world_size=int(given["world"])
        )
        memory = Memory(
            every=MEMORY_EVERY, parity=int(given["parity"]), group_size=int(given["world"]), address="127.0.0.1"
        )
        checkpointer = ckpt.Checkpointer(given["url"], every=EVERY, memory=memory)
        state = first_state(self.rank)
        step = checkpointer.restore(state)
        restored = checkpointer.restored
        wrong = [] if step is None else differences(state, state_at(step, self.rank))
        self.tell(
            "restored",
            step=step,
            tier=None if restored is None else restored.tier,
            wrong=wrong,
            passed_over=[] if restored is None else list(restored.passed_over),
        )
        if step is None:
            state = first_state(self.rank)
        self._train(checkpointer, state, step or 0)
        checkpointer.close()
        self.tell("closed")

    def _train(self, checkpointer: ckpt.Checkpointer, state: dict[str, Any], step: int) -> None:
        stop = Path(self._given["stop"])
        while True:
            word = torch.tensor([stop.exists()], dtype=torch.int64)
            dist.all_reduce(word)
            self._report()
            if word.item():
                break
            step += 1
            advance(state, step)
            time.sleep(self._given["step_s"])
            try:
                pending = checkpointer.step(step, state)
            except CheckpointError as error:
                self.tell("refused", step=step, error=error.message)
                continue
            if pending is not None:
                self._pending.append(pending)
                self.tell("began", step=step, skipped=pending.skipped)

    def _report(self) -> None:
        """What is durable by now, and what failed."""
        for pending in [one for one in self._pending if one.done()]:
            self._pending.remove(pending)
            error = pending.failure()
            if error is None:
                self.tell("durable", step=pending.step, tier=pending.wait().tier)
            elif not pending.skipped:
                self.tell("failed", step=pending.step, error=str(error))


def through_link(real: str, link: str) -> None:
    """Peers reach this rank's agent by `link`, which forwards to the address in the file `real`."""
    listen, join = tier.Tier._listen, tier.Tier._join_run

    def linked_listen(self: tier.Tier, client: Any, *, port: int) -> str:
        address = listen(self, client, port=0)
        Path(f"{real}.new").write_text(address)
        os.replace(f"{real}.new", real)
        return link

    def linked_join(self: tier.Tier, epoch: int, mine: Any) -> dict[str, Any]:
        found = join(self, epoch, mine)
        address = Path(real).read_text()
        held = [{**one, "address": link if one["address"] == address else one["address"]} for one in found["held"]]
        return {**found, "address": link, "held": held}

    tier.Tier._listen, tier.Tier._join_run = linked_listen, linked_join  # type: ignore[method-assign]


def store_may_be_away(url: Path) -> None:
    """To the trainers a store whose folder is gone (`Job.store_away`) is one that does not answer, and not an empty one."""
    found, folders = PosixStore.exists, PosixStore.list_folders

    def refuse() -> None:
        if url.is_file():
            raise StoreError(f"`{url}` does not answer", kind="unreachable")

    def exists(self: PosixStore, key: str) -> bool:
        refuse()
        return found(self, key)

    def list_folders(self: PosixStore, prefix: str) -> Any:
        refuse()
        return folders(self, prefix)

    PosixStore.exists, PosixStore.list_folders = exists, list_folders  # type: ignore[method-assign]


def live(given: dict[str, Any]) -> None:
    """The life of a forked trainer."""
    os.environ.update(given["environment"])
    os.setsid()
    trainer = Trainer(given)
    output = os.open(given["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    through_link(given["real"], given["link"])
    store_may_be_away(Path(given["url"]))
    try:
        trainer.run()
    except BaseException as error:
        traceback.print_exc()
        trainer.tell("ended", error=f"{type(error).__name__}: {error}", kind=getattr(error, "kind", ""))
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who is dead is gone
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            live(json.loads(line))
        print(pid, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
