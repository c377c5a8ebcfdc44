"""A trainer to kill: `python -m tests.workers.agent_trainer`. Does what the lines on its stdin say, one JSON answer per line.

Each line is {"do": name, ...}; the functions below are the names. Imports no torch, so that it starts fast.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from typing import Any

from ckpt.agent.identity import Identity
from ckpt.agent.local import Client, Described, Mapped
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import Options
from ckpt.errors import CheckpointError

CHUNKS = 8


def image_of(step: int, nbytes: int) -> bytes:
    """The image of a step: every byte depends on the step and the place."""
    return bytes((step * 31 + place * 7) % 251 for place in range(1024)) * (nbytes // 1024)


class Trainer:
    """What it holds between two lines."""

    client: Client
    mapped: list[Mapped]
    began: Described

    def start(self, *, run_id: str, rank: int, world: int, options: dict[str, Any], epoch: int) -> dict[str, Any]:
        identity = Identity(run_id=uuid.UUID(hex=run_id), rank=rank, world=world)
        self.client = start_or_adopt(identity, Options(**options), epoch=epoch)
        return self.client.agent

    def reserve(self, *, image_bytes: int) -> list[str]:
        self.mapped = self.client.reserve(image_bytes)
        return [one.name for one in self.mapped]

    def begin(self, *, step: int) -> dict[str, Any]:
        self.began = self.client.begin(step, f"attempt-{step}")
        return vars(self.began)

    def write(self, *, step: int, nbytes: int, chunks: int = CHUNKS) -> int:
        """So many of `CHUNKS` chunks of the image."""
        mapped = next(one for one in self.mapped if one.name == self.began.name)
        stop = nbytes * chunks // CHUNKS
        mapped.memory[:stop] = image_of(step, nbytes)[:stop]
        return stop

    def seal(self, *, nbytes: int) -> dict[str, Any]:
        return vars(self.client.seal(self.began, nbytes))

    def save(self, *, step: int, nbytes: int) -> dict[str, Any]:
        self.begin(step=step)
        self.write(step=step, nbytes=nbytes)
        return self.seal(nbytes=nbytes)

    def images(self) -> dict[str, Any]:
        """Of every complete image of the agent: step -> whether its bytes are those of the step."""
        self.mapped = self.client.attach()
        found = {}
        for one, mapped in zip(self.client.segments(), self.mapped, strict=True):
            if one.state in ("SEALED", "PROTECTED"):
                found[one.step] = mapped.memory[: one.image_bytes] == image_of(one.step, one.image_bytes)
        return found

    def fork(self) -> str:
        """A child that holds this process's descriptors open and does not go away by itself for a while."""
        child = os.fork()
        if child == 0:
            try:
                self.client.call("ping")
            except CheckpointError as error:
                os.write(2, error.kind.encode() + b"\n")
            import time

            time.sleep(20)
            os._exit(0)
        return str(child)

    def close(self) -> None:
        self.client.close()

    def bye(self) -> None:
        self.client.bye()


def main() -> None:
    trainer = Trainer()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"ok": getattr(trainer, asked.pop("do"))(**asked)}
        except CheckpointError as error:
            answer = {"error": {"kind": error.kind, "message": error.message}}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
